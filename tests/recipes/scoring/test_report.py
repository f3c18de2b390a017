"""recipes/scoring/report.py, clips.py and page.py."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import voiced

from eval.benchmark import Row
from recipes.benchmark import main
from recipes.scoring.clips import marked_words
from recipes.scoring.rows import append_rows

EVIL = "<script>alert(1)</script> & \"x'"
VOID = {"meta", "link", "img", "input", "br"}


def add_rows(folder: Path, system: str, metric: str, scores: list[float], **given: Any) -> None:
    plain: dict[str, Any] = {
        "part": "reconstruction", "system": system, "list": "dev", "metric": metric, "seed": 0,
        "git": "abc", "config": "", "model": system, "library": f"judge of {metric}", "machine": "",
    } | given  # fmt: skip
    rows = [Row(**plain, utterance=f"u{place}", value=score, n=1)
            for place, score in enumerate(scores)]  # fmt: skip
    rows.append(Row(**plain, utterance=None, value=sum(scores) / len(scores), n=len(scores)))
    append_rows(folder / "rows.jsonl", rows)


def add_constant(folder: Path, system: str, metric: str, value: float, **given: Any) -> None:
    """The row of the list alone."""
    add_rows(folder, system, metric, [value] * 3, **given)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join([*lines[:-4], lines[-1], ""]))


def make_folder(out: Path) -> Path:
    """Rows and clips of four systems, one with a name that is markup."""
    for place, system in enumerate(("original", "codec-1", "codec-8", EVIL)):
        add_rows(out, system, "wer", [0.1 * place, 0.2, 0.3])
        if place:
            add_rows(out, system, "stoi", [0.5, 0.6, 0.2 * place])
        if "codec" in system:
            add_constant(out, system, "bitrate", 250.0 * int(system[-1]))
    add_constant(out, "codec-8", "wer", 0.25, list="dev/sex=F")
    clips = []
    for system in ("original", "codec-1", "codec-8", EVIL):
        for number in range(3):
            audio = None if (system, number) == (EVIL, 0) else f"w/{number}.wav"
            clips.append({
                "part": "reconstruction", "list": "dev", "system": system, "id": f"u{number}",
                "text": f"one two three {EVIL}", "transcript": "one too three four",
                "audio": audio, "reference_audio": None, "columns": {"sex": EVIL},
            })  # fmt: skip
    for number in range(3):
        (out / "w").mkdir(exist_ok=True)
        soundfile.write(out / "w" / f"{number}.wav", voiced(0.4, seed=number), 16_000)
    out.joinpath("clips.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "out")


class Page(HTMLParser):
    """The elements of a page, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def run(*argv: object) -> None:
    main([*map(str, argv)])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    root = tmp_path_factory.mktemp("page")
    metrics = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0, "dev/x": None}]
    lines = "".join(json.dumps(line) + "\n" for line in metrics)
    (root / "run").mkdir()
    (root / "run" / "metrics.jsonl").write_text(lines)
    html = root / "page.html"
    folder = make_folder(root / "out")
    run("report", folder, "--html", html, "--clips", 2, "--title", EVIL, "--runs", root / "run")
    return Page(html.read_text(encoding="utf-8"))


def test_page_loads_nothing_and_texts_are_harmless(page: Page) -> None:
    (script,) = page.all("script")  # Not that of the texts.
    assert not script
    for _, attributes in page.elements:
        assert not {key for key in attributes if key.startswith("on")}
        for key in ("src", "href"):
            assert (attributes.get(key) or "data:").startswith(("data:", "#"))
    (policy,) = (one for one in page.all("meta") if "http-equiv" in one)
    assert "default-src 'none'" in (policy["content"] or "")
    assert not any("class" in one and one["class"] == "" for one in page.all("td"))


def test_values_of_the_page_are_those_of_the_rows(page: Page) -> None:
    heads, *rows = page.rows[:5]
    assert heads == ["system", "n", "WER \u2193", "STOI \u2191", "bit rate"]
    assert [row[0] for row in rows] == ["original", "codec-1", "codec-8", EVIL]
    assert rows[1][2].startswith("0.200 [")
    assert rows[0][3] == ""
    assert rows[2][4] == "2000"
    assert rows[1][3].partition(" ")[0] == "0.433"
    cells = [one for one in page.all("td") if one.get("class") == "best"]
    assert cells[0]["data-value"] == repr((0.1 + 0.2 + 0.3) / 3)
    captions = [one["aria-label"] for one in page.all("div") if one.get("role") == "region"]
    assert {"List dev", "List dev by sex"} <= set(captions)


def test_clips_have_players_pictures_and_marked_errors(page: Page) -> None:
    # u0 lacks one recording: the sample is of the others.
    players = page.all("audio")
    assert len(players) == 2 * 4
    assert {(one["aria-label"] or "").rpartition(", ")[2] for one in players} == {"u1", "u2"}
    encoded = (players[0]["src"] or "").partition("base64,")[2]
    with soundfile.SoundFile(io.BytesIO(base64.b64decode(encoded))) as file:
        assert file.frames / file.samplerate == pytest.approx(0.4, abs=0.01)
    assert len([one for one in page.all("img") if (one["alt"] or "").startswith("Spec")]) == 8
    charts = [one["aria-label"] for one in page.all("svg") if one.get("class") == "chart"]
    assert "dev: WER by bit rate" in charts
    assert "dev: cumulative distribution of STOI" in charts
    assert "train/loss by step" in charts


def test_word_errors_are_marked() -> None:
    marked = marked_words("Alpha, bravo & delta.", "alpha brave delta echo")
    plain = re.sub(r'<span class="hidden">.*?</span>| title="\w+"', "", marked)
    assert plain == "alpha <del> bravo</del> <ins> brave</ins> delta <ins> echo</ins>"
    assert "[deleted:" in marked_words("a b", "a")


def test_markdown_has_intervals_and_bold(folder: Path, capsys) -> None:
    run("report", folder)
    printed = capsys.readouterr().out
    assert printed.startswith("### Reconstruction: dev\n\n| system | n | WER \u2193 | STOI")
    assert "| codec-1 | 3 | **0.200** [0.100, 0.300] | 0.433 [0.200, 0.600] | 250 |" in printed
    assert "### Reconstruction: dev by sex\n\n| system | n | WER" in printed
    assert "| F: codec-8 | 3 | 0.250 |" in printed
    assert "| original | 3 | 0.167 [0.000, 0.300] |  |  |" in printed


def test_scores_of_two_judges_have_two_columns(folder: Path, capsys) -> None:
    add_rows(folder, "codec-8", "wer", [0.0, 0.0, 0.0], library="another judge")
    run("report", folder)
    printed = capsys.readouterr().out
    assert "| WER (1) \u2193 |" in printed
    assert "| WER (2) \u2193 |" in printed


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        run("report", folder, "--html", tmp_path / "p.html", "--clips", 0, "--runs", tmp_path)
    with pytest.raises(ValueError, match="--clips must be 0 or more"):
        run("report", folder, "--clips", -1)
    (folder / "clips.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(ValueError, match="line 1 is no clip: 'system'"):
        run("report", folder)
