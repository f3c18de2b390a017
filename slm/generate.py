"""KV-cached batched sampling, with a seed, bounds and a failure's name for every item.

Each item draws from its own generator: a batch gives what single items give under the same seeds.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from slm.ar import SpeechLM
from slm.config import SamplingConfig

logger = logging.getLogger(__name__)

Failure = Literal["empty", "loop", "cut"]
BOUNDS_FRAME_RATE = 25.0
"""Frame rate for which `SamplingConfig.frames_per_token` counts."""
CHECK_EVERY = 16
"""Tokens between two looks for a loop."""
MIN_TEXT_LOOP = 24
"""Tokens of a transcript that must repeat themselves to be a loop."""
TEXT_TOKENS_PER_SECOND = 20.0
"""No one speaks faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to go on with."""

    context: Sequence[int]
    """Vocabulary ids (L,)."""
    min_tokens: int
    """The end token is not drawn before so many."""
    max_tokens: int
    """A sequence without its end by then is cut."""
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """What came of a request."""

    tokens: tuple[int, ...]
    """Vocabulary ids, the end token left out."""
    failure: Failure | None
    """What is wrong with it, after the last try."""
    tries: int
    seed: int
    """The seed of the try that is returned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowed:
    """Which ids may be drawn, and which pattern is a loop among them."""

    first: int
    stop: int
    """Ids first .. stop - 1."""
    end: int
    """The end token."""
    loop_tokens: int
    """Tokens that must repeat an earlier stretch to be a loop."""


def speech_only(lm: SpeechLM, config: SamplingConfig) -> Allowed:
    """For TTS: speech ids and <|/speech|>."""
    vocabulary = lm.vocabulary
    loop = max(8, round(config.loop_seconds * vocabulary.codec.frame_rate))
    return Allowed(
        first=vocabulary.first_speech,
        stop=vocabulary.size,
        end=vocabulary.speech_end,
        loop_tokens=loop,
    )


def text_only(lm: SpeechLM) -> Allowed:
    """For ASR: the tokenizer's ids and the end of a transcript."""
    vocabulary = lm.vocabulary
    return Allowed(first=0, stop=vocabulary.num_text, end=vocabulary.eos, loop_tokens=MIN_TEXT_LOOP)


def speech_bounds(
    num_text_tokens: int, frame_rate: float, config: SamplingConfig
) -> tuple[int, int]:
    """Least and most frames for a text, the prompt's text not counted."""
    per_token = frame_rate / BOUNDS_FRAME_RATE
    low, high = (num_text_tokens * bound * per_token for bound in config.frames_per_token)
    return int(low), int(high + config.spare_seconds * frame_rate) + 1


def text_bound(num_frames: int, frame_rate: float) -> int:
    """Most tokens of a transcript."""
    return int(num_frames / frame_rate * TEXT_TOKENS_PER_SECOND) + 8


def generate(
    lm: SpeechLM, requests: Sequence[Request], allowed: Allowed, config: SamplingConfig
) -> list[Generated]:
    """Goes on with every request, and again with what failed, under a new seed."""
    results: list[Generated | None] = [None] * len(requests)
    waiting = list(range(len(requests)))
    for attempt in range(config.tries):
        if not waiting:
            break
        seeds = {index: requests[index].seed + 7919 * attempt for index in waiting}
        # The likeliest token fails the same way twice: a retry samples.
        drawn = config if attempt == 0 else replace(config, greedy=False)
        batch = [replace(requests[index], seed=seeds[index]) for index in waiting]
        for index, (tokens, failure) in zip(
            waiting, _generate_once(lm, batch, allowed, drawn), strict=True
        ):
            results[index] = Generated(
                tokens=tuple(tokens), failure=failure, tries=attempt + 1, seed=seeds[index]
            )
        waiting = [
            i for i in waiting if (made := results[i]) is not None and made.failure is not None
        ]
        if waiting:
            logger.info("try %d of %d failed for %d items", attempt + 1, config.tries, len(waiting))
    return [made for made in results if made is not None]


class _Item:
    """One sequence in the making."""

    def __init__(self, index: int, request: Request):
        self.index = index
        self.request = request
        self.generator = torch.Generator().manual_seed(request.seed)
        self.tokens: list[int] = []
        self.failure: Failure | None = None

    def take(self, token: int, allowed: Allowed) -> bool:
        """Adds a token; whether the sequence is over."""
        if token == allowed.end:
            if not self.tokens:
                self.failure = "empty"
            elif is_loop(self.tokens, allowed.loop_tokens):
                self.failure = "loop"
            return True
        self.tokens.append(token)
        over = len(self.tokens) >= self.request.max_tokens
        if over or len(self.tokens) % CHECK_EVERY == 0:
            if is_loop(self.tokens, allowed.loop_tokens):
                self.failure = "loop"
            elif over:
                self.failure = "cut"
        return self.failure is not None


