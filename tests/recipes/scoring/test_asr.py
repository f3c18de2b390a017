"""recipes/scoring/asr.py: recordings that a system transcribes."""

import sys
from pathlib import Path

import pytest

from codec.json_lines import read_json_lines, write_json_lines
from recipes import benchmark as program
from recipes.scoring import asr
from recipes.scoring.judges import Judges
from recipes.scoring.rows import read_rows

NAME = f"{sys.executable} -S -c 'import sys, pathlib; print(pathlib.Path(sys.argv[1]).stem)'"
NAME += " {audio}"
"""Transcribes a recording as its file's name."""


@pytest.fixture
def recordings(tmp_path: Path, write_wav) -> Path:
    for name in ("alpha", "bravo"):
        write_wav(tmp_path / f"{name}.wav", 0.5)
    entries = [
        {"id": "1", "audio": "alpha.wav", "text": "Alpha.", "accent": "us"},
        {"id": "2", "audio": "bravo.wav", "text": "bravo charlie", "accent": "in"},
    ]
    write_json_lines(tmp_path / "list.jsonl", entries)
    return tmp_path / "list.jsonl"


def scores(out: Path) -> dict[tuple[str, str, str], float]:
    rows = read_rows(out / "rows.jsonl")
    return {(r.system, r.list, r.metric): r.value for r in rows if r.utterance is None}


def test_a_command_and_a_model_transcribe(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def load(source: str, _speaker: None, **_: object) -> Judges:
        assert source == "tiny-whisper"
        return Judges(lambda wave, _: calls.append(len(wave)) or "alpha", None, "tiny@0", "")

    monkeypatch.setattr(asr, "load_judges", load)
    out = tmp_path / "out"
    command = ["asr", "--recordings", str(recordings), "--run", f"name={NAME}"]
    command += ["--model", "w=tiny-whisper", "--by", "accent", "--out", str(out)]
    program.main(command)
    found = scores(out)
    assert found["name", "list", "asr_wer"] == pytest.approx(1 / 3)
    assert found["name", "list/accent=us", "asr_wer"] == 0
    assert found["name", "list", "failure"] == 0
    assert found["w", "list", "asr_wer"] == pytest.approx(2 / 3)
    assert calls == [8000, 8000]
    clips = [line.value for line in read_json_lines(out / "clips.jsonl")]
    assert [clip["transcript"] for clip in clips] == ["alpha", "alpha", "alpha", "bravo"]
    program.main(command)
    assert len(calls) == 2
    assert scores(out) == found


def test_all_words_of_what_a_system_cannot_transcribe_are_deletions(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bravo.wav").unlink()
    script = "import sys, pathlib; print(pathlib.Path(open(sys.argv[1]).name).stem)"
    judges = Judges(lambda _wave, _rate: "alpha", None, "tiny@0", "")
    monkeypatch.setattr(asr, "load_judges", lambda *_, **__: judges)
    out = tmp_path / "out"
    command = ["asr", "--recordings", str(recordings), "--model", "m=whisper"]
    command += ["--run", f"s={sys.executable} -S -c '{script}' {{audio}}", "--out", str(out)]
    program.main(command)
    for system in ("m", "s"):
        assert scores(out)[system, "list", "failure"] == 0.5
        assert scores(out)[system, "list", "asr_wer"] == pytest.approx(2 / 3)
    clips = [line.value for line in read_json_lines(out / "clips.jsonl")]
    failures = {(clip["system"], clip["id"]): clip["failure"] for clip in clips}
    assert failures["m", "1"] is failures["s", "1"] is None
    assert all("bravo.wav" in failures[system, "2"] for system in ("m", "s"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --list, or --recordings and a system"),
        (["--recordings", "l.jsonl"], "--recordings needs a system"),
        (["--recordings", "l.jsonl", "--slm", "x"], "--slm needs the codec"),
        (["--list", "l.jsonl", "--model", "x"], "--model is a system for --recordings"),
        (["--recordings", "none", "--run", "x {audio}"], "none: no such list"),
    ],
)
def test_bad_options(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        program.main(["asr", *arguments, "--out", str(tmp_path)])


def test_characters_of_a_script_without_spaces(tmp_path: Path) -> None:
    listed = tmp_path / "zh.jsonl"
    text, heard = "\u4eca\u5929\u5929\u6c14\u5f88\u597d", "\u4eca\u5929\u5929\u6c14\u5f88\u574f"
    write_json_lines(listed, [{"id": "a", "text": text, "hypothesis": heard}])
    program.main(["asr", "--list", str(listed), "--language", "zh", "--out", str(tmp_path)])
    assert scores(tmp_path)["zh", "zh", "asr_wer"] == pytest.approx(1 / 6)
    assert scores(tmp_path)["zh", "zh", "asr_cer"] == pytest.approx(1 / 6)
