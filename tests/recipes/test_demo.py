"""recipes/demo.py: the commands it runs, and its report."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import voiced
from tiny_slm import quiet, save_voice

from codec import write_audio
from eval.speaker import SpeakerEncoder
from eval.transcribe import Judge
from recipes import demo
from recipes.lib.commands import Command
from slm.data.prompts import Prompt

pytestmark = quiet()


@pytest.fixture
def voice(tmp_path: Path, tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = save_voice(tmp_path, tiny_codec_folder)
    codes = np.zeros((3, 40), np.int64)
    for name in ("ann", "ben"):
        Prompt(codes=codes, text="a cat", credit="nobody").save(folder / "prompts", name)
    for name in ("JUDGE", "SPEAKER"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(demo, name, tmp_path / name)

    class Encoder:
        def embed(self, wave: np.ndarray, sample_rate: int) -> np.ndarray:
            return np.ones(4, np.float32)

    monkeypatch.setattr(Judge, "__init__", lambda *_: None)
    monkeypatch.setattr(Judge, "transcribe", lambda *_: "the hen sat")
    monkeypatch.setattr(SpeakerEncoder, "from_folder", lambda *_: Encoder())
    return folder


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands, whose waves are written without running them."""
    ran: list[list[str]] = []

    def run(command: Command, number: int, total: int) -> str:
        ran.append(command.arguments[3:])
        if "--out" in command.arguments:
            out = command.arguments[command.arguments.index("--out") + 1]
            write_audio(out, voiced(1.0), 16_000)
        return json.dumps({"text": "the hen said"}) + "\n"

    monkeypatch.setattr(demo, "run", run)
    return ran


def test_demo_synthesizes_converts_and_transcribes(
    voice: Path, commands: list[list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    demo.main(["--voice", str(voice), "--out", str(out), "--text", "the dog sat"])
    assert [command[0] for command in commands] == ["tts", "vc", "asr"]
    assert commands[0][-4:] == ["--prompt", "ann", "--out", str(out / "speech.wav")]
    assert commands[1][-4:] == ["--target", "ben", "--out", str(out / "converted.wav")]
    report = (out / "scores.md").read_text(encoding="utf-8")
    assert "| speech.wav | 33 % | 1.00 | the hen sat |" in report
    assert "| converted.wav | 33 % |" in report
    assert "the hen said" in report
    for name in ("ann.wav", "ben.wav", "spectrogram.png"):
        assert (out / name).stat().st_size > 1000
    assert not (out / "yours.wav").exists()


def test_demo_with_a_prompt_recording(
    voice: Path, commands: list[list[str]], tmp_path: Path
) -> None:
    write_audio(tmp_path / "me.wav", voiced(1.0), 16_000)
    out = tmp_path / "out"
    demo.main(["--voice", str(voice), "--out", str(out), "--prompt", str(tmp_path / "me.wav")])
    assert [command[0] for command in commands] == ["tts", "tts", "vc", "asr"]
    assert commands[1][-3:] == [str(tmp_path / "me.wav"), "--out", str(out / "yours.wav")]
    assert "| yours.wav |" in (out / "scores.md").read_text(encoding="utf-8")


def test_missing_files_are_user_errors(
    voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--voice", str(voice), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="no such recording"):
        demo.main([*given, "--prompt", "none.wav"])
    monkeypatch.setattr(demo, "JUDGE", tmp_path / "none")
    with pytest.raises(ValueError, match="run `make models` first"):
        demo.main(given)
    (voice / "prompts" / "ben.json").unlink()
    with pytest.raises(ValueError, match="at least two prompts"):
        demo.main(given)
