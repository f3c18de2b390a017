"""recipes/scoring/tts.py: lists, folders and commands; groups; samples."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from codec import read_audio
from codec.json_lines import read_json_lines
from eval.benchmark import ScoredUtterance, score_asr
from recipes import benchmark as program
from recipes.scoring import judges as scoring
from recipes.scoring.options import length_group
from recipes.scoring.rows import read_rows

COPY = f"{sys.executable} -S -c 'import shutil, sys; shutil.copy(*sys.argv[1:3])'"
COPY += " {prompt} {out}"
"""A system that repeats the prompt, whatever the {text}."""


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`--judge` is a judge that reads "hello world"; the list has a line per call."""
    calls: list[str] = []

    def load(judge: str | None, _speaker: str | None, **_: object) -> scoring.Judges:
        def transcribe(_wave: np.ndarray, _rate: int) -> str:
            calls.append("")
            return "hello world"

        def embed(wave: np.ndarray, _rate: int) -> np.ndarray:
            return np.array([1.0, float(np.abs(wave).mean())])

        return scoring.Judges(transcribe, embed, f"judge {judge}", "encoder")

    monkeypatch.setattr("recipes.scoring.options.load_judges", load)
    return calls


Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(tmp_path: Path, judged: list[str]) -> Run:
    """`run("tts", ...)` and the rows of lists (by system, list and metric) and clips that it
    writes."""

    def start(*arguments: str | Path, out: str = "out") -> SimpleNamespace:
        judged.clear()
        command = [*map(str, arguments), "--judge", "x", "--measures", "speaking_rate"]
        program.main([*command, "--out", str(tmp_path / out)])
        rows = read_rows(tmp_path / out / "rows.jsonl")
        of_lists = {(r.system, r.list, r.metric): r.value for r in rows if r.utterance is None}
        clips = [line.value for line in read_json_lines(tmp_path / out / "clips.jsonl")]
        return SimpleNamespace(rows=of_lists, clips=clips, calls=len(judged))

    return start


def write(path: Path, *entries: dict) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_command_synthesizes_and_is_scored(tmp_path: Path, run: Run, write_wav) -> None:
    write_wav(tmp_path / "p.wav", 1.0)
    texts = write(
        tmp_path / "texts.jsonl",
        {"id": "a", "text": "hello world", "prompt": "p.wav", "sex": "F", "age": 10},
        {"id": "b", "text": "hello there", "prompt": "p.wav", "sex": "M", "age": 9},
        {"id": "c", "text": "hello", "prompt": "none.wav"},
    )
    command = ["tts", "--texts", texts, "--run", f"copy={COPY} {{text}}", "--by", "sex"]
    first = run(*command, "--by", "length", "--by", "age")
    assert first.rows["copy", "texts", "wer"] == pytest.approx((0 + 1 + 1) / 5)
    assert first.rows["copy", "texts", "failure"] == pytest.approx(1 / 3)
    assert first.rows["copy", "texts/sex=F", "wer"] == 0
    assert first.rows["copy", "texts/sex=M", "wer"] == 0.5
    assert first.rows["copy", "texts/length=1-3 words", "wer"] == pytest.approx(2 / 5)
    assert first.rows["copy", "texts", "similarity"] == pytest.approx(1, abs=1e-6)
    ages = [key[1] for key in first.rows if "age=" in key[1] and key[2] == "wer"]
    assert ages == ["texts/age=9", "texts/age=10"]
    assert first.calls == 2
    assert first.clips[0] == {
        "part": "tts", "list": "texts", "system": "copy", "id": "a", "text": "hello world",
        "transcript": "hello world", "audio": "runs/copy/texts/a.wav", "failure": None,
        "reference_audio": str(tmp_path / "p.wav"),
        "columns": {"language": "en", "sex": "F", "length": "1-3 words", "age": "10"},
    }  # fmt: skip
    assert first.clips[2]["audio"] is None
    assert first.clips[2]["failure"].startswith("status 1: FileNotFoundError")
    again = run(*command)
    assert again.calls == 0
    assert [clip["id"] for clip in again.clips] == ["a", "b", "c"]


def test_folders_of_waves_and_several_systems(tmp_path: Path, run: Run, write_wav) -> None:
    for system in ("one", "two"):
        for name in ("x", "y"):
            write_wav(tmp_path / system / "speaker" / f"{name}.wav", 0.6)
            (tmp_path / system / "speaker" / f"{name}.txt").write_text(f"hello {name}\n")
    command = ["tts", "--list", tmp_path / "one", "--list", f"2nd={tmp_path / 'two'}"]
    found = run(*command, "--list-name", "dev", "--sample", "1", "--seed", "0")
    assert {key[:2] for key in found.rows} == {("one", "dev"), ("2nd", "dev")}
    assert [clip["id"] for clip in found.clips] == ["speaker/y", "speaker/y"]
    (tmp_path / "two" / "speaker" / "y.txt").unlink()
    with pytest.raises(ValueError, match=r"y\.wav: has no text; write it to .*y\.txt"):
        run(*command)


def test_the_sample_of_a_seed_is_the_same_for_every_system(
    tmp_path: Path, run: Run, write_wav
) -> None:
    write_wav(tmp_path / "w.wav", 0.5)
    entries = [{"id": str(i), "text": "hello", "audio": "w.wav"} for i in range(20)]
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", *entries)
    lists = ["--list", f"a={tmp_path / 'a.jsonl'}", "--list", f"b={tmp_path / 'b.jsonl'}"]
    found = run("tts", *lists, "--list-name", "l", "--sample", "4", "--seed", "1")
    ids = {
        system: [clip["id"] for clip in found.clips if clip["system"] == system]
        for system in ("a", "b")
    }
    assert ids["a"] == ids["b"]
    other = run("tts", *lists[:2], "--sample", "4", "--seed", "2", out="other")
    assert ids["a"] != [clip["id"] for clip in other.clips]