@torch.inference_mode()
def _generate_once(
    lm: SpeechLM, requests: Sequence[Request], allowed: Allowed, config: SamplingConfig
) -> list[tuple[list[int], Failure | None]]:
    from transformers import DynamicCache

    items = [_Item(index, request) for index, request in enumerate(requests)]
    active = items
    device = next(lm.parameters()).device
    tokens, mask = (part.to(device) for part in _left_padded([r.context for r in requests], lm))
    cache = DynamicCache()
    while active:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        # Where nothing is padded there is nothing to mask, and attention has a faster way.
        attention = None if bool(mask.all()) else mask
        logits = lm.lm(
            input_ids=tokens, attention_mask=attention, position_ids=positions,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        chosen = _choose(_restricted(logits, allowed), active, allowed, config)
        over = [item.take(token, allowed) for item, token in zip(active, chosen, strict=True)]
        stay = [row for row, done in enumerate(over) if not done]
        if len(stay) < len(active):
            active = [active[row] for row in stay]
            if not active:
                break
            rows = torch.tensor(stay, device=device)
            cache.batch_select_indices(rows)
            mask = mask[rows]
        tokens = torch.tensor([[chosen[row]] for row in stay], device=device)
        mask = torch.cat([mask, mask.new_ones(len(stay), 1)], dim=1)
    return [(item.tokens, item.failure) for item in items]


def _left_padded(contexts: Sequence[Sequence[int]], lm: SpeechLM) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) and which of them are real."""
    longest = max(len(context) for context in contexts)
    tokens = torch.full((len(contexts), longest), lm.vocabulary.eos)
    mask = torch.zeros_like(tokens)
    for row, context in enumerate(contexts):
        tokens[row, longest - len(context) :] = torch.tensor(context)
        mask[row, longest - len(context) :] = 1
    return tokens, mask


def _restricted(logits: Float[Tensor, "B V"], allowed: Allowed) -> Float[Tensor, "B N"]:
    """Logits of the allowed ids, the end token last."""
    ids = logits[:, allowed.first : allowed.stop].float().cpu().clone()
    if allowed.first <= allowed.end < allowed.stop:
        ids[:, allowed.end - allowed.first] = -torch.inf
    return torch.cat([ids, logits[:, allowed.end, None].float().cpu()], dim=1)


def _choose(
    logits: Float[Tensor, "B N"], items: Sequence[_Item], allowed: Allowed, config: SamplingConfig
) -> list[int]:
    """A vocabulary id for each item."""
    end = logits.shape[1] - 1
    early = [len(item.tokens) < item.request.min_tokens for item in items]
    logits[torch.tensor(early), end] = -torch.inf
    chosen = []
    for row, item in enumerate(items):
        recent = [token - allowed.first for token in item.tokens[-config.window :]]
        index = draw(logits[row], recent[: config.window], item.generator, config)
        chosen.append(allowed.end if index == end else index + allowed.first)
    return chosen


def draw(
    logits: Float[Tensor, " N"],
    recent: Sequence[int],
    generator: torch.Generator,
    config: SamplingConfig,
) -> int:
    """Repetition-aware sampling: from the nucleus; from the whole distribution when that repeats.

    Nothing is masked for having occurred, because speech does hold its units: a silent second is
    one unit over and over.
    """
    if config.greedy:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / config.temperature, dim=-1)
    highest, indices = probabilities.topk(min(config.top_k, len(probabilities)))
    # The token that crosses top_p still belongs to the nucleus.
    inside = highest.cumsum(0) - highest < config.top_p
    drawn = int(indices[torch.multinomial(highest * inside, 1, generator=generator)])
    if config.window and recent.count(drawn) >= max(1.0, config.threshold * config.window):
        drawn = int(torch.multinomial(probabilities, 1, generator=generator))
    return drawn


def is_loop(tokens: Sequence[int], loop_tokens: int) -> bool:
    """Whether the end of a sequence repeats one pattern for `loop_tokens` tokens or longer.

    A pattern must come three times, so periods up to half of `loop_tokens` count.
    """
    if len(tokens) < loop_tokens:
        return False
    tail = np.asarray(tokens)
    for period in range(1, loop_tokens // 2 + 1):
        length = max(loop_tokens, 3 * period)
        if len(tail) < length:
            continue
        stretch = tail[-length:]
        if np.array_equal(stretch[period:], stretch[:-period]):
            return True
    return False


def restrict_context(
    max_positions: int, context: Sequence[int], least: int, most: int, what: str
) -> int:
    """The upper bound that fits the model. Raises ValueError when not even the lower one does;
    `what` is too long then: the text, or the recording."""
    room = max_positions - len(context)
    if room < max(1, least):
        raise ValueError(
            f"the {what} is too long for the model: {len(context)} tokens come in and at least "
            f"{max(1, least)} go out, but it holds {max_positions}; split the {what}"
        )
    return min(most, room)


def first_codes(lm: SpeechLM, made: Generated) -> Any:
    """Codes of codebook 1 (T,) that a TTS request brought."""
    return lm.alphabet.codes_of(made.tokens)
