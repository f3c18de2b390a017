"""Voice conversion: codebook 1 stays the source's, the NAR makes the others; any length."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import voiced
from tiny_slm import copy_of, quiet, save_voice

from slm.generation.asr import Transcript, cut_at_quiet
from slm.generation.conversion import encode_source
from slm.voice import Voice

pytestmark = quiet()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> Path:
    return save_voice(tmp_path_factory.mktemp("voices"), tiny_codec_folder)


@pytest.fixture(scope="module")
def voice(folder: Path) -> Voice:
    return Voice.from_pretrained(folder)


@pytest.fixture
def asked(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Texts and lengths that the NAR is given; the model hears `cat` in everything."""
    calls: list[tuple[str, int]] = []
    decode = voice.nar.decode

    def reported(texts, prompts, first, **options):
        calls.extend(zip(texts, map(len, first), strict=True))
        return decode(texts, prompts, first, **options)

    monkeypatch.setattr(voice.nar, "decode", reported)
    monkeypatch.setattr(voice, "transcripts", lambda first: [Transcript("cat", None)] * len(first))
    return calls


def test_codebook_1_is_the_sources(voice: Voice, asked: list[tuple[str, int]]) -> None:
    wave = voiced(1.01)
    speech = voice.convert(wave, "ann", source_text="red hen")
    first = encode_source(voice.codec, [wave]).first
    assert np.array_equal(speech.codes[0], first)
    assert speech.codes.shape == (3, 26)
    assert len(speech.wave) == len(wave)
    assert asked == [("a cat red hen", 26)]
    assert (speech.text, speech.prompt_text, speech.failure) == ("red hen", "a cat", None)


def test_texts_are_transcribed_or_all_empty(
    voice: Voice, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    voice.convert(voiced(0.5), voiced(0.6, seed=1))
    assert asked.pop() == ("cat cat", 13)
    monkeypatch.setitem(voice.lm.origin, "tasks", {"tts": 1.0, "asr": 0.0})
    # Half of the text would be put to the wrong half of the speech.
    voice.convert(voiced(0.5), voiced(0.6, seed=1), source_text="red hen")
    assert asked.pop() == ("", 13)
    voice.convert(voiced(0.5), "ann")
    assert asked.pop() == ("", 13)
    voice.convert(voiced(0.5), voiced(0.6, seed=1), "red hen", "the dog")
    assert asked.pop() == ("the dog red hen", 13)


def test_a_nar_without_texts_has_nothing_transcribed(
    voice: Voice, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = replace(voice.nar.config, text_dropout=1.0)
    monkeypatch.setattr(voice.nar, "config", used)
    monkeypatch.setattr(voice, "transcripts", None)
    assert voice.convert(voiced(0.5), voiced(0.6, seed=1)).text == ""
    assert voice.convert(voiced(0.5), "ann", source_text="red hen").text == "red hen"
    assert asked == [("", 13)] * 2


def test_a_long_source_comes_in_pieces(
    voice: Voice, asked: list[tuple[str, int]], tmp_path: Path, write_wav,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = write_wav(tmp_path / "long.wav", 7.5)
    speech = voice.convert(path, "ann", source_text="too much for one piece")
    assert "its text is of all of them and is not used" in caplog.text
    assert len(speech.wave) == 7.5 * 16000
    assert sum(length for _, length in asked) == speech.codes.shape[1] == 188
    # The longest training utterance has 60 frames, the prompt 10.
    assert max(length for _, length in asked) <= 50
    assert {text for text, _ in asked} == {"a cat cat"}


def test_a_nar_that_never_lacked_a_text_is_told_of(
    voice: Voice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reported = "nar.text_dropout 0"
    voice.convert(voiced(0.5), "ann", "red hen")
    assert reported not in caplog.text
    monkeypatch.setitem(voice.lm.origin, "tasks", {"tts": 1.0, "asr": 0.0})
    voice.convert(voiced(7.5), "ann")
    assert caplog.text.count(reported) == 1
    caplog.clear()
    used = replace(voice.nar.config, text_dropout=0.1)
    monkeypatch.setattr(voice.nar, "config", used)
    voice.convert(voiced(0.5), "ann")
    assert reported not in caplog.text


def test_blocks_of_any_size_are_heard_alike(voice: Voice) -> None:
    wave = voiced(3.01)
    whole = encode_source(voice.codec, [wave])
    parts = encode_source(voice.codec, np.split(wave, range(1000, len(wave), 1000)))
    assert np.array_equal(whole.first, parts.first)
    assert np.allclose(whole.levels, parts.levels)
    assert len(whole.levels) == len(whole.first) == 76
    assert parts.num_samples == len(wave)


def test_cuts_are_where_it_is_quiet() -> None:
    levels = np.ones(100)
    levels[[35, 60]] = 0.0
    cuts = cut_at_quiet(levels, 40)
    assert [(cut.start, cut.stop) for cut in cuts] == [(0, 35), (35, 62), (62, 100)]
    assert cut_at_quiet(levels[:40], 40) == [slice(0, 40)]


def test_what_cannot_be_converted(voice: Voice, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the source.*silent"):
        voice.convert(np.zeros(16000, np.float32), "ann")
    with pytest.raises(ValueError, match=r"nowhere\.wav"):
        voice.convert(tmp_path / "nowhere.wav", "ann")
    other = copy_of(folder, tmp_path)
    shutil.rmtree(other / "nar")
    with pytest.raises(ValueError, match=r"no nar/.*two or more codebooks"):
        Voice.from_pretrained(other).convert(voiced(0.5), "ann")
