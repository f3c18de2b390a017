"""slm/voice.py and the command slm: a voice speaks, transcribes, and says what is wrong."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import plain, voiced
from tiny_slm import TEXT, copy_of, quiet, save_voice

from codec import load_codec, read_audio, write_audio
from slm.config import SamplingConfig
from slm.data.prompts import Prompt
from slm.generation.asr import split_at_quiet
from slm.generation.long_form import PARAGRAPH_PAUSE
from slm.voice import Transcript, Voice

pytestmark = quiet()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> Path:
    return save_voice(tmp_path_factory.mktemp("voices"), tiny_codec_folder)


@pytest.fixture(scope="module")
def voice(folder: Path) -> Voice:
    loaded = Voice.from_pretrained(folder)
    loaded.sampling = SamplingConfig(frames_per_token=(0.5, 1.0), spare_seconds=0.0, max_attempts=1)
    return loaded


def test_only_the_new_part_is_returned(voice: Voice) -> None:
    prompt = voiced(1.0)
    speech = voice.tts("a cat", prompt, "the dog", seed=1)
    assert speech.codes.shape[0] == 3
    assert len(speech.wave) == speech.codes.shape[1] * voice.codec.hop_length
    # The bounds count the text alone; the prompt has 25 frames.
    assert speech.codes.shape[1] == 8
    assert speech.wave.dtype == np.float32


def test_the_wave_goes_on_from_the_prompt(voice: Voice) -> None:
    codes = np.random.default_rng(0).integers(0, 32, (3, 20))
    whole = voice.decode(codes[:, :0], codes)
    assert np.allclose(voice.decode(codes[:, :12], codes[:, 12:]), whole[12 * 640 :], atol=1e-5)


def test_a_batch_is_what_single_items_are(voice: Voice) -> None:
    prompts = [voice.prompt(voiced(seconds), "the dog") for seconds in (0.5, 1.0)]
    together = voice.tts_batch(["a cat", TEXT], prompts, seeds=[3, 4])
    for speech, text, prompt, seed in zip(together, ["a cat", TEXT], prompts, [3, 4], strict=True):
        alone = voice.tts(text, prompt, seed=seed)
        assert np.array_equal(speech.codes, alone.codes)
        assert np.allclose(speech.wave, alone.wave, atol=1e-5)


def test_a_prompt_without_transcript_is_transcribed_by_the_model(
    voice: Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(voice, "transcripts", lambda first: [Transcript("red hen", None)])
    assert voice.prompt(voiced(0.5)).text == "red hen"
    assert voice.prompt(voiced(0.5), "sun").text == "sun"


@pytest.mark.parametrize("made", [("", None), ("...", None), ("a", "cut"), ("a a a", "loop")])
def test_a_prompt_that_could_not_be_transcribed_is_refused(
    voice: Voice, monkeypatch: pytest.MonkeyPatch, made: tuple[str, str | None]
) -> None:
    monkeypatch.setattr(voice, "transcripts", lambda first: [Transcript(*made)])
    with pytest.raises(ValueError, match="could not be transcribed; give --prompt-text"):
        voice.prompt(voiced(0.5))


@pytest.mark.parametrize("text", ["", " ", "..."])
def test_a_prompt_text_without_words_is_refused(voice: Voice, text: str) -> None:
    for prompt in (voiced(0.5), "ann", voice.prompts["ann"]):
        with pytest.raises(ValueError, match="has no words"):
            voice.prompt(prompt, text)
    assert voice.prompt("ann", "red hen").text == "red hen"


def test_a_continuation_counts_the_words_that_its_prompt_has_said(voice: Voice) -> None:
    codes = voice.prompts["ann"].codes
    new = voice.prepare(TEXT, Prompt(codes=codes, text="sun"))
    rest = voice.prepare(TEXT, Prompt(codes=codes, text="", continuation=True))
    assert rest.bounds[1] == new.bounds[1] - codes.shape[1]


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros(16000, np.float32), "silent"),
        (np.full(16000, np.nan, np.float32), "NaN"),
        (np.zeros(0, np.float32), "no samples"),
        (np.ones((2, 16000), np.float32), "one channel"),
    ],
)
def test_arrays_are_checked_like_recordings(voice: Voice, wave: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"the prompt.*{message}"):
        Voice.prompt.__wrapped__(voice, wave, "red hen")  # what goes on without jaxtyping
    if message != "silent":
        with pytest.raises(ValueError, match=f"the recording.*{message}"):
            voice.asr([wave])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((3, 10), 99), "code 99 in codebook 1, which has 32"),
        (np.full((3, 10), -1), "code -1"),
        (np.zeros((2, 10), np.int64), r"\(2, 10\)"),
        (np.zeros((3, 0), np.int64), r"\(3, 0\)"),
        (np.zeros((3, 10)), "float64"),
    ],
)
def test_codes_of_another_codec_are_refused(voice: Voice, codes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        voice.tts("a cat", Prompt(codes=codes, text="red hen"))


def test_a_prompt_text_of_an_unknown_script_is_refused(voice: Voice) -> None:
    with pytest.raises(ValueError, match=r"the prompt's text has .* CYRILLIC"):
        voice.tts("a cat", "ann", "\u043f\u0440\u0438")


def test_a_long_prompt_is_cut_where_it_is_quiet_and_transcribed_anew(
    voice: Voice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(voice, "transcripts", lambda first: [Transcript("red hen", None)])
    monkeypatch.setattr(voice, "longest_prompt", 1.0)
    wave = voiced(2.0)
    wave[12800:13440] = 0.0
    with caplog.at_level(logging.WARNING):
        prompt = voice.prompt(wave, "much more than that")
    assert prompt.codes.shape[1] == 21  # in the quiet of the 21st frame
    assert prompt.text == "red hen"
    assert "2.0 s; its first 0.8 s are used; its text is of all of it" in caplog.text
    caplog.clear()
    voice.prompt(wave)
    assert "0.8 s are used" in caplog.text
    assert "text" not in caplog.text
    monkeypatch.setitem(voice.lm.origin, "tasks", {"tts": 1.0, "asr": 0.0})
    with pytest.raises(ValueError, match=r"the rest of it; give at most 1\.0 s with their text"):
        voice.prompt(wave, "much more than that")


def test_a_prompt_leaves_room_for_a_text(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voice, "transcripts", lambda first: [Transcript("red hen", None)])
    # The longest training utterance has 60 frames.
    assert 20 <= voice.prompt(voiced(8.0)).codes.shape[1] <= 30
    assert voice.tts(TEXT, voiced(8.0)).codes.shape[0] == 3


def test_an_unknown_prompt_name_lists_the_shipped_ones(voice: Voice) -> None:
    assert voice.prompt("ann").credit == "nobody"
    with pytest.raises(ValueError, match="'bob'; this voice has: ann"):
        voice.prompt("bob")
    with pytest.raises(ValueError, match=r"ann; a recording is given as Path\('p3\.wav'\)"):
        voice.tts("a cat", "p3.wav")


def test_what_is_no_wave_is_called_so(voice: Voice) -> None:
    called = (Voice.asr, Voice.convert, Voice.prompt)
    asr, convert, prompt = (method.__wrapped__ for method in called)
    for paths in (["p.wav"], [Path("p.wav")]):
        with pytest.raises(ValueError, match=r"asr_file takes a path\), not .*p\.wav"):
            asr(voice, paths)
    with pytest.raises(ValueError, match=r"the recording: give samples as a NumPy array"):
        asr(voice, voiced(0.5))
    with pytest.raises(ValueError, match=r"the source: .*, or a Path, not 'p3\.wav'"):
        convert(voice, "p3.wav", "ann")
    with pytest.raises(ValueError, match=r"the prompt: .* not tensor"):
        prompt(voice, torch.zeros(3), "red hen")
    with pytest.raises(ValueError, match=r"floats, not as int16"):
        asr(voice, [np.ones(16000, np.int16)])


def test_a_batch_takes_whatever_one_call_takes(voice: Voice) -> None:
    made = voice.tts_batch(["a cat", TEXT], ["ann", voice.prompts["ann"]])
    assert np.array_equal(made[0].codes, voice.tts("a cat", "ann").codes)
    with pytest.raises(ValueError, match="2 texts, 1 prompts and 2 seeds"):
        voice.tts_batch(["a cat", TEXT], ["ann"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("...", "has no words"),
        ("\u4f60\u597d", "CJK"),
        ("cat" * 200, r"the word '(cat){12}\.\.\.' is too long for the model"),
        ("a red " + "cat" * 200, r"the word '(cat){12}\.\.\.' is too long for the model"),
        ("a \ud800 cat", "half of a surrogate pair"),
    ],
)
def test_texts_that_cannot_be_spoken(voice: Voice, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        voice.tts(text, "ann")


@pytest.mark.parametrize("seed", [10**23, -(2**63)])
def test_a_seed_out_of_range_is_named(voice: Voice, seed: int) -> None:
    prompt = voice.prompt(voiced(0.5), "the dog")
    for make in (lambda: voice.tts("a cat", prompt, seed=seed),
                 lambda: voice.tts_batch(["a cat"], [prompt], [seed]),
                 lambda: next(voice.stream("a cat", prompt, seed=seed)),
                 lambda: voice.continue_speech(prompt, 0.5, seed)):  # fmt: skip
        with pytest.raises(ValueError, match=rf"the seed must be within .*, got {seed}"):
            make()


def test_what_is_longer_than_all_training_is_refused(voice: Voice) -> None:
    ends = Prompt(codes=np.zeros((3, 52), np.int64), text="red hen")
    assert voice.prepare("cat", ends).bounds[0] == 8  # 60 of 60 frames
    ends = Prompt(codes=np.zeros((3, 53), np.int64), text="red hen")
    with pytest.raises(ValueError, match=r"2\.1 s of prompt.*no more than 2\.4 s; split the text"):
        voice.prepare(TEXT, ends)


def test_a_recording_that_is_too_long_is_called_so(voice: Voice) -> None:
    with pytest.raises(ValueError, match=r"recording is too long .*; split the recording"):
        voice.transcribe([np.zeros(300, np.int64)])


def test_only_a_continuation_has_no_transcript(voice: Voice) -> None:
    with pytest.raises(ValueError, match="the prompt's text '' has no words"):
        voice.prepare(TEXT, Prompt(codes=np.zeros((3, 5), np.int64), text=""))


def test_a_silent_wave_is_a_failure(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    silence = np.zeros(100, np.float32)
    monkeypatch.setattr("slm.generation.tts._decode", lambda *_: (silence, silence))
    assert voice.tts("a cat", "ann").failure == "empty"


def test_a_silent_stream_is_a_failure(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    text = voice.prepare_long("a cat", voice.prompts["ann"])
    plain = type(voice.codec).decode
    found: list[str] = []
    list(voice.stream_prepared(text, failures=found))
    assert "empty" not in found
    frames = voice.prompts["ann"].codes.shape[1] * voice.codec.hop_length

    def decode(*given: Any, **named: Any) -> torch.Tensor:
        wave = plain(*given, **named).clone()
        wave[..., frames:] *= 0.01
        return wave

    monkeypatch.setattr(type(voice.codec), "decode", decode)
    list(voice.stream_prepared(text, failures=found))
    assert found[-1] == "empty"


def test_asr_batch_is_what_single_waves_give(voice: Voice) -> None:
    waves = [voiced(0.5, seed=1), voiced(1.2, seed=2)]
    assert voice.asr(waves) == [voice.asr([wave])[0] for wave in waves]


def test_a_long_recording_is_transcribed_in_pieces(
    voice: Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def transcripts(first: list[np.ndarray]) -> list[Transcript]:
        lengths.extend(len(codes) for codes in first)
        assert len(first) <= 3
        return [Transcript("w", None), *[Transcript("w", "cut")] * (len(first) - 1)]

    monkeypatch.setattr(voice, "transcripts", transcripts)
    blocks = [voiced(3.0, seed=seed) for seed in range(10)]
    made = voice.transcribe_stream(blocks, batch=3)
    assert made.text.split() == ["w"] * len(lengths)
    assert made.failure == "cut"  # the first failure of a piece is the whole's
    assert max(lengths) <= 60  # the longest training utterance
    assert sum(lengths) >= 30 * 25
    assert voice.asr_stream(blocks, batch=3) == made.text


def test_a_file_is_heard_with_what_is_wrong(voice: Voice, tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", voiced(0.5), voice.codec.sample_rate)
    made = voice.transcribe_file(tmp_path / "a.wav")
    assert made == voice.transcribe_stream(
        [read_audio(tmp_path / "a.wav", voice.codec.sample_rate)]
    )
    assert voice.asr_file(tmp_path / "a.wav") == made.text


def test_transcripts_do_not_depend_on_how_speech_is_drawn(
    voice: Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [np.random.default_rng(seed).integers(0, 32, 40) for seed in range(4)]
    hot = SamplingConfig(temperature=50.0, top_p=1.0, top_k=1000, max_attempts=5, checks=())
    expected = voice.transcripts(codes)
    assert any(made.failure is not None for made in expected)  # no retry replaces these
    monkeypatch.setattr(voice, "sampling", hot)
    assert voice.transcripts(codes) == expected


@pytest.mark.parametrize("seconds", [0.5, 30.0])
def test_silence_says_nothing(voice: Voice, seconds: float) -> None:
    silence = np.zeros(round(seconds * voice.codec.sample_rate), np.float32)
    assert voice.asr([silence, voiced(0.5)]) == ["", *voice.asr([voiced(0.5)])]
    assert voice.transcribe_stream([silence]) == Transcript("", None)
    assert voice.asr([]) == []


def white_noise(seconds: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(round(seconds * 16_000))
    return (0.1 * noise).astype(np.float32)


def test_a_prompt_without_speech_is_refused(voice: Voice, tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", white_noise(2.0), voice.codec.sample_rate)
    with pytest.raises(ValueError, match=r"a\.wav: no speech was found: .*noise"):
        voice.prompt(tmp_path / "a.wav", "red hen")
    with pytest.raises(ValueError, match=r"the prompt: no speech was found: it is only 0\.01 s"):
        voice.tts("a cat", voiced(0.01), "red hen")
    with pytest.raises(ValueError, match="the prompt: no speech was found"):
        voice.convert(voiced(1.0), white_noise(1.0))


def test_noise_is_not_transcribed(voice: Voice, caplog: pytest.LogCaptureFixture) -> None:
    assert voice.transcribe_stream([white_noise(1.0)]) == Transcript("", "empty")
    assert "1.0 s without speech are not transcribed" in caplog.text
    assert voice.asr([white_noise(1.0), voiced(0.5)]) == ["", *voice.asr([voiced(0.5)])]


def test_misuse_is_named(voice: Voice) -> None:
    for text in (["a cat"], None, 3, b"a cat"):
        with pytest.raises(ValueError, match=r"the text must be a string, not .*tts_batch takes a"):
            plain(Voice.tts)(voice, text, "ann")
    with pytest.raises(ValueError, match=r"texts must be a list, not the string 'a cat'"):
        plain(Voice.tts_batch)(voice, "a cat", ["ann"])
    with pytest.raises(ValueError, match=r"seed must be an integer, not 1\.5"):
        plain(Voice.tts)(voice, "a cat", "ann", None, 1.5)
    with pytest.raises(ValueError, match=r"prompt_text must be a string, not \['sun'\]"):
        plain(Voice.prompt)(voice, "ann", ["sun"])
    for waves in (voiced(0.5), "a.wav", Path("a.wav")):
        with pytest.raises(ValueError, match=r"give samples as a NumPy array in a list"):
            plain(Voice.asr)(voice, waves)
    with pytest.raises(ValueError, match=r"the recording: .* not as int16"):
        voice.transcribe_stream([np.ones(16_000, np.int16)])
    with pytest.raises(ValueError, match=r"asr_file takes a path; asr takes samples"):
        plain(Voice.transcribe_file)(voice, voiced(0.5))
    with pytest.raises(ValueError, match=r"the prompt: has samples up to 3277"):
        voice.prompt(np.full(16_000, 3276.8, np.float32), "sun")
    assert plain(Voice.tts)(voice, "a cat", "ann", None, np.int64(3)).seed == 3


def test_a_wave_above_full_scale_is_divided_by_its_peak(
    voice: Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = np.random.default_rng(0).integers(0, 32, (3, 60))
    expected = voice.decode(codes[:, :20], codes[:, 20:])
    peak = np.abs(expected).max()
    decode, gain = type(voice.codec).decode, 1.36 / peak
    monkeypatch.setattr(type(voice.codec), "decode", lambda *given: gain * decode(*given))
    loud = voice.decode(codes[:, :20], codes[:, 20:])
    assert np.abs(loud).max() == pytest.approx(1.0)
    np.testing.assert_allclose(loud, expected / peak, atol=1e-6)
    monkeypatch.setattr(type(voice.codec), "decode", lambda *given: 0.99 / peak * decode(*given))
    quiet = voice.decode(codes[:, :20], codes[:, 20:])
    np.testing.assert_allclose(quiet, 0.99 / peak * expected, atol=1e-6)


def test_splitting_loses_nothing_and_cuts_where_it_is_quiet() -> None:
    random = np.random.default_rng(0)
    wave = random.standard_normal(5000).astype(np.float32)
    wave[800:850] = 0.0
    pieces = list(split_at_quiet(np.split(wave, 7 * [0] + [1234, 3000]), 1000))
    assert np.array_equal(np.concatenate(pieces), wave)
    assert max(map(len, pieces)) <= 1000
    assert 800 <= len(pieces[0]) <= 850


def test_what_it_was_not_trained_for_it_does_not_do(
    voice: Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert voice.lm.origin["tasks"] == {"tts": 1.0, "asr": 1.0, "continuation": 0.0, "text": 0.0}
    monkeypatch.setitem(voice.lm.origin, "tasks", {"tts": 1.0, "asr": 0.0})
    with pytest.raises(ValueError, match="cannot transcribe: it was trained without asr"):
        voice.asr([voiced(0.5)])
    with pytest.raises(ValueError, match="cannot transcribe the prompt; give --prompt-text"):
        voice.prompt(voiced(0.5))
    assert voice.tts("a cat", voiced(0.5), "red hen").codes.shape[0] == 3
    monkeypatch.setitem(voice.lm.origin, "tasks", {"tts": 0.0, "asr": 1.0})
    assert isinstance(voice.asr([voiced(0.5)])[0], str)
    with pytest.raises(ValueError, match="cannot synthesize: it was trained without tts"):
        voice.tts("a cat", "ann")


def test_long_texts_are_said_in_pieces_by_the_same_voice(
    voice: Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The cat sat on a mat, Mr. Hen. It cost 3.50 in all! " * 3
    passage = voice.prepare_long(text, voice.prompt("ann"), seed=2)
    assert len(passage.utterances) > 1
    assert " ".join(one.text.text for one in passage.utterances) == passage.text.text.strip()
    assert passage.text.text != text
    assert {id(one.prompt) for one in passage.utterances} == {id(voice.prompts["ann"])}
    sizes: list[int] = []
    original = voice.synthesize_batch

    def speak(utterances: list) -> list:
        sizes.append(len(utterances))
        made = original(utterances)
        return [*made[:-1], replace(made[-1], failure="loop", score=-1.0)]

    monkeypatch.setattr(voice, "synthesize_batch", speak)
    speech = voice.tts(text, "ann", seed=2)
    count = len(passage.utterances)
    assert sizes == [count]
    assert speech.text == text
    assert speech.failure == f"loop in piece {count} of {count}"
    assert speech.score == -1.0
    assert abs(len(speech.wave) / 640 - speech.codes.shape[1]) < 0.4 * 25 * count


def test_numbers_are_words_by_the_time_that_they_are_checked(
    voice: Voice, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert voice.tts("1 cat", "ann").text == "1 cat"
    assert "1" not in caplog.text.partition("characters that no training text has")[2]


def test_invisible_characters_and_compatibility_forms_change_nothing(voice: Voice) -> None:
    plain = voice.prepare("the cat sat", voice.prompts["ann"])
    prompt = replace(voice.prompts["ann"], text=f"\ufeff{voice.prompts['ann'].text}\u200b")
    odd = voice.prepare("\ufeffth\u00ade c\u200bat \uff53\U0001d41at", prompt)
    assert odd.context == plain.context
    assert odd.text.text == "the cat sat"


def test_signs_that_are_not_read_are_named_once(
    voice: Voice, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        prepared = voice.prepare("the cat \u2122 sat \U0001f600.", voice.prompts["ann"])
    assert prepared.text.text == "the cat sat."
    assert prepared.context == voice.prepare("the cat sat.", voice.prompts["ann"]).context
    assert "the text has signs that are not read: \u2122 \U0001f600" in caplog.text
    assert caplog.text.count("\u2122") == 1


def test_a_blank_line_is_a_pause_of_the_wave(voice: Voice) -> None:
    text = voice.prepare_long("the cat\n\nsat", voice.prompts["ann"])
    assert [one.text.text for one in text.utterances] == ["the cat", "sat"]
    assert text.pauses == [PARAGRAPH_PAUSE, 0.0]
    (speech,) = voice.synthesize([text])
    joined = len(speech.wave) / voice.codec.sample_rate - speech.codes.shape[1] / 25
    assert joined > 0  # The waves are loud to their ends.


def test_markup_is_read_before_the_text(
    voice: Voice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(voice, "lexicon", {"mew": "cat"})
    marked = '<speak>the mew <break time="0.3s"/> [zat](sat)</speak>'
    with caplog.at_level(logging.WARNING):
        text = voice.prepare_long(marked, voice.prompts["ann"])
    assert [one.text.text for one in text.utterances] == ["the cat", "sat"]
    assert text.pauses == [0.3, 0.0]
    assert text.text.original == marked
    assert all(one.text.respelled for one in text.utterances)
    assert not voice.prepare("the cat", voice.prompts["ann"]).text.respelled
    assert "the text has tags that are removed: speak" in caplog.text
    assert "signs" not in caplog.text


def test_capitals_alone_are_small_letters_by_the_time_that_they_are_checked(
    voice: Voice, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        voice.prepare("THE CAT SAT", voice.prompts["ann"])
    assert "characters that no training text has" not in caplog.text
    with caplog.at_level(logging.WARNING):
        voice.prepare("the CAT sat", voice.prompts["ann"])
    assert "characters that no training text has: A C T" in caplog.text


def test_a_voice_is_saved_whole(voice: Voice, tmp_path: Path) -> None:
    voice.save_pretrained(tmp_path / "copy")
    loaded = Voice.from_pretrained(tmp_path / "copy")
    loaded.prompts["bob"] = replace(loaded.prompts["ann"], text="red hen")
    (tmp_path / "copy" / "ar" / "units.model").write_bytes(b"kept")
    card = (tmp_path / "copy" / "README.md").read_text()
    for part in ("base", "3 codebooks, 25 Hz", "tts, asr", "LATIN", "`ann`: nobody"):
        assert part in card
    (tmp_path / "copy" / "README.md").write_text("My own.")
    loaded.save_pretrained(tmp_path / "copy")  # in its place
    loaded.save_pretrained(tmp_path / "deep" / "again")
    again = Voice.from_pretrained(tmp_path / "deep" / "again")
    assert set(again.prompts) == {"ann", "bob"}
    assert again.digest == voice.digest
    assert again.lm.tokenizer.text == voice.lm.tokenizer.text
    assert (tmp_path / "deep" / "again" / "ar" / "units.model").read_bytes() == b"kept"
    assert (tmp_path / "deep" / "again" / "README.md").read_text() == "My own."


def test_save_and_load(voice: Voice, tmp_path: Path) -> None:
    expected = voice.tts("a cat", "ann", seed=7)
    voice.save_pretrained(tmp_path / "copy")
    loaded = Voice.from_pretrained(tmp_path / "copy")
    loaded.sampling = voice.sampling
    assert np.array_equal(loaded.tts("a cat", "ann", seed=7).codes, expected.codes)


def test_folders_that_are_no_voice(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such voice folder"):
        Voice.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="codec/ is missing"):
        Voice.from_pretrained(tmp_path)


def test_the_wrong_codec_is_refused(folder: Path, tmp_path: Path) -> None:
    other = copy_of(folder, tmp_path)
    codec = load_codec(other / "codec")
    with torch.no_grad():
        next(iter(codec.parameters())).add_(1.0)
    codec.save_pretrained(other / "codec")
    with pytest.raises(ValueError, match="is not the one that the model was trained with"):
        Voice.from_pretrained(other)


def test_without_nar_it_transcribes_but_does_not_speak(folder: Path, tmp_path: Path) -> None:
    other = copy_of(folder, tmp_path)
    shutil.rmtree(other / "nar")
    voice = Voice.from_pretrained(other)
    assert isinstance(voice.asr([voiced(0.5)])[0], str)
    with pytest.raises(ValueError, match="has no TTS"):
        voice.tts("a cat", "ann")
