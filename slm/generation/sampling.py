"""KV-cached batched sampling, with a seed, bounds and a failure's name for every item.

Each item draws from its own generator: a batch gives what single items give under the same seeds.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from slm.config import SamplingConfig
from slm.data.sequences import NO_FORCED_TOKENS, ForcedTokens
from slm.generation.checks import Failure, is_loop
from slm.models.ar import SpeechLM
from slm.models.lm_head import Rows, next_logits
from slm.tokenization.tokenizer import SpeechTextTokenizer

logger = logging.getLogger(__name__)


BOUNDS_FRAME_RATE = 25.0
"""Frame rate for which `SamplingConfig.frames_per_token` counts."""
CHECK_EVERY = 16
"""Tokens between two looks for a loop."""
MIN_TEXT_LOOP = 24
"""Tokens of a transcript that must repeat themselves to be a loop."""
TEXT_TOKENS_PER_SECOND = 30.0
"""No one speaks faster, in characters or longer tokens."""
BYTES_PER_CHARACTER = 3
"""Of most scripts, in UTF-8."""
NEXT_TRY, NEXT_CANDIDATE = 7919, 1_299_709
"""What a seed grows by. Both are primes, so that neither meets the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to go on with. Its bounds are tokens of a text, but frames of speech, where a
    token may stand for several."""

    context: Sequence[int]
    """Vocabulary ids (L,)."""
    min_tokens: int
    """The end token is not drawn before so many."""
    max_tokens: int
    """A sequence without its end by then is cut."""
    seed: int
    script: ForcedTokens = NO_FORCED_TOKENS
    """What is given, not drawn."""
    sampled: bool = False
    """Drawn even where the configuration is greedy: the likeliest token would be the same again."""


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
    """Tokens of a text, or frames of speech, that must repeat an earlier stretch to be a loop."""
    speech: SpeechTextTokenizer | None = None
    """Whose codes the ids stand for, one id perhaps for several frames; None: they are text."""


def speech_only(lm: SpeechLM, config: SamplingConfig) -> Allowed:
    """For TTS: speech ids and <|/speech|>."""
    vocabulary = lm.vocabulary
    loop = max(8, round(config.loop_seconds * vocabulary.codec.frame_rate))
    ids = lm.tokenizer.speech_range("tts")
    return Allowed(
        first=ids.start,
        stop=ids.stop,
        end=vocabulary.speech_end,
        loop_tokens=loop,
        speech=lm.tokenizer,
    )


def text_only(lm: SpeechLM) -> Allowed:
    """For ASR: what transcripts are made of, and their end."""
    ids, end = lm.tokenizer.text_range("asr"), lm.vocabulary.eos
    return Allowed(first=ids.start, stop=ids.stop, end=end, loop_tokens=MIN_TEXT_LOOP)


def speech_bounds(
    num_text_tokens: int, frame_rate: float, config: SamplingConfig
) -> tuple[int, int]:
    """Least and most frames for a text, the prompt's text not counted."""
    per_token = frame_rate / BOUNDS_FRAME_RATE
    low, high = (num_text_tokens * bound * per_token for bound in config.frames_per_token)
    return int(low), int(high + config.spare_seconds * frame_rate) + 1


def text_bound(num_frames: int, tokenizer: SpeechTextTokenizer) -> int:
    """Most tokens of a transcript."""
    seconds = num_frames / tokenizer.vocabulary.codec.frame_rate
    size = BYTES_PER_CHARACTER if tokenizer.writes_bytes else 1
    return int(seconds * TEXT_TOKENS_PER_SECOND * size) + 8


