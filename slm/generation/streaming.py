"""Streaming TTS: chunks of speech while the AR runs.

    AR        s1 s2 s3 ...                       one by one
    NAR       the next `chunk` frames            with the prompt and all earlier frames as prompt
    codec     all frames but the look-ahead      with earlier and later frames as context

The last LOOK_AHEAD_SECONDS are decoded, but held back, since later frames change their samples; the
small changes beyond that are cross-faded.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from slm.config import SamplingConfig
from slm.generation.sampling import Request, TokenStream, speech_only
from slm.generation.tts import Decoder, Models, Utterance, complete

CONTEXT_SECONDS = 2.0
CONTEXT_FRAMES = 32
"""Left context of the codec: the larger of CONTEXT_SECONDS and these frames."""
LOOK_AHEAD_SECONDS = 0.24
"""Right context of the codec. With a frame-rate codec of 12.7 M parameters at 25 Hz (10 s of random
codes, chunks of 0.5 s) streamed waves differ from the offline one by 1e-5 of its level; with 0.08 s
by 4e-3."""
FADE_SECONDS = 0.01
"""Cross-fade between two decodings of the same frames."""
INFO_CHUNKS = {"software": b"ISFT", "comment": b"ICMT"}
"""Tags of `Voice.tags` and their chunks in WAV files."""


class AudioChunk(NamedTuple):
    """New speech of a stream."""

    wave: Float[np.ndarray, " _"]
    codes: Int[np.ndarray, "Q _"]
    """New frames; they run ahead of the wave by the look-ahead."""
    failure: str | None
    """Of the AR's generation, in the last chunk."""


def stream(
    models: Models, utterance: Utterance, sampling: SamplingConfig, chunk_seconds: float
) -> Iterator[AudioChunk]:
    """Streams one attempt of `synthesize` under the same seed, without checks and retries.

    Codebook 1 is the same; the NAR has no frames after a chunk as context. Every chunk but the last
    has `chunk_seconds`, rounded to frames.
    """
    lm, codec = models.lm, models.codec
    size = max(1, round(chunk_seconds * codec.frame_rate))
    request = Request(
        context=utterance.context,
        min_tokens=utterance.bounds[0],
        max_tokens=utterance.bounds[1],
        seed=utterance.seed,
        forced=utterance.forced,
    )
    tokens = TokenStream(lm, request, speech_only(lm, sampling), sampling)
    waves = WaveStream(codec, utterance.prompt.codes)
    context, waiting = utterance.prompt.codes, np.zeros(0, np.int64)
    for token in tokens:
        waiting = np.concatenate([waiting, lm.tokenizer.codes_of([token])])
        while len(waiting) >= size:
            new = _complete(models, utterance, context, waiting[:size], sampling)
            context, waiting = np.concatenate([context, new], axis=1), waiting[size:]
            yield AudioChunk(waves.add(new), new, None)
    new = _complete(models, utterance, context, waiting, sampling)
    yield AudioChunk(waves.add(new, last=True), new, tokens.failure)


def _complete(
    models: Models,
    utterance: Utterance,
    context: Int[np.ndarray, "Q _"],
    first: Int[np.ndarray, " _"],
    sampling: SamplingConfig,
) -> Int[np.ndarray, "Q _"]:
    """All codebooks of new frames, from their codebook 1 and all frames before them."""
    if not len(first):
        return context[:, :0]
    prompt = replace(utterance.prompt, codes=context)
    extended = [replace(utterance, prompt=prompt)]
    return complete(models, extended, [first], [utterance.seed], sampling)[0]


