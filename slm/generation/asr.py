"""ASR: recordings to codes, codebook 1 to transcripts; long recordings in pieces."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from slm.config import SamplingConfig
from slm.generation.checks import SILENCE_RMS
from slm.generation.sampling import Request, generate, restrict_context, text_bound, text_only
from slm.models.ar import SpeechLM

logger = logging.getLogger(__name__)


QUIET_SEARCH = 1 / 3
"""A long recording is split at the quietest position of this last share of a piece."""


def split_at_quiet(
    blocks: Iterable[Float[np.ndarray, " _"]], longest: int
) -> Iterator[Float[np.ndarray, " _"]]:
    """Splits a recording, given in blocks, at pauses into pieces of at most `longest` samples."""
    held = np.zeros(0, np.float32)
    window = max(1, longest // 100)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > longest:
            start = longest - int(longest * QUIET_SEARCH)
            count = (longest - start) // window
            tail = held[start : start + count * window].reshape(count, window)
            cut = start + int(np.square(tail).sum(1).argmin()) * window + window // 2
            yield held[:cut]
            held = held[cut:]
    if len(held):
        yield held


def cut_at_quiet(levels: Float[np.ndarray, " T"], longest: int) -> list[slice]:
    """Splits frames of these energies at pauses into spans of at most `longest` frames."""
    cuts, start = [], 0
    while len(levels) - start > longest:
        first = start + longest - int(longest * QUIET_SEARCH)
        stop = first + int(levels[first : start + longest].argmin()) if longest > 2 else first
        cuts.append(slice(start, stop))
        start = stop
    return [*cuts, slice(start, len(levels))]


GREEDY = SamplingConfig(greedy=True, max_attempts=1, checks=("loop",))
"""ASR is greedy and not retried: a sampled transcript would be no better."""


class Transcript(NamedTuple):
    """The transcript of a recording."""

    text: str
    failure: str | None
    """None, or a failed check: empty, loop or cut (truncated)."""


@torch.inference_mode()
def encode(codec: Any, waves: Sequence[Float[np.ndarray, " _"]]) -> list[Int[np.ndarray, "Q _"]]:
    """Codes (Q, T) of each wave (S,) at the codec's sample rate, in one batch."""
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = torch.zeros(len(waves), 1, int(lengths.max()))
    for row, wave in enumerate(waves):
        batch[row, 0, : len(wave)] = torch.from_numpy(np.ascontiguousarray(wave, np.float32))
    codes = codec.encode(batch.to(codec.device), lengths.to(codec.device))
    return [
        item[:, :length].cpu().numpy()
        for item, length in zip(codes.codes, codes.lengths.tolist(), strict=True)
    ]


def transcribe(lm: SpeechLM, first: Sequence[Int[np.ndarray, " _"]]) -> list[Transcript]:
    """Greedy transcripts of codes of codebook 1, each (T,), in one batch.

    Raises:
        ValueError: a model that was not trained on ASR, and codes beyond its context length.
    """
    lm.check_task("asr")
    if not first:
        return []
    requests = []
    for codes in first:
        context = lm.format.asr_context(codes)
        most = text_bound(len(codes), lm.tokenizer)
        most = restrict_context(lm.max_positions, context.ids, 1, most, "recording")
        requests.append(
            Request(
                context=context.tokens, min_tokens=0, max_tokens=most, seed=0, forced=context.forced
            )
        )
    made = generate(lm, requests, text_only(lm), GREEDY)
    failed = [one.failure for one in made if one.failure is not None]
    if failed:
        logger.warning("%d of %d transcripts failed: %s", len(failed), len(made), ", ".join(failed))
    return [Transcript(lm.tokenizer.decode_text(one.tokens).strip(), one.failure) for one in made]


def audible_pieces(
    blocks: Iterable[Float[np.ndarray, " _"]], longest: int
) -> Iterator[Float[np.ndarray, " _"]]:
    """Pieces of at most `longest` samples of a recording given in blocks, without silent ones, for
    which a model invents words."""
    for piece in split_at_quiet(blocks, longest):
        if float(np.abs(piece).max(initial=0.0)) >= SILENCE_RMS:
            yield piece


def transcribe_pieces(
    codec: Any,
    pieces: Iterable[Float[np.ndarray, " _"]],
    transcribe: Callable[[Sequence[np.ndarray]], Sequence[Transcript]],
    batch: int = 8,
) -> Iterator[Transcript]:
    """The transcript of each piece, `batch` at a time; `transcribe` takes codes of codebook 1."""
    waiting = iter(pieces)
    while part := list(islice(waiting, batch)):
        yield from transcribe([codes[0] for codes in encode(codec, part)])


def join_transcripts(parts: Iterable[Transcript]) -> Transcript:
    """The transcript of a recording from those of its pieces, with the first failure."""
    parts = list(parts)
    failures = [part.failure for part in parts if part.failure is not None]
    text = " ".join(part.text for part in parts if part.text)
    return Transcript(text, failures[0] if failures else None)