def test_similarity_to_the_speaker_and_to_others(tmp_path: Path, run: Run, write_wav) -> None:
    for index, name in enumerate(("w", "p", "sub/p", "he", "she")):
        write_wav(tmp_path / f"{name}.wav", 0.5, seed=index)
    speakers = [("p", "anna", "F"), ("sub/p", "anna", "F"), ("he", "bob", "M"), ("she", "eve", "F")]
    listed = write(
        tmp_path / "speakers.jsonl",
        *({"audio": f"{a}.wav", "speaker": s, "sex": x} for a, s, x in speakers),
    )
    item = {"id": "a", "text": "hello", "audio": "w.wav", "prompt": "p.wav", "speaker": "anna"}
    made = write(tmp_path / "l.jsonl", item, {**item, "id": "b", "speaker": "unknown"})
    options = ["--list", made, "--name", "s", "--speaker", "y", "--speakers", listed]
    found = run("tts", *options)

    def to(first: str, second: str) -> float:
        waves = [read_audio(tmp_path / f"{name}.wav", 16_000) for name in (first, second)]
        left, right = ([1.0, float(np.abs(wave).mean())] for wave in waves)
        return float(np.dot(left, right) / np.linalg.norm(left) / np.linalg.norm(right))

    assert found.rows["s", "l", "similarity_speaker"] == pytest.approx(to("w", "sub/p"))
    assert found.rows["s", "l", "similarity_others"] == pytest.approx(to("w", "she"))
    write(made, {**item, "speaker": "nobody"})
    with pytest.raises(ValueError, match="has no speaker of the list"):
        run("tts", *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"give --list, or --texts and a system \(--voice, --run\)"),
        (["--texts", "t.jsonl"], "--texts needs a system: --voice, --run"),
        (["--list", "l.jsonl", "--run", "x"], "--run is a system for --texts, not for --list"),
        (["--list", "l.jsonl", "--voice", "a", "--voice", "b"], "--voice is a system for --texts"),
        (["--list", "l.jsonl", "--list", "x=l.jsonl", "--name", "n"], "--name names one system"),
        (["--list", "original=l.jsonl"], "two systems of l are called original"),
        (["--texts", "t.jsonl", "--run", "say {out}"], r"the command has no \{text\}"),
        (["--list", "l.jsonl", "--by", "sex"], "--by sex: no item of l has this column"),
        (["--list", "l.jsonl", "--sample", "0"], "--sample must be at least 1"),
        (["--list", "l.jsonl", "--sample", "1", "--limit", "1"], "give one of them"),
        (["--list", "l.jsonl", "--list", "l.jsonl"], "two systems of l are called"),
    ],
)
def test_bad_options(
    tmp_path: Path, run: Run, write_wav, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_wav(tmp_path / "w.wav", 0.5)
    write(tmp_path / "t.jsonl", {"id": "a", "text": "hello"})
    write(tmp_path / "l.jsonl", {"id": "a", "text": "hello", "audio": "w.wav"})
    with pytest.raises(ValueError, match=message):
        run("tts", *arguments)


def test_groups_of_lengths() -> None:
    texts = ["word " * count for count in (1, 3, 4, 10, 11, 75, 76, 500)]
    assert [length_group(ScoredUtterance(id="a", text=text)) for text in texts] == [
        "1-3 words", "1-3 words", "4-10 words", "4-10 words", "11-25 words", "26-75 words",
        "76 words or more", "76 words or more",
    ]  # fmt: skip
    assert length_group(score_asr("a", "\u4eca\u5929\u5929\u6c14", "", "zh")) == "4-10 words"


def test_recordings_of_the_texts_and_prompts_that_are_no_files(
    tmp_path: Path, run: Run, write_wav
) -> None:
    for name in ("w", "r", "p"):
        write_wav(tmp_path / f"{name}.wav", 0.5)
    item = {"text": "hello there", "audio": "w.wav", "prompt": "anna"}
    made = write(
        tmp_path / "l.jsonl",
        {"id": 1, **item, "prompt": "p.wav", "recording": "r.wav"}, {"id": 2, **item},
    )  # fmt: skip
    found = run("tts", "--list", made, "--name", "s", "--speaker", "y")
    assert found.rows["original", "l", "wer"] == found.rows["s", "l", "wer"] == 0.5
    audio = {(clip["system"], clip["id"]): clip["audio"] for clip in found.clips}
    assert audio == {
        ("original", "1"): str(tmp_path / "r.wav"),
        ("s", "1"): str(tmp_path / "w.wav"), ("s", "2"): str(tmp_path / "w.wav"),
    }  # fmt: skip
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    similar = [row for row in rows if (row.system, row.metric) == ("s", "similarity")]
    assert [row.utterance for row in similar] == ["1", None]


def test_without_a_judge_no_words_are_scored(tmp_path: Path, write_wav) -> None:
    write_wav(tmp_path / "w.wav", 0.5)
    made = write(tmp_path / "l.jsonl", {"id": "a", "text": "hello", "audio": "w.wav"})
    command = ["tts", "--list", str(made), "--measures", "--name", "s", "--out", str(tmp_path)]
    program.main(command)
    metrics = {row.metric for row in read_rows(tmp_path / "rows.jsonl")}
    assert metrics == {"failure", "seconds"}