class WaveStream:
    """Decodes codes that come in chunks."""

    def __init__(self, codec: Decoder, prompt: Int[np.ndarray, "Q _"]):
        """`prompt`: left context of the first chunk; its wave is not returned."""
        self._codec = codec
        rate = codec.sample_rate / codec.hop_length
        self._context = max(CONTEXT_FRAMES, round(CONTEXT_SECONDS * rate))
        self._ahead = max(1, round(LOOK_AHEAD_SECONDS * rate))
        self._fade = min(round(FADE_SECONDS * codec.sample_rate), self._ahead * codec.hop_length)
        self._codes = prompt.astype(np.int64)
        self._num_decoded = prompt.shape[1]
        """Frames of `_codes` whose wave was returned."""
        self._gain = 1.0
        """Falls with the first chunk whose peak is above 1, and never rises."""
        self._tail = np.zeros(0, np.float32)
        """The samples after them, decoded without later frames; for the cross-fade."""

    @torch.inference_mode()
    def add(self, codes: Int[np.ndarray, "Q _"], *, last: bool = False) -> np.ndarray:
        """The wave of all frames but the look-ahead; with `last`, of all frames."""
        joined = np.concatenate([self._codes, codes.astype(np.int64)], axis=1)
        start = max(0, self._num_decoded - self._context)
        stop = joined.shape[1] - (0 if last else self._ahead)
        self._codes = joined
        if stop <= self._num_decoded:
            return np.zeros(0, np.float32)
        batch = torch.from_numpy(joined[None, :, start:]).to(self._codec.device)
        wave = self._codec.decode(batch)[0, 0].float().cpu().numpy()
        hop = self._codec.hop_length
        new = wave[(self._num_decoded - start) * hop : (stop - start) * hop].copy()
        size = min(self._fade, len(self._tail), len(new))
        rise = np.linspace(0.0, 1.0, size, endpoint=False, dtype=np.float32)
        new[:size] = new[:size] * rise + self._tail[:size] * (1 - rise)
        self._tail = wave[(stop - start) * hop :][: self._fade].copy()
        # Frames before the context are not needed again.
        drop = max(0, stop - self._context)
        self._codes, self._num_decoded = joined[:, drop:], stop - drop
        return self._limited(new)

    def _limited(self, new: np.ndarray) -> np.ndarray:
        """The samples within [-1, 1]; unchanged as long as no chunk's peak is above 1."""
        before, peak = self._gain, float(np.abs(new).max(initial=0.0))
        self._gain = min(before, 1.0 / peak) if peak else before
        if self._gain == 1.0:
            return new
        gains = np.full(len(new), self._gain, np.float32)
        size = min(self._fade, len(new))
        gains[:size] = np.linspace(before, self._gain, size, dtype=np.float32)
        return np.clip(new * gains, -1.0, 1.0)


def write_wav(
    file: Any,
    waves: Iterable[Float[np.ndarray, " _"]],
    sample_rate: int,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Writes waves to an open binary file as WAV (mono, 16 bit) as they arrive. The header has no
    length, as in pipes; in a seekable file it is filled in at the end.

    Args:
        tags: values of INFO_CHUNKS.
    """
    info = _info_list(tags or {})
    file.write(_wav_header(sample_rate, None, info))
    size = 0
    for wave in waves:
        samples = (np.clip(wave, -1.0, 1.0) * 32767).round().astype("<i2").tobytes()
        file.write(samples)
        file.flush()
        size += len(samples)
    if file.seekable():
        file.seek(0)
        file.write(_wav_header(sample_rate, size, info))


def _info_list(tags: Mapping[str, str]) -> bytes:
    """RIFF's chunk LIST of type INFO: texts that end with a zero byte, at even positions."""
    content = b"INFO"
    for name, text in tags.items():
        value = text.encode() + b"\0"
        padding = len(value) % 2 * b"\0"
        content += INFO_CHUNKS[name] + struct.pack("<I", len(value)) + value + padding
    return struct.pack("<4sI", b"LIST", len(content)) + content if tags else b""


def _wav_header(sample_rate: int, size: int | None, info: bytes) -> bytes:
    limit, others = 0xFFFF_FFFF, 36 + len(info)
    total, data = (limit, limit - others)
    if size is not None:
        total, data = min(others + size, limit), min(size, limit)
    # PCM, one channel, bytes a second, bytes and bits a sample.
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    head = struct.pack("<4sI4s", b"RIFF", total, b"WAVE")
    return head + layout + info + struct.pack("<4sI", b"data", data)
