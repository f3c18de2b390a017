"""slm/generation/streaming.py: codes and waves equal the offline ones."""

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_slm import TEXT, quiet, save_voice

from codec.audio import audio_tags, read_audio
from slm.config import SamplingConfig
from slm.data.prompts import Prompt
from slm.generation.sampling import Request, generate, speech_only
from slm.generation.streaming import LOOK_AHEAD_SECONDS, WaveStream, stream, write_wav
from slm.generation.tts import Utterance, complete, decode
from slm.voice import Voice

pytestmark = quiet()
CHUNK_SECONDS, CHUNK = 0.4, 10


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> Voice:
    loaded = Voice.from_pretrained(save_voice(tmp_path_factory.mktemp("v"), tiny_codec_folder))
    loaded.sampling = SamplingConfig(
        frames_per_token=(1.5, 2.5), spare_seconds=0.0, max_attempts=1, checks=()
    )
    return loaded


@pytest.fixture
def utterance(voice: Voice) -> Utterance:
    codes = np.random.default_rng(0).integers(0, 32, (3, 12))
    return voice.prepare(TEXT, Prompt(codes=codes, text="red hen"), seed=5)


def test_codes_equal_those_of_the_same_chunks_offline(voice: Voice, utterance: Utterance) -> None:
    chunks = list(stream(voice.models, utterance, voice.sampling, CHUNK_SECONDS))
    low, high = utterance.bounds
    request = Request(context=utterance.context, min_tokens=low, max_tokens=high, seed=5)
    (made,) = generate(voice.lm, [request], speech_only(voice.lm, voice.sampling), voice.sampling)
    first = voice.lm.tokenizer.codes_of(made.tokens)
    assert np.array_equal(np.concatenate([chunk.codes for chunk in chunks], axis=1)[0], first)
    assert len(first) > 2 * CHUNK
    decided = utterance.prompt.codes
    for chunk, start in zip(chunks, range(0, len(first) + 1, CHUNK), strict=True):
        prompt = Prompt(codes=decided, text="red hen")
        one = replace(utterance, prompt=prompt)
        part = first[start : start + CHUNK]
        (expected,) = complete(voice.models, [one], [part], [5], voice.sampling)
        assert np.array_equal(chunk.codes, expected)
        decided = np.concatenate([decided, expected], axis=1)
    assert [chunk.failure for chunk in chunks] == [None] * (len(chunks) - 1) + [made.failure]


def test_waves_equal_the_offline_wave_away_from_chunk_edges(
    voice: Voice, utterance: Utterance
) -> None:
    chunks = list(stream(voice.models, utterance, voice.sampling, CHUNK_SECONDS))
    wave = np.concatenate([chunk.wave for chunk in chunks])
    codes = np.concatenate([chunk.codes for chunk in chunks], axis=1)
    whole = decode(voice.codec, utterance.prompt.codes, codes)
    assert wave.shape == whole.shape
    error = np.abs(wave - whole)
    # Frames shortly before an edge are decoded with little behind them.
    ahead = round(LOOK_AHEAD_SECONDS * 25)
    near = np.zeros(len(wave), bool)
    for edge in range(CHUNK - ahead, codes.shape[1], CHUNK):
        near[max(0, (edge - 3) * 640) : (edge + 1) * 640] = True
    assert not near.all()
    assert error[~near].max() < 1e-5
    assert error.max() < 0.1 * np.abs(whole).max()


def test_chunks_of_any_length_join_to_the_offline_wave(voice: Voice) -> None:
    codes = np.random.default_rng(1).integers(0, 32, (3, 150))
    for size in (7, 150):
        made = WaveStream(voice.codec, codes[:, :4])
        edges = [*range(4, 150, size), 150]
        waves = [made.add(codes[:, a:b]) for a, b in pairwise(edges)]
        waves.append(made.add(codes[:, :0], last=True))
        wave = np.concatenate(waves)
        whole = decode(voice.codec, codes[:, :4], codes[:, 4:])
        assert wave.shape == whole.shape
        assert np.abs(wave - whole).max() < 0.1 * np.abs(whole).max()


