"""From recordings to codes, and from codebook 1 to what they say, for a batch.

Long recordings in pieces that a model can take.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from slm.config import SamplingConfig
from slm.data.interleaving import stretches_of
from slm.data.sequences import NO_FORCED_TOKENS, asr_context
from slm.generation.checks import SILENCE_RMS
from slm.generation.sampling import Request, generate, restrict_context, text_bound, text_only
from slm.models.ar import SpeechLM
from slm.tokenization.tokenizer import SpeechTextTokenizer

logger = logging.getLogger(__name__)


QUIET_SEARCH = 1 / 3
"""A long recording is split at the quietest spot of this last share of a window."""


def split_at_quiet(
    blocks: Iterable[Float[np.ndarray, " _"]], longest: int
) -> Iterator[Float[np.ndarray, " _"]]:
    """Cuts a recording that comes in blocks into pieces of at most `longest` samples."""
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
    """Cuts frames of these energies into stretches of at most `longest`, likewise."""
    cuts, start = [], 0
    while len(levels) - start > longest:
        first = start + longest - int(longest * QUIET_SEARCH)
        stop = first + int(levels[first : start + longest].argmin()) if longest > 2 else first
        cuts.append(slice(start, stop))
        start = stop
    return [*cuts, slice(start, len(levels))]


ONCE = SamplingConfig(greedy=True, max_attempts=1, checks=("loop",))
"""A transcript is the likeliest one; another, drawn at random, would be no better for it."""


class Transcript(NamedTuple):
    """What a recording says."""

    text: str
    failure: str | None
    """None, or what is wrong with it: empty, loop or cut."""


@torch.inference_mode()
def encode(codec: Any, waves: Sequence[Float[np.ndarray, " _"]]) -> list[Int[np.ndarray, "Q _"]]:
    """Codes (Q, T) of each wave."""
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = torch.zeros(len(waves), 1, int(lengths.max()))
    for row, wave in enumerate(waves):
        batch[row, 0, : len(wave)] = torch.from_numpy(np.ascontiguousarray(wave, np.float32))
    codes = codec.encode(batch.to(codec.device), lengths.to(codec.device))
    return [
        item[:, :length].cpu().numpy()
        for item, length in zip(codes.codes, codes.lengths.tolist(), strict=True)
    ]


def num_given(tokenizer: SpeechTextTokenizer, codes: Int[np.ndarray, " T"]) -> int:
    """Positions that speech takes when it is transcribed, the transcript not counted."""
    if tokenizer.text.interleaved:
        lead, script = stretches_of(tokenizer, codes)
        return len(lead) + len(script.ids)
    return len(tokenizer.speech_ids("asr", codes)) + 3


def hear(lm: SpeechLM, first: Sequence[Int[np.ndarray, " _"]]) -> list[Transcript]:
    """Transcripts of codes of codebook 1, each (T,), the likeliest token always taken."""
    lm.check_task("asr")
    if not first:
        return []
    tokenizer = lm.tokenizer
    requests = []
    for codes in first:
        script = NO_FORCED_TOKENS
        if tokenizer.text.interleaved:
            context, script = stretches_of(tokenizer, codes)
        else:
            context = asr_context(tokenizer.vocabulary, tokenizer.speech_ids("asr", codes))
        most = text_bound(len(codes), tokenizer)
        whole = [*context, *script.ids]
        most = restrict_context(lm.max_positions, whole, 1, most, "recording")
        requests.append(
            Request(context=context, min_tokens=0, max_tokens=most, seed=0, script=script)
        )
    made = generate(lm, requests, text_only(lm), ONCE)
    failed = [one.failure for one in made if one.failure is not None]
    if failed:
        logger.warning("%d of %d transcripts failed: %s", len(failed), len(made), ", ".join(failed))
    return [Transcript(tokenizer.text_of(one.tokens).strip(), one.failure) for one in made]


def audible(
    blocks: Iterable[Float[np.ndarray, " _"]], longest: int
) -> Iterator[Float[np.ndarray, " _"]]:
    """Pieces of at most `longest` samples of a recording that comes in blocks; silent ones are left
    out, since a model makes words of them."""
    for piece in split_at_quiet(blocks, longest):
        if float(np.abs(piece).max(initial=0.0)) >= SILENCE_RMS:
            yield piece


def hear_pieces(
    codec: Any,
    pieces: Iterable[Float[np.ndarray, " _"]],
    transcripts: Callable[[Sequence[np.ndarray]], Sequence[Transcript]],
    batch: int = 8,
) -> Iterator[Transcript]:
    """What each piece says, `batch` at a time; `transcripts` gives it from codebook 1."""
    waiting = iter(pieces)
    while part := list(islice(waiting, batch)):
        yield from transcripts([codes[0] for codes in encode(codec, part)])


def as_one(parts: Iterable[Transcript]) -> Transcript:
    """The transcript of a recording from those of its pieces; the first failure is the whole's."""
    parts = list(parts)
    failures = [part.failure for part in parts if part.failure is not None]
    text = " ".join(part.text for part in parts if part.text)
    return Transcript(text, failures[0] if failures else None)