def restrict_context(
    max_positions: int, context: Sequence[int], least: int, most: int, what: str, longest: int = 1
) -> int:
    """The upper bound that fits the model, whose tokens stand for `longest` frames at most. Raises
    ValueError when not even the lower one does; `what` is too long then: the text, or the
    recording."""
    room, needed = max_positions - len(context), -(-max(1, least) // longest)
    if room < needed:
        raise ValueError(
            f"the {what} is too long for the model: {len(context)} tokens come in and at least "
            f"{needed} go out, but it holds {max_positions}; split the {what}"
        )
    return min(most, room * longest)


def restrict_speech(lm: SpeechLM, context: Sequence[int], least: int, most: int, what: str) -> int:
    """The same for frames of speech: a token may stand for several."""
    longest = int(lm.tokenizer.frames(lm.tokenizer.speech_range("tts")).max())
    return restrict_context(lm.max_positions, context, least, most, what, longest)


def first_codes(lm: SpeechLM, made: Generated) -> Any:
    """Codes of codebook 1 (T,) that a TTS request brought."""
    return lm.tokenizer.codes_of(made.tokens)


def again(request: Request, attempt: int, candidate: int = 0) -> Request:
    """The same under the seed of a later try or of a further candidate; both 0: itself."""
    seed = request.seed + NEXT_TRY * attempt + NEXT_CANDIDATE * candidate
    return replace(request, seed=seed, sampled=request.sampled or attempt + candidate > 0)


def generate(
    lm: SpeechLM, requests: Sequence[Request], allowed: Allowed, config: SamplingConfig
) -> list[Generated]:
    """Goes on with every request, and again with what failed, under a new seed."""
    results: list[Generated | None] = [None] * len(requests)
    waiting = list(range(len(requests)))
    for attempt in range(config.max_attempts):
        if not waiting:
            break
        items = [_Item(lm, again(requests[i], attempt), allowed, config) for i in waiting]
        batch = _Batch(lm, items, allowed, config)
        while batch.step():
            pass
        for index, item in zip(waiting, items, strict=True):
            results[index] = Generated(
                tokens=tuple(item.tokens),
                failure=item.failure,
                tries=attempt + 1,
                seed=item.request.seed,
            )
        waiting = [i for i, item in zip(waiting, items, strict=True) if item.failure is not None]
        if waiting and config.max_attempts > 1:
            logger.info(
                "try %d of %d failed for %d items", attempt + 1, config.max_attempts, len(waiting)
            )
    return [made for made in results if made is not None]


class TokenStream(Iterator[int]):
    """Ids as they are drawn. Once it has ended, `failure` names what is wrong with the whole."""

    def __init__(self, lm: SpeechLM, request: Request, allowed: Allowed, config: SamplingConfig):
        self._item = _Item(lm, request, allowed, config)
        self._batch = _Batch(lm, [self._item], allowed, config)
        self._num_told = 0

    def __next__(self) -> int:
        while self._num_told == len(self._item.tokens) and self._batch.step():
            pass
        if self._num_told == len(self._item.tokens):
            raise StopIteration
        self._num_told += 1
        return self._item.tokens[self._num_told - 1]

    @property
    def failure(self) -> Failure | None:
        """None, empty, loop or cut; before the end of the stream it is not yet known."""
        return self._item.failure


def stream_tokens(
    lm: SpeechLM, request: Request, allowed: Allowed, config: SamplingConfig
) -> TokenStream:
    """What `generate` gives under the same seed in one try, id by id, the end token left out.

    Nothing is raised when it fails and nothing is tried again, since what was told cannot be taken
    back: a loop or a cut ends the stream, and its `failure` says so.
    """
    return TokenStream(lm, request, allowed, config)


class _Item:
    """One sequence in the making."""

    def __init__(self, lm: SpeechLM, request: Request, allowed: Allowed, config: SamplingConfig):
        self.request, self.allowed = request, allowed
        room = lm.max_positions - len(request.context) - len(request.script.ids)
        self.most_tokens = min(request.max_tokens, room)
        """However many frames a token stands for, the model holds no more."""
        self._part, self._since, self._ended = 0, 0, 0
        """The part of the script, its length so far, and how many parts were ended by force."""
        self.given: list[int] = []
        """What the script has next."""
        self.config = replace(config, greedy=config.greedy and not request.sampled)
        self.generator = torch.Generator().manual_seed(request.seed)
        self.tokens: list[int] = []
        self.length = 0
        """Frames of speech, tokens of text."""
        self.failure: Failure | None = None

    def give(self, count: int) -> list[int]:
        """The next so many of what is given, which need not be chosen then."""
        given, self.given = self.given[:count], self.given[count:]
        return given

    def take(self, token: int) -> bool:
        """Adds a token; whether the sequence is over."""
        if self.given:
            self.given.pop(0)
            return False
        parts = self.request.script.parts
        if token == self.allowed.end and self._part < len(parts):
            self._ended += self._too_long
            self.given = list(parts[self._part])
            self._part, self._since = self._part + 1, 0
            return False
        if token == self.allowed.end:
            if not self.tokens:
                self.failure = "empty"
            elif self._ended > 1 or self._too_long:
                self.failure = "cut"
            elif self._loops():
                self.failure = "loop"
            return True
        self.tokens.append(token)
        speech = self.allowed.speech
        frames = 1 if speech is None else int(speech.frames([token])[0])
        self.length, self._since = self.length + frames, self._since + frames
        most = self.request.max_tokens
        over = self.length >= most or len(self.tokens) >= self.most_tokens
        if over or len(self.tokens) % CHECK_EVERY == 0:
            if self._loops():
                self.failure = "loop"
            elif over:
                self.failure = "cut"
        return self.failure is not None

    def choose(self, logits: Float[Tensor, " N"]) -> int:
        """A vocabulary id from the logits of the allowed ids, the end token's last."""
        if self.given:
            return self.given[0]
        end, first = len(logits) - 1, self.allowed.first
        parts = self.request.script.parts
        if self._too_long:
            return self.allowed.end
        early = self._part == len(parts) and self.length < self.request.min_tokens
        if early or self._since < self.request.script.least:
            logits[end] = -torch.inf
        window = self.config.repetition_window
        recent = [token - first for token in self.tokens[-window:]][:window]
        index = draw(logits, recent, self.generator, self.config)
        return self.allowed.end if index == end else index + first

    @property
    def _too_long(self) -> bool:
        """Whether the part of the script is as long as it may be."""
        most = self.request.script.most
        return bool(most) and self._since >= most[self._part]

    def _loops(self) -> bool:
        if "loop" not in self.config.checks:
            return False
        speech = self.allowed.speech
        units = self.tokens if speech is None else speech.codes_of(self.tokens)
        return is_loop(units, self.allowed.loop_tokens)


class _Batch:
    """Items in the making, and what the LLM remembers of them."""

    def __init__(
        self, lm: SpeechLM, items: Sequence[_Item], allowed: Allowed, config: SamplingConfig
    ):
        from transformers import DynamicCache

        self.lm, self.allowed = lm, allowed
        self.active = list(items)
        if not items:
            return
        self.device = next(lm.parameters()).device
        contexts = [item.request.context for item in items]
        padded = left_padded(contexts, lm.vocabulary.eos)
        self.tokens, self.mask = (part.to(self.device) for part in padded)
        self.cache = DynamicCache(config=lm.config)

    @torch.inference_mode()
    def step(self) -> bool:
        """Adds a token to every item that is not over; whether there was any."""
        if not self.active:
            return False
        logits = _end_last(self._logits(), self.allowed)
        chosen = [item.choose(row) for item, row in zip(self.active, logits, strict=True)]
        over = [item.take(token) for item, token in zip(self.active, chosen, strict=True)]
        stay = [row for row, done in enumerate(over) if not done]
        if 0 < len(stay) < len(over):
            rows = torch.tensor(stay, device=self.device)
            self.cache.batch_select_indices(rows)
            self.mask = self.mask[rows]
        self.active = [self.active[row] for row in stay]
        # What every item is given anyway is read in one pass.
        ahead = min((len(item.given) for item in self.active), default=0)
        rows = [
            [chosen[row], *item.give(ahead)] for row, item in zip(stay, self.active, strict=True)
        ]
        self.tokens = torch.tensor(rows, device=self.device)
        if stay:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(stay), 1 + ahead)], dim=1)
        return True

    def _logits(self) -> Float[Tensor, "B _"]:
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.tokens.shape[1] :]
        # Where nothing is padded there is nothing to mask, and attention has a faster way.
        attention = None if bool(self.mask.all()) else self.mask
        rows = Rows(self.allowed.first, self.allowed.stop, self.allowed.end)
        return next_logits(
            self.lm.lm, rows, input_ids=self.tokens, attention_mask=attention,
            position_ids=positions, past_key_values=self.cache, use_cache=True,
        )  # fmt: skip


