"""recipes/scoring/ratings.py."""

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from eval.benchmark import Row
from recipes.benchmark import main
from recipes.scoring.ratings import low_pass
from recipes.scoring.results import ANCHOR, read_results
from recipes.scoring.rows import ORIGINAL, append_rows, read_rows

SYSTEMS = ("codec-one", "codec-two")


@pytest.fixture
def folder(tmp_path: Path, write_wav) -> Path:
    out, clips = tmp_path / "out", []
    plain: dict[str, Any] = {
        "part": "reconstruction", "list": "dev", "metric": "wer", "value": 0.5, "n": 1, "seed": 0,
        "git": "", "config": "", "model": "", "library": "", "machine": "",
    }  # fmt: skip
    append_rows(out / "rows.jsonl", [Row(**plain, utterance=None, system=x) for x in SYSTEMS])
    for number in range(3):
        for place, system in enumerate((ORIGINAL, *SYSTEMS)):
            name = f"{system}-{number}.wav"
            write_wav(out / name, 0.3, sample_rate=8000 * (1 + place), seed=3 * number + place)
            clips.append({
                "part": "reconstruction", "list": "dev", "system": system, "id": f"utt-{number}",
                "text": "</script><b>one", "transcript": None, "audio": name,
                "reference_audio": f"{ORIGINAL}-{number}.wav", "columns": {},
            })  # fmt: skip
    out.joinpath("clips.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    return out


def run(*argv: object) -> None:
    main([*map(str, argv)])


def make_test(folder: Path, kind: str, **options: object) -> tuple[str, dict[str, Any], Path]:
    """The page, what it embeds, and the file with the meaning of its keys."""
    html = folder.parent / f"{kind}.html"
    more = [text for key, value in options.items() for text in (f"--{key}", value)]
    run("report", folder, "--listening", html, "--kind", kind, *more)
    page = html.read_text(encoding="utf-8")
    (stored,) = re.findall(r'<script type="application/json" id="test">(.*?)</script>', page)
    content = json.loads(stored)
    return page, content, folder / "listening" / f"{content['test']}.jsonl"


def answer(
    folder: Path, content: dict[str, Any], name: str, score: Callable[[str], float], **given: Any
) -> Path:
    """A file of the answers of a rater who knows the systems."""
    keys = (folder / "listening" / f"{content['test']}.jsonl").read_text().splitlines()
    system = {line["stimulus"]: line["system"] for line in map(json.loads, keys)}
    answers = [{"trial": trial["key"], "stimulus": one["key"], "score": score(system[one["key"]])}
               for trial in content["trials"] for one in trial["stimuli"]]  # fmt: skip
    record = {"format": 1, "test": content["test"], "kind": content["kind"], "rater": name,
              "saved": "2026-01-01", "answers": answers} | given  # fmt: skip
    path = folder.parent / f"{name.replace('/', '_')}.json"
    path.write_text(json.dumps(record))
    return path


def scores_by(table: dict[str, float]) -> Callable[[str], float]:
    return lambda system: table[system]


GOOD = scores_by({ORIGINAL: 100, ANCHOR: 20, "codec-one": 50, "codec-two": 70})


def test_page_is_blind_and_complete(folder: Path) -> None:
    page, content, keys = make_test(folder, "mushra")
    for name in (*SYSTEMS, ORIGINAL, ANCHOR, "utt-0", "<b>"):
        assert name not in page
    assert [len(trial["stimuli"]) for trial in content["trials"]] == [4, 4, 4]
    lines = [json.loads(line) for line in keys.read_text().splitlines()]
    assert {(line["id"], line["system"]) for line in lines} == {
        (f"utt-{number}", system) for number in range(3) for system in (*SYSTEMS, ORIGINAL, ANCHOR)
    }
    waves = {}
    for trial in content["trials"]:
        sources = {one["key"]: content["audio"][one["audio"]] for one in trial["stimuli"]}
        sources["reference"] = content["audio"][trial["reference"]]
        assert len(set(sources.values())) == 5  # The hidden reference has its own bytes.
        for key, source in sources.items():
            wave, rate = soundfile.read(io.BytesIO(base64.b64decode(source.partition(",")[2])))
            assert rate == 24_000  # The highest of the trial: no rate gives a system away.
            waves[trial["key"], key] = wave
    (original,) = (line for line in lines if (line["id"], line["system"]) == ("utt-0", ORIGINAL))
    trial = original["trial"]
    hidden, reference = waves[trial, original["stimulus"]], waves[trial, "reference"]
    assert np.abs(hidden - reference).max() <= 2.1 / 32_768
    assert make_test(folder, "mushra")[0] == page
    other = make_test(folder, "mushra", seed=1)[1]
    assert other["test"] != content["test"]


def test_anchor_has_nothing_above_its_band() -> None:
    noise = np.random.default_rng(0).standard_normal(48_000).astype(np.float32) * 0.1
    low = low_pass(noise, 24_000)
    assert low.size == noise.size
    before, after = (np.abs(np.fft.rfft(wave)) ** 2 for wave in (noise, low))
    hertz = np.fft.rfftfreq(noise.size, 1 / 24_000)

    def gain(start: float, end: float) -> float:
        band = (hertz >= start) & (hertz < end)
        return float(10 * np.log10(after[band].sum() / before[band].sum()))

    # ITU-R BS.1534-3: 0.1 dB below 3.5 kHz, -25 dB from 4 kHz on, -50 dB from 4.5 kHz on.
    assert abs(gain(100, 3400)) < 0.1
    assert gain(4000, 12_000) < -25
    assert gain(4500, 12_000) < -50


def test_ratings_become_rows_once(folder: Path, capsys) -> None:
    _, content, _ = make_test(folder, "mushra")
    before = read_rows(folder / "rows.jsonl")
    ann = answer(folder, content, "ann", GOOD)
    bob = answer(folder, content, "b/ob", scores_by(
        {ORIGINAL: 90, ANCHOR: 10, "codec-one": 40, "codec-two": 80}))  # fmt: skip
    run("ratings", ann, "--out", folder)
    run("ratings", ann, bob, "--out", folder)
    rows = read_rows(folder / "rows.jsonl")
    assert rows[: len(before)] == before
    run("ratings", bob, ann, "--out", folder)
    run("ratings", ann, "--out", folder)
    assert read_rows(folder / "rows.jsonl") == rows
    results = read_results([folder])
    column = next(one for one in results.values if one.metric == "mushra")
    assert column.part == "ratings"
    own = {name: row.value for name, row in results.values[column].items()}
    assert own == {ORIGINAL: 95, ANCHOR: 15, "codec-one": 45, "codec-two": 75}
    ends = [results.values[column._replace(metric=f"mushra_{end}")]["codec-one"].value
            for end in ("low", "high")]  # fmt: skip
    assert ends == [40, 50]  # Two raters who differ, and no difference between utterances.
    raters = results.values[column._replace(metric="mushra_raters")]
    assert raters["codec-one"].value == 2
    capsys.readouterr()
    run("report", folder)
    assert "| codec-two | 3 | **75.000** [70.000, 80.000] | 2.000 |" in capsys.readouterr().out


def test_post_screening(folder: Path, caplog) -> None:
    _, content, _ = make_test(folder, "mushra")
    good = answer(folder, content, "good", GOOD)
    bad = answer(folder, content, "bad", lambda system: 89 if system == ORIGINAL else 60)
    with pytest.raises(ValueError, match="post-screening leaves no rater"):
        run("ratings", bad, "--out", folder)
    run("ratings", good, bad, "--out", folder)
    assert "trials (ITU-R BS.1534-3): bad" in caplog.text
    rows = [row for row in read_rows(folder / "rows.jsonl") if row.metric == "mushra"]
    assert {row.value for row in rows if row.system == "codec-one"} == {50}


@pytest.mark.parametrize(("kind", "samples"), [("mos", 9), ("smos", 6)])
def test_opinion_scores(folder: Path, kind: str, samples: int) -> None:
    _, content, _ = make_test(folder, kind)
    assert len(content["trials"]) == samples  # Originals have no other recording to resemble.
    assert all((trial["reference"] is None) == (kind == "mos") for trial in content["trials"])
    ann = answer(folder, content, "ann", lambda system: 4 if system == "codec-two" else 2)
    run("ratings", ann, "--out", folder)
    rows = read_rows(folder / "rows.jsonl")
    assert {row.value for row in rows if (row.metric, row.system) == (kind, "codec-two")} == {4}


def test_wrong_files_are_user_errors(folder: Path, tmp_path: Path) -> None:
    _, content, _ = make_test(folder, "mos")
    four = scores_by(dict.fromkeys((ORIGINAL, *SYSTEMS), 4))
    for given, message in (
        ({"answers": []}, "rater ann has no score of 9 of 9 samples"),
        ({"test": "0123"}, "has no test 0123; --out names the first folder"),
        ({"test": "../x"}, "x"),
        ({"rater": " "}, "the rater has no name"),
        ({"answers": [{}]}, "no answers of a listening test"),
    ):
        path = answer(folder, content, "ann", four, **given)
        with pytest.raises(ValueError, match=message):
            run("ratings", path, "--out", folder)
    path = answer(folder, content, "ann", lambda _: 6)
    with pytest.raises(ValueError, match="a score of 6; it must be 1 to 5"):
        run("ratings", path, "--out", folder)
    path = answer(folder, content, "ann", four)
    twice = tmp_path / "twice.json"
    path.rename(twice)
    path = answer(folder, content, "ann", lambda _: 3)
    with pytest.raises(ValueError, match="rater ann has other answers in another file"):
        run("ratings", path, twice, "--out", folder)
    (folder / "clips.jsonl").unlink()
    with pytest.raises(ValueError, match=r"--kind mushra: clips\.jsonl has no clips with"):
        make_test(folder, "mushra")


def test_newer_answers_of_a_rater_replace_the_stored_ones(folder: Path) -> None:
    _, content, _ = make_test(folder, "mos")
    for score, saved in ((2, "2026-01-02"), (4, "2026-01-03"), (1, "2026-01-01")):
        path = answer(folder, content, "ann", lambda _, score=score: score, saved=saved)
        run("ratings", path, "--out", folder)
    results = read_results([folder])
    column = next(one for one in results.values if one.metric == "mos")
    assert {row.value for row in results.values[column].values()} == {4}
