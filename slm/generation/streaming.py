"""Speech in chunks while the AR runs: each chunk of new frames through the NAR, then the codec.

    AR        s1 s2 s3 ...                     one by one
    NAR       the next `chunk` frames          with the prompt and all decided frames as prompt
    codec     the decided frames but the last  with decided frames before and behind as context

The last LOOK_AHEAD_SECONDS of the decided frames are decoded, but held back: what comes behind them
changes their sound. What little it changes beyond that is cross-faded.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from slm.config import SamplingConfig
from slm.generation.sampling import Request, speech_only, stream_tokens
from slm.generation.tts import Decoder, Models, Utterance, complete

CONTEXT_SECONDS = 2.0
CONTEXT_FRAMES = 32
"""Decided frames before new ones that are decoded with them: as many as this and the seconds."""
LOOK_AHEAD_SECONDS = 0.24
"""With a frame-rate codec of 12.7 M parameters at 25 Hz (10 s of random codes, chunks of 0.5 s) the
waves differ from the whole's by 1e-5 of its level; with 0.08 s by 4e-3."""
FADE_SECONDS = 0.01
"""Of the cross-fade between two decodings of the same frames."""


class Chunk(NamedTuple):
    """Part of what is said."""

    wave: Float[np.ndarray, " _"]
    codes: Int[np.ndarray, "Q _"]
    """What was decided for it: a little ahead of the wave."""
    failure: str | None
    """Known with the last chunk: what the AR's generation ended with."""


def stream(
    models: Models, utterance: Utterance, sampling: SamplingConfig, chunk_seconds: float
) -> Iterator[Chunk]:
    """What `speak` says in one try and under the same seed, as soon as it is there.

    Codebook 1 is the same; the other codebooks see nothing behind their own chunk. Every chunk but
    the last holds `chunk_seconds`, in whole frames. Nothing is tried again: what has been heard
    cannot be taken back.
    """
    lm, codec = models.lm, models.codec
    size = max(1, round(chunk_seconds * codec.frame_rate))
    request = Request(
        context=utterance.context,
        min_tokens=utterance.bounds[0],
        max_tokens=utterance.bounds[1],
        seed=utterance.seed,
        script=utterance.script,
    )
    tokens = stream_tokens(lm, request, speech_only(lm, sampling), sampling)
    waves = WaveStream(codec, utterance.prompt.codes)
    decided, waiting = utterance.prompt.codes, np.zeros(0, np.int64)
    for token in tokens:
        waiting = np.concatenate([waiting, lm.tokenizer.codes_of([token])])
        while len(waiting) >= size:
            new = _complete(models, utterance, decided, waiting[:size], sampling)
            decided, waiting = np.concatenate([decided, new], axis=1), waiting[size:]
            yield Chunk(waves.add(new), new, None)
    new = _complete(models, utterance, decided, waiting, sampling)
    yield Chunk(waves.add(new, last=True), new, tokens.failure)


def _complete(
    models: Models,
    utterance: Utterance,
    decided: Int[np.ndarray, "Q _"],
    first: Int[np.ndarray, " _"],
    sampling: SamplingConfig,
) -> Int[np.ndarray, "Q _"]:
    """Codes of new frames, from their codebook 1 and all frames before them."""
    if not len(first):
        return decided[:, :0]
    prompt = replace(utterance.prompt, codes=decided)
    so_far = [replace(utterance, prompt=prompt)]
    return complete(models, so_far, [first], [utterance.seed], sampling)[0]


class WaveStream:
    """Waves of codes that come in chunks."""

    def __init__(self, codec: Decoder, prompt: Int[np.ndarray, "Q _"]):
        """`prompt` is decoded before the first chunk, and not returned."""
        self._codec = codec
        rate = codec.sample_rate / codec.hop_length
        self._context = max(CONTEXT_FRAMES, round(CONTEXT_SECONDS * rate))
        self._ahead = max(1, round(LOOK_AHEAD_SECONDS * rate))
        self._fade = min(round(FADE_SECONDS * codec.sample_rate), self._ahead * codec.hop_length)
        self._codes = prompt.astype(np.int64)
        self._told = prompt.shape[1]
        """Frames whose wave was returned."""
        self._tail = np.zeros(0, np.float32)
        """How what follows them sounded, decoded without what came since."""

    @torch.inference_mode()
    def add(self, codes: Int[np.ndarray, "Q _"], *, last: bool = False) -> np.ndarray:
        """The wave of all frames that are certain by now; of all that are left, where these codes
        are the last ones."""
        joined = np.concatenate([self._codes, codes.astype(np.int64)], axis=1)
        start = max(0, self._told - self._context)
        stop = joined.shape[1] - (0 if last else self._ahead)
        self._codes = joined
        if stop <= self._told:
            return np.zeros(0, np.float32)
        batch = torch.from_numpy(joined[None, :, start:]).to(self._codec.device)
        wave = self._codec.decode(batch)[0, 0].float().cpu().numpy()
        hop = self._codec.hop_length
        new = wave[(self._told - start) * hop : (stop - start) * hop].copy()
        size = min(self._fade, len(self._tail), len(new))
        rise = np.linspace(0.0, 1.0, size, endpoint=False, dtype=np.float32)
        new[:size] = new[:size] * rise + self._tail[:size] * (1 - rise)
        self._tail = wave[(stop - start) * hop :][: self._fade].copy()
        # What is beyond the context will not be decoded again.
        drop = max(0, stop - self._context)
        self._codes, self._told = joined[:, drop:], stop - drop
        return new


def write_wav(file: Any, waves: Iterable[Float[np.ndarray, " _"]], sample_rate: int) -> None:
    """Writes waves to an open binary file as WAV (mono, 16 bit) while they come. The header leaves
    the length open, as in pipes; where the file can be sought, it is put in at the end."""
    file.write(_wav_header(sample_rate, None))
    size = 0
    for wave in waves:
        samples = (np.clip(wave, -1.0, 1.0) * 32767).round().astype("<i2").tobytes()
        file.write(samples)
        file.flush()
        size += len(samples)
    if file.seekable():
        file.seek(0)
        file.write(_wav_header(sample_rate, size))


def _wav_header(sample_rate: int, size: int | None) -> bytes:
    most = 0xFFFF_FFFF
    whole, data = (most, most - 36) if size is None else (min(36 + size, most), min(size, most))
    # PCM, one channel, bytes a second, bytes and bits a sample.
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    head = struct.pack("<4sI4s", b"RIFF", whole, b"WAVE")
    return head + layout + struct.pack("<4sI", b"data", data)