def test_the_first_chunk_comes_before_the_ar_is_done(
    voice: Voice, utterance: Utterance, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    forward = voice.lm.lm.base_model.forward

    def counted(*args: object, **inputs: object) -> object:
        nonlocal steps
        steps += 1
        return forward(*args, **inputs)

    monkeypatch.setattr(voice.lm.lm.base_model, "forward", counted)
    chunks = stream(voice.models, utterance, voice.sampling, CHUNK_SECONDS)
    assert len(next(chunks).wave) > 0
    assert steps == CHUNK
    rest = list(chunks)
    assert steps >= CHUNK + sum(chunk.codes.shape[1] for chunk in rest)


def test_a_voice_streams_long_texts(voice: Voice) -> None:
    text = " ".join(["The cat sat on a mat and ran."] * 2)
    waves = list(voice.stream(text, "ann", seed=1, chunk_seconds=CHUNK_SECONDS))
    assert len(waves) > 2
    assert len(voice.prepare_long(text, voice.prompt("ann"), seed=1).utterances) > 1
    with pytest.raises(ValueError, match="chunk_seconds must be positive"):
        voice.stream(text, "ann", chunk_seconds=0.0)
    with pytest.raises(ValueError, match="has no words"):
        voice.stream("...", "ann")  # before the first wave is asked for


def test_a_codec_without_nar_streams(voice: Voice, utterance: Utterance) -> None:
    class Ramp:
        """A frame's samples are its code."""

        sample_rate, hop_length, device = 16000, 640, torch.device("cpu")

        def decode(self, codes: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
            return codes[:, :1].repeat_interleave(640, dim=-1) / 32

    codes = np.arange(30)[None] % 32
    made = WaveStream(Ramp(), codes[:, :5])
    waves = [made.add(codes[:, 5:9]), made.add(codes[:, 9:20]), made.add(codes[:, 20:], last=True)]
    assert [len(wave) // 640 for wave in waves] == [0, 9, 16]
    assert np.array_equal(np.concatenate(waves)[::640] * 32, codes[0, 5:])


def test_loud_chunks_stay_within_full_scale() -> None:
    class Loud:
        """A frame's samples are an alternating wave of its code."""

        sample_rate, hop_length, device = 16000, 640, torch.device("cpu")

        def decode(self, codes: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
            wave = codes[:, :1].repeat_interleave(640, dim=-1) / 10
            return wave * (-1.0) ** torch.arange(wave.shape[-1])

    made = WaveStream(Loud(), np.full((1, 5), 9))
    quiet = made.add(np.full((1, 20), 9))
    assert np.abs(quiet).max() == pytest.approx(0.9)
    loud = np.concatenate([made.add(np.full((1, 20), 15)), made.add(np.full((1, 20), 12))])
    assert np.abs(loud).max() == 1.0
    assert np.abs(loud[-640:]).max() == pytest.approx(12 / 15)  # the level does not rise again
    assert np.abs(np.diff(np.abs(loud[2000:9000]))).max() < 0.4


@pytest.mark.parametrize("comment", ["even", "odd"])
@pytest.mark.parametrize("pipe", [True, False])
def test_wav_streams_have_tags(
    pipe: bool, comment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tags = io.BytesIO(), {"software": "Parlance 1", "comment": comment}
    monkeypatch.setattr(file, "seekable", lambda: not pipe)
    write_wav(file, [np.full(100, 0.5, np.float32)], 16000, tags)
    (tmp_path / "a.wav").write_bytes(file.getvalue())
    assert audio_tags(tmp_path / "a.wav") == tags
    assert np.allclose(read_audio(tmp_path / "a.wav", 16000), np.full(100, 0.5), atol=1e-4)
    assert pipe or len(file.getvalue()) == int.from_bytes(file.getvalue()[4:8], "little") + 8


@pytest.mark.parametrize("pipe", [True, False])
def test_wav_files_grow(pipe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    if pipe:
        monkeypatch.setattr(file, "seekable", lambda: False, raising=False)
    waves = [np.full(100, 0.5, np.float32), np.full(50, -2.0, np.float32)]
    write_wav(file, waves, 16000)
    data = file.getvalue()
    assert len(data) == 44 + 300
    assert data[4:8] == (b"\xff\xff\xff\xff" if pipe else (336).to_bytes(4, "little"))
    samples, rate = soundfile.read(io.BytesIO(data))
    assert rate == 16000
    assert np.allclose(samples, np.concatenate([np.full(100, 0.5), np.full(50, -1.0)]), atol=1e-4)