def left_padded(contexts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) and which of them are real."""
    longest = max(len(context) for context in contexts)
    tokens = torch.full((len(contexts), longest), padding)
    mask = torch.zeros_like(tokens)
    for row, context in enumerate(contexts):
        tokens[row, longest - len(context) :] = torch.tensor(context)
        mask[row, longest - len(context) :] = 1
    return tokens, mask


def _end_last(logits: Float[Tensor, "B _"], allowed: Allowed) -> Float[Tensor, "B _"]:
    """Logits of the allowed ids (slm/models/lm_head.py), on the CPU; the end token's last, and
    only there."""
    logits = logits.float().cpu()
    if not allowed.first <= allowed.end < allowed.stop:
        return logits
    ids, end = logits.clone(), allowed.end - allowed.first
    ids[:, end] = -torch.inf
    return torch.cat([ids, logits[:, end, None]], dim=1)


def draw(
    logits: Float[Tensor, " N"],
    recent: Sequence[int],
    generator: torch.Generator,
    config: SamplingConfig,
) -> int:
    """Repetition-aware sampling (VALL-E 2): from the nucleus; where the drawn token's share of the
    last `window` tokens reaches `threshold`, once more from the whole distribution.

    VALL-E 2 draws again where the share exceeds the threshold, CosyVoice where it reaches it, as
    here: with 0.1 of 10 tokens one occurrence is enough, in VALL-E 2 it takes two (0.11 does that).
    The token may be drawn again, because speech does hold its units: a silent second is one unit
    over and over.
    """
    if config.greedy:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / config.temperature, dim=-1)
    highest, indices = probabilities.topk(min(config.top_k, len(probabilities)))
    # The token that crosses top_p still belongs to the nucleus.
    inside = highest.cumsum(0) - highest < config.top_p
    drawn = int(indices[torch.multinomial(highest * inside, 1, generator=generator)])
    if config.repetition_window and recent.count(drawn) >= max(
        1.0, config.repetition_threshold * config.repetition_window
    ):
        drawn = int(torch.multinomial(probabilities, 1, generator=generator))
    return drawn
