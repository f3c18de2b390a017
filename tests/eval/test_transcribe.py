from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from eval.transcribe import SAMPLE_RATE, Judge, blocks_at_pauses, max_tokens


class FakeWhisper:
    """Says how many blocks of which length it was given."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self.options: dict[str, Any] = {}

    def transcribe(self, wave: np.ndarray, **options: Any) -> tuple[list[Any], None]:
        self.blocks.append(wave)
        self.options = options
        return [
            SimpleNamespace(text=" hello "),
            SimpleNamespace(text=""),
            SimpleNamespace(text="you"),
        ], None


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    (tmp_path / "model.bin").touch()
    judge = Judge(tmp_path, device="cpu")
    vars(judge)["model"] = FakeWhisper()
    return judge


def noise(seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.1, 0.1, round(seconds * rate)).astype(np.float32)


def test_segments_are_joined_and_the_wave_is_resampled(judge: Judge) -> None:
    assert judge.transcribe(noise(1.0, 24000), 24000) == "hello you"
    assert judge.model.blocks[0].size == SAMPLE_RATE
    assert judge.model.options["temperature"] == 0.0
    assert judge.model.options["language"] == "en"


@pytest.mark.parametrize("wave", [np.zeros(0), np.zeros(16000), np.full(16000, 5e-5)])
def test_silence_has_no_transcript(judge: Judge, wave: np.ndarray) -> None:
    assert judge.transcribe(wave.astype(np.float32), 16000) == ""
    assert not judge.model.blocks


def test_nan_is_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match="NaN"):
        judge.transcribe(np.array([0.1, np.nan], np.float32), 16000)


def test_long_recording_is_split_at_a_pause(judge: Judge) -> None:
    wave = noise(400.0)
    wave[285 * SAMPLE_RATE : 286 * SAMPLE_RATE] = 0
    pieces = list(blocks_at_pauses(wave))
    assert [285 <= pieces[0].size / SAMPLE_RATE <= 286, len(pieces)] == [True, 2]
    assert np.array_equal(np.concatenate(pieces), wave)
    judge.transcribe(wave, SAMPLE_RATE)
    assert len(judge.model.blocks) == 2


def test_output_length_is_bounded() -> None:
    assert max_tokens(1.0) == 28
    assert max_tokens(300.0) == 200


def test_missing_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.bin.*make models"):
        Judge(tmp_path / "none")


@pytest.mark.filterwarnings("default")
def test_broken_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"nothing of a model")
    with pytest.raises(ValueError, match="cannot read the judge"):
        _ = Judge(tmp_path, device="cpu").model


MODEL = ROOT / "models" / "whisper-base"


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="`make models` has not run")
@pytest.mark.filterwarnings("default")
def test_real_judge_is_deterministic_and_bounded() -> None:
    judge = Judge(MODEL, num_threads=1, device="cpu")
    first = judge.transcribe(noise(2.0), SAMPLE_RATE)
    assert judge.transcribe(noise(2.0), SAMPLE_RATE) == first
    assert len(first.split()) <= max_tokens(2.0)
