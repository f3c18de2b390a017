"""The pages of recipes/scoring/report.py and ratings.py in headless Chromium."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

from recipes.benchmark import main
from recipes.scoring.rows import ORIGINAL, Row, append_rows, read_rows

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
SYSTEMS = {"codec-1": 0.4, "codec-8": 0.1}
PLAY = """(async (player) => {
  await player.play();
  const begin = Date.now();
  while (player.currentTime === 0 && Date.now() < begin + 10000) {
    await new Promise((done) => setTimeout(done, 20));
  }
  return player.currentTime > 0 && player.duration > 0.3 && player.error === null;
})"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path / "browser")
    yield opened
    opened.close()


@pytest.fixture
def folder(tmp_path: Path, write_wav) -> Path:
    out, clips, rows = tmp_path / "out", [], []
    for place, (system, wer) in enumerate({ORIGINAL: 0.05, **SYSTEMS}.items()):
        for number in (0, 1, 2, None):
            plain = {"part": "reconstruction", "system": system, "list": "dev", "seed": 0,
                     "git": "", "config": "", "model": "", "library": "judge",
                     "machine": ""}  # fmt: skip
            name = None if number is None else f"u{number}"
            value = wer + (number or 0) / 10
            rows.append(Row(**plain, utterance=name, metric="wer", value=value, n=5))
            if number is None and system in SYSTEMS:
                rows.append(Row(**plain, utterance=None, metric="bitrate", n=3,
                                value=250.0 * int(system[-1])))  # fmt: skip
                continue
            if number is not None:
                write_wav(out / f"{system}-{number}.wav", 0.5, seed=3 * number + place)
                clips.append({
                    "part": "reconstruction", "list": "dev", "system": system, "id": name,
                    "text": "one two", "transcript": "one too", "audio": f"{system}-{number}.wav",
                    "reference_audio": f"{ORIGINAL}-{number}.wav", "columns": {},
                })  # fmt: skip
    append_rows(out / "rows.jsonl", rows)
    out.joinpath("clips.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    return out


def run(*argv: object) -> None:
    main([*map(str, argv)])


def check(browser: Browser, page: Path) -> None:
    """Nothing is requested but the page and what it embeds, nothing is wrong, nothing overflows."""
    embedded = ("data:", "blob:", page.as_uri())
    assert not [address for address in browser.requests() if not address.startswith(embedded)]
    assert not browser.complaints()
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_report(browser: Browser, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    run("report", folder, "--html", page)
    browser.open(page)
    count = browser.run("document.querySelectorAll('audio').length")
    assert count == 9
    for number in range(count):
        assert browser.run(f"{PLAY}(document.querySelectorAll('audio')[{number}])")
    # The next one stops the one before.
    playing = "[...document.querySelectorAll('audio')].filter((one) => !one.paused).length"
    assert browser.run(playing) <= 1
    images = "[...document.images].every((one) => one.complete && one.naturalWidth > 0)"
    assert browser.run(images)
    table = "document.querySelector('table.sortable')"
    names = f"[...{table}.tBodies[0].rows].map((row) => row.cells[0].textContent)"
    assert browser.run(names) == [ORIGINAL, "codec-1", "codec-8"]
    click = f"{table}.tHead.rows[0].cells[%d].querySelector('button').click()"
    browser.run(click % 2)
    assert browser.run(names) == [ORIGINAL, "codec-8", "codec-1"]
    browser.run(click % 2)
    assert browser.run(names) == ["codec-1", "codec-8", ORIGINAL]
    browser.run(click % 3)  # The bit rate, which originals lack.
    assert browser.run(names) == ["codec-1", "codec-8", ORIGINAL]
    sorted_by = f"[...{table}.tHead.rows[0].cells].map((one) => one.getAttribute('aria-sort'))"
    assert browser.run(sorted_by) == ["none", "none", "none", "ascending"]
    for width in (1200, 400):
        browser.screenshot(tmp_path / "page.png", width)
        check(browser, page)


@pytest.mark.parametrize("kind", ["mushra", "mos", "smos"])
def test_ratings_are_kept_and_saved(
    browser: Browser, folder: Path, tmp_path: Path, kind: str
) -> None:  # fmt: skip
    page, saved = tmp_path / "test.html", tmp_path / "saved"
    saved.mkdir()
    run("report", folder, "--listening", page, "--kind", kind, "--clips", 2)
    (keys,) = (folder / "listening").glob("*.jsonl")
    system = {
        line["stimulus"]: line["system"] for line in map(json.loads, keys.read_text().splitlines())
    }
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(saved))
    browser.open(page)
    browser.run("document.getElementById('rater').value = 'Ann B.'")
    browser.run("document.querySelector('form button').click()")
    content = json.loads(browser.run("document.getElementById('test').textContent"))
    sources = {content["audio"][one["audio"]]: one["key"]
               for trial in content["trials"] for one in trial["stimuli"]}  # fmt: skip
    better = {ORIGINAL: 5, "codec-8": 4, "codec-1": 2}
    ready = "!document.querySelector('.buttons .main').disabled"
    for number in range(len(content["trials"])):
        assert not browser.run(ready)
        samples = browser.run("[...document.querySelectorAll('fieldset, input[type=range]')].map("
                              "(one) => one.parentElement.querySelector('audio').src)")  # fmt: skip
        for place, source in enumerate(samples):
            score = better.get(system[sources[source]], 1)
            box = f"[...document.querySelectorAll('fieldset, input[type=range]')][{place}]"
            assert browser.run(f"{PLAY}({box}.parentElement.querySelector('audio'))")
            if kind == "mushra":
                browser.run(f"{box}.value = {20 * score}; "
                            f"{box}.dispatchEvent(new Event('input'))")  # fmt: skip
            else:
                browser.run(f"{box}.querySelector('input[value=\"{score}\"]').click()")
        browser.wait(ready)
        if number == 0:  # Loading the page again loses nothing.
            browser.open(page)
            browser.wait(ready)
        if number == 1:
            browser.screenshot(tmp_path / "page.png", 400)
            check(browser, page)
        browser.run("document.querySelector('.buttons .main').click()")
    browser.run("document.getElementById('save').click()")
    browser.until(lambda: [*saved.glob("*.json")], "the file of answers")
    (answers,) = saved.glob("*.json")
    run("ratings", answers, "--out", folder)
    run("ratings", answers, "--out", folder)
    rows = [row for row in read_rows(folder / "rows.jsonl") if row.metric == kind]
    found = {(row.system, row.value) for row in rows}
    scale = 20 if kind == "mushra" else 1
    expected = {(name, score * scale) for name, score in better.items()}
    expected |= {("anchor-3.5kHz", 20)} if kind == "mushra" else set()
    expected -= {(ORIGINAL, 5)} if kind == "smos" else set()
    assert found == expected
    assert len(rows) == len({(row.system, row.utterance) for row in rows})
    check(browser, page)
