"""Speech that goes on without a text, from models that were trained for it."""

import logging
from pathlib import Path

import numpy as np
import pytest
from conftest import voiced
from tiny_slm import quiet, save_voice

from slm.config import SamplingConfig
from slm.voice import Voice

pytestmark = quiet()


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> Voice:
    loaded = Voice.from_pretrained(save_voice(tmp_path_factory.mktemp("v"), tiny_codec_folder))
    loaded.sampling = SamplingConfig(checks=("loop", "silence", "early", "leak"), loop_seconds=9.0)
    return loaded


def test_it_lasts_as_long_as_was_asked_for(
    voice: Voice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match="trained without continuation"):
        voice.continue_speech("ann", 1.0)
    monkeypatch.setitem(voice.lm.origin, "tasks", {"tts": 1.0, "continuation": 1.0})
    speech = voice.continue_speech(voiced(0.5), 0.8, seed=3)
    assert 0 < speech.codes.shape[1] <= 20
    assert len(speech.wave) == speech.codes.shape[1] * 640
    assert (speech.failure, speech.tries) == (None, 1)
    assert caplog.text.count("nar.text_dropout 0") == 1
    assert "failed" not in caplog.text  # A cut is what was asked for.
    again = voice.continue_speech(voiced(0.5), 0.8, seed=3)
    assert np.array_equal(speech.codes, again.codes)
    assert not np.array_equal(speech.codes, voice.continue_speech("ann", 0.8, seed=4).codes)


def test_what_does_not_fit(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(voice.lm.origin, "tasks", {"tts": 1.0, "continuation": 1.0})
    with pytest.raises(ValueError, match="less than one frame"):
        voice.continue_speech("ann", 0.01)
    with pytest.raises(ValueError, match="the prompt is too long"):
        voice.continue_speech(voiced(11.0), 1.0)
