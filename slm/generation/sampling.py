"""Batched generation with a KV cache: logits processors, forced tokens, stopping criteria, retries.

Each sequence has its own random generator, on the CPU: a batch gives what single sequences give
under the same seeds, on every machine.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from codec.program import counted
from slm.config import SamplingConfig
from slm.data.sequences import NO_FORCED_TOKENS, ForcedTokens
from slm.generation.checks import Failure, is_loop
from slm.models.ar import SpeechLM
from slm.models.lm_head import IdRange, next_logits
from slm.tokenization.tokenizer import SpeechTextTokenizer

logger = logging.getLogger(__name__)

BOUNDS_FRAME_RATE = 25.0
"""Frame rate of `SamplingConfig.frames_per_token`."""
MIN_SPEECH_SECONDS = 0.3
"""Minimum length of any text's speech; a short word takes longer."""
CHECK_EVERY = 16
"""Sampled tokens between two checks for a loop."""
MIN_TEXT_LOOP = 24
"""Tokens of a transcript that must repeat themselves to be a loop."""
TEXT_TOKENS_PER_SECOND = 30.0
"""Upper bound of a speaking rate, in characters or longer tokens."""
BYTES_PER_CHARACTER = 3
"""Of most scripts, in UTF-8."""
NEXT_TRY, NEXT_CANDIDATE = 7919, 1_299_709
"""Seed increments of a retry and of a further candidate. Both are primes: no two seeds meet."""
UNLIMITED = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A generation request. Its bounds count tokens of text, or frames of speech, of which a token
    may stand for several."""

    context: Sequence[int]
    """Vocabulary ids (L,)."""
    min_tokens: int
    """The end token is not sampled before."""
    max_tokens: int
    """A sequence without an end token by then is cut."""
    seed: int
    forced: ForcedTokens = NO_FORCED_TOKENS
    """Inserted after the end tokens of segments; not sampled."""
    sampled: bool = False
    """Sampled even where the configuration is greedy, which would give the same again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """The result of a request."""

    tokens: tuple[int, ...]
    """Sampled vocabulary ids, without end tokens and forced tokens."""
    failure: Failure | None
    """Of the last attempt."""
    tries: int
    """Number of attempts."""
    seed: int
    """Of the last attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AllowedIds:
    """The ids that may be sampled, and the length of a loop among them."""

    first: int
    stop: int
    """Ids first .. stop - 1."""
    end: int
    """The end token."""
    loop_length: int
    """Tokens of text, or frames of speech, that must repeat an earlier pattern to be a loop."""
    speech: SpeechTextTokenizer | None = None
    """Decodes ids to codes, one id perhaps to several; None: the ids are text."""

    def num_frames(self) -> Int[Tensor, " N"]:
        """Frames of each id; 1 for text."""
        if self.speech is None:
            return torch.ones(self.stop - self.first, dtype=torch.long)
        return torch.from_numpy(self.speech.frames(range(self.first, self.stop))).long()


def speech_only(lm: SpeechLM, config: SamplingConfig) -> AllowedIds:
    """For TTS: speech ids and <|/speech|>."""
    vocabulary, ids = lm.vocabulary, lm.tokenizer.speech_range("tts")
    return AllowedIds(
        first=ids.start,
        stop=ids.stop,
        end=vocabulary.speech_end,
        loop_length=max(8, round(config.loop_seconds * vocabulary.codec.frame_rate)),
        speech=lm.tokenizer,
    )


def text_only(lm: SpeechLM) -> AllowedIds:
    """For ASR: ids of transcripts and their end token."""
    ids, end = lm.tokenizer.text_range("asr"), lm.vocabulary.eos
    return AllowedIds(first=ids.start, stop=ids.stop, end=end, loop_length=MIN_TEXT_LOOP)


def speech_bounds(
    num_text_tokens: int, frame_rate: float, config: SamplingConfig
) -> tuple[int, int]:
    """Minimum and maximum frames of a text, without the prompt's; at least MIN_SPEECH_SECONDS."""
    per_token = frame_rate / BOUNDS_FRAME_RATE
    low, high = (num_text_tokens * bound * per_token for bound in config.frames_per_token)
    least = max(int(low), math.ceil(MIN_SPEECH_SECONDS * frame_rate))
    return least, max(least, int(high + config.spare_seconds * frame_rate) + 1)


def text_bound(num_frames: int, tokenizer: SpeechTextTokenizer) -> int:
    """Maximum tokens of a transcript."""
    seconds = num_frames / tokenizer.vocabulary.codec.frame_rate
    size = BYTES_PER_CHARACTER if tokenizer.writes_bytes else 1
    return int(seconds * TEXT_TOKENS_PER_SECOND * size) + 8


def restrict_context(
    max_positions: int, context: Sequence[int], least: int, most: int, what: str, longest: int = 1
) -> int:
    """The maximum length, lowered to what the model's context leaves.

    Args:
        max_positions: context length of the model.
        context: prompt tokens.
        least: minimum length, in frames or text tokens.
        most: maximum length.
        what: "text" or "recording", for the error.
        longest: frames of the longest token.

    Raises:
        ValueError: where not even the minimum length is left.
    """
    room, needed = max_positions - len(context), -(-max(1, least) // longest)
    if room < needed:
        raise ValueError(
            f"the {what} is too long for the model: {len(context)} prompt tokens and at least "
            f"{needed} new tokens exceed its context length of {max_positions}; split the {what}"
        )
    return min(most, room * longest)


def restrict_speech(lm: SpeechLM, context: Sequence[int], least: int, most: int, what: str) -> int:
    """`restrict_context` for frames of speech."""
    longest = int(lm.tokenizer.frames(lm.tokenizer.speech_range("tts")).max())
    return restrict_context(lm.max_positions, context, least, most, what, longest)


def first_codes(lm: SpeechLM, generated: Generated) -> Int[np.ndarray, " T"]:
    """Codes of codebook 1 of a TTS request."""
    return lm.tokenizer.codes_of(generated.tokens)


def retry(request: Request, attempt: int, candidate: int = 0) -> Request:
    """The request with the seed of a later attempt or a further candidate; both 0: itself."""
    seed = request.seed + NEXT_TRY * attempt + NEXT_CANDIDATE * candidate
    return replace(request, seed=seed, sampled=request.sampled or attempt + candidate > 0)


def generate(
    lm: SpeechLM, requests: Sequence[Request], allowed: AllowedIds, config: SamplingConfig
) -> list[Generated]:
    """Generates all requests as one batch; retries those that failed, with other seeds."""
    results: list[Generated | None] = [None] * len(requests)
    waiting = list(range(len(requests)))
    for attempt in range(config.max_attempts):
        if not waiting:
            break
        tried = [retry(requests[index], attempt) for index in waiting]
        batch = Batch(lm, tried, allowed, config)
        while batch.step():
            pass
        failed = []
        for number, (index, request) in enumerate(zip(waiting, tried, strict=True)):
            failure = batch.failures[number]
            results[index] = Generated(
                tokens=tuple(batch.tokens(number)),
                failure=failure,
                tries=attempt + 1,
                seed=request.seed,
            )
            failed += [index] if failure is not None else []
        waiting = failed
        if waiting and config.max_attempts > 1:
            logger.info(
                "attempt %d of %d failed for %s",
                attempt + 1, config.max_attempts, counted(len(waiting), "item"),
            )  # fmt: skip
    return [result for result in results if result is not None]


class TokenStream(Iterator[int]):
    """The ids that `generate` gives in its first attempt, as they are sampled.

    A failure ends the stream and is not retried, since earlier ids have been used.
    """

    def __init__(self, lm: SpeechLM, request: Request, allowed: AllowedIds, config: SamplingConfig):
        self._batch = Batch(lm, [request], allowed, config)
        self._num_read = 0

    def __next__(self) -> int:
        while self._num_read == len(self._batch.tokens(0)):
            if not self._batch.step():
                raise StopIteration
        self._num_read += 1
        return self._batch.tokens(0)[self._num_read - 1]

    @property
    def failure(self) -> Failure | None:
        """None, empty, loop or cut; known after the last id."""
        return self._batch.failures.get(0)


@dataclass(slots=True)
class Sequences:
    """State of the running sequences of a batch, one row each, on the LM's device.

    The segments of a sequence are separated by forced tokens; without any it has one.
    """

    index: Int[Tensor, " B"]
    """Of the request."""
    min_frames: Int[Tensor, " B"]
    max_frames: Int[Tensor, " B"]
    max_tokens: Int[Tensor, " B"]
    greedy: Bool[Tensor, " B"]
    forced: Int[Tensor, "B F"]
    """Forced tokens of all segments."""
    forced_bounds: Int[Tensor, "B P"]
    """Bounds of the segments' forced tokens: those before segment p end at p."""
    last_segment: Int[Tensor, " B"]
    """Index of the last segment."""
    segment_min: Int[Tensor, " B"]
    """Minimum frames of a segment."""
    segment_max: Int[Tensor, "B P"]
    """Maximum frames of each segment."""
    sampled: Int[Tensor, "B M"]
    """Sampled ids, end tokens excluded."""
    num_tokens: Int[Tensor, " B"]
    num_frames: Int[Tensor, " B"]
    segment: Int[Tensor, " B"]
    """The current segment."""
    segment_frames: Int[Tensor, " B"]
    """Its frames so far."""
    num_truncated: Int[Tensor, " B"]
    """Segments that ended at their maximum, but for the last."""
    cursor: Int[Tensor, " B"]
    """Next forced token."""
    cursor_stop: Int[Tensor, " B"]
    """Forced tokens before this one are pending."""

    @classmethod
    def start(
        cls, requests: Sequence[Request], room: Sequence[int], greedy: bool, device: torch.device
    ) -> "Sequences":
        """Before the first token. `room`: maximum sampled tokens of each."""
        forced = [request.forced for request in requests]
        bounds = [[0, *accumulate(map(len, one.parts))] for one in forced]

        def filled(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        def padded(rows: Sequence[Sequence[int]]) -> Tensor:
            return right_padded(rows).to(device)

        zeros = filled([0] * len(requests))
        return cls(
            index=filled(range(len(requests))),
            min_frames=filled([request.min_tokens for request in requests]),
            max_frames=filled([request.max_tokens for request in requests]),
            max_tokens=filled(room),
            greedy=filled([greedy and not request.sampled for request in requests]).bool(),
            forced=padded([[token for part in one.parts for token in part] for one in forced]),
            forced_bounds=padded(bounds),
            last_segment=filled([len(one.parts) for one in forced]),
            segment_min=filled([one.least for one in forced]),
            segment_max=padded([s.most or (UNLIMITED,) * (len(s.parts) + 1) for s in forced]),
            sampled=zeros[:, None].repeat(1, max(0, *room)),
            num_tokens=zeros.clone(),
            num_frames=zeros.clone(),
            segment=zeros.clone(),
            segment_frames=zeros.clone(),
            num_truncated=zeros.clone(),
            cursor=zeros.clone(),
            cursor_stop=zeros.clone(),
        )

    def select(self, rows: Int[Tensor, " N"]) -> "Sequences":
        """These rows."""
        return Sequences(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def is_forced(self) -> Bool[Tensor, " B"]:
        """Whether the next token is a forced one."""
        return self.cursor < self.cursor_stop

    @property
    def at_segment_max(self) -> Bool[Tensor, " B"]:
        """Whether the current segment has its maximum frames."""
        return self.segment_frames >= _at(self.segment_max, self.segment)

    def tokens(self, row: int) -> list[int]:
        """Sampled ids of a row."""
        return self.sampled[row, : int(self.num_tokens[row])].tolist()

    def recent(self, count: int) -> Int[Tensor, "B W"]:
        """The last `count` sampled ids; -1 before the first."""
        places = self.num_tokens[:, None] + torch.arange(-count, 0, device=self.sampled.device)
        ids = self.sampled.gather(1, places.clamp(min=0)) if count else self.sampled[:, :0]
        return ids.masked_fill(places < 0, -1)

    def add(self, tokens: Int[Tensor, " B"], num_frames: Int[Tensor, " B"], new: Tensor) -> None:
        """Appends ids with their frames in the rows that `new` marks."""
        rows = new.nonzero()[:, 0]
        self.sampled[rows, self.num_tokens[rows]] = tokens[rows]
        self.num_tokens += new
        self.num_frames += num_frames * new
        self.segment_frames += num_frames * new

    def end_segment(self, ended: Bool[Tensor, " B"], truncated: Bool[Tensor, " B"]) -> None:
        """Queues the forced tokens after the segments that end."""
        self.num_truncated += ended & truncated
        self.cursor = torch.where(ended, _at(self.forced_bounds, self.segment), self.cursor)
        self.segment += ended
        self.cursor_stop = torch.where(
            ended, _at(self.forced_bounds, self.segment), self.cursor_stop
        )
        self.segment_frames = self.segment_frames.masked_fill(ended, 0)

    def pop_forced(self, count: int) -> Int[Tensor, "B {count}"]:
        """The next `count` forced tokens of every row."""
        places = self.cursor[:, None] + torch.arange(count, device=self.cursor.device)
        self.cursor += count
        return self.forced.gather(1, places)


def _at(table: Int[Tensor, "B P"], column: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    return table.gather(1, column.clamp(max=table.shape[1] - 1)[:, None])[:, 0]


class MinimumLength:
    """Logits processor: no end token before the minimum length of a sequence or a segment."""

    def __call__(
        self, logits: Float[Tensor, "B N"], sequences: Sequences
    ) -> Float[Tensor, "B N"]:  # fmt: skip
        last = sequences.segment == sequences.last_segment
        early = last & (sequences.num_frames < sequences.min_frames)
        early |= sequences.segment_frames < sequences.segment_min
        logits[:, -1] = logits[:, -1].masked_fill(early.to(logits.device), -torch.inf)
        return logits


class RepetitionAwareSampler:
    """Repetition-aware sampling (VALL-E 2, arXiv 2406.05370): from the nucleus; a token whose share
    of the last `repetition_window` tokens reaches `repetition_threshold` is resampled once from the
    full distribution.

    VALL-E 2 resamples where the share exceeds the threshold, CosyVoice where it reaches it, as
    here: with 0.1 of 10 tokens one occurrence is enough, in VALL-E 2 it takes two (0.11 does that).
    The same token may result, because speech does hold its units: a silent second is one unit
    repeated.
    """

    def __init__(self, config: SamplingConfig):
        self._config = config
        self._max_count = max(1.0, config.repetition_threshold * config.repetition_window)

    def __call__(
        self,
        logits: Float[Tensor, "B N"],
        recent: Int[Tensor, "B W"],
        generators: Sequence[torch.Generator],
        greedy: Bool[Tensor, " B"],
    ) -> Int[Tensor, " B"]:
        """Columns of the logits. `recent`: columns of the last tokens. All on the CPU."""
        columns = logits.argmax(-1)
        if bool(greedy.all()):
            return columns
        probabilities = torch.softmax(logits / self._config.temperature, dim=-1)
        highest, order = probabilities.topk(min(self._config.top_k, logits.shape[1]))
        # The token that crosses top_p still belongs to the nucleus.
        nucleus = highest * (highest.cumsum(-1) - highest < self._config.top_p)
        # Lists, because a tensor operation on one row costs more than its arithmetic.
        chosen, ordered, last = columns.tolist(), order.tolist(), recent.tolist()
        for row, is_greedy in enumerate(greedy.tolist()):
            if is_greedy:
                continue
            generator = generators[row]
            column = ordered[row][int(torch.multinomial(nucleus[row], 1, generator=generator))]
            if last[row].count(column) >= self._max_count:
                column = int(torch.multinomial(probabilities[row], 1, generator=generator))
            chosen[row] = column
        return torch.tensor(chosen)


class StoppingCriteria:
    """End token, maximum length and loop."""

    def __init__(self, allowed: AllowedIds, config: SamplingConfig):
        self._allowed, self._check_loops = allowed, "loop" in config.checks

    def __call__(
        self, sequences: Sequences, ended: Bool[Tensor, " B"], new: Bool[Tensor, " B"]
    ) -> dict[int, Failure | None]:
        """Finished rows, each with its failure; None: complete.

        Args:
            sequences: the state with the newest token.
            ended: rows whose last segment has ended.
            new: rows that have a new sampled token.
        """
        full = sequences.num_tokens >= sequences.max_tokens
        full = new & (full | (sequences.num_frames >= sequences.max_frames))
        checked = ended | full | (new & (sequences.num_tokens % CHECK_EVERY == 0))
        truncated = sequences.at_segment_max | (sequences.num_truncated > 1)
        finished: dict[int, Failure | None] = {}
        for row in checked.nonzero()[:, 0].tolist():
            tokens = sequences.tokens(row)
            if ended[row] and not tokens:
                finished[row] = "empty"
            elif ended[row] and truncated[row]:
                finished[row] = "cut"
            elif self._loops(tokens):
                finished[row] = "loop"
            elif ended[row] or full[row]:
                finished[row] = None if ended[row] else "cut"
        return finished

    def _loops(self, tokens: Sequence[int]) -> bool:
        speech = self._allowed.speech
        units = tokens if speech is None else speech.codes_of(tokens)
        return self._check_loops and is_loop(units, self._allowed.loop_length)


class Batch:
    """Sequences that are generated together, and their KV cache. Finished ones leave it."""

    def __init__(
        self,
        lm: SpeechLM,
        requests: Sequence[Request],
        allowed: AllowedIds,
        config: SamplingConfig,
    ):
        from transformers import DynamicCache

        self.failures: dict[int, Failure | None] = {}
        """Of finished sequences, by request; None: complete."""
        self._results: dict[int, list[int]] = {}
        self._lm, self._allowed = lm.lm, allowed
        self._ids = IdRange(allowed.first, allowed.stop, allowed.end)
        self._minimum_length = MinimumLength()
        self._sampler = RepetitionAwareSampler(config)
        self._stopping_criteria = StoppingCriteria(allowed, config)
        self._window = config.repetition_window
        self._generators = [torch.Generator().manual_seed(one.seed) for one in requests]
        device = next(lm.parameters()).device
        self._frames = allowed.num_frames().to(device)
        # However many frames a token stands for, the model holds no more tokens.
        room = [
            min(one.max_tokens, lm.max_positions - len(one.context) - len(one.forced.ids))
            for one in requests
        ]
        self._state = Sequences.start(requests, room, config.greedy, device)
        padded = left_padded([one.context for one in requests], lm.vocabulary.eos)
        self._tokens, self._mask = (part.to(device) for part in padded)
        self._cache = DynamicCache(config=lm.config)

    def tokens(self, index: int) -> list[int]:
        """Sampled ids of a request so far, end tokens excluded."""
        if index in self._results:
            return self._results[index]
        (row,) = (self._state.index == index).nonzero()[:, 0].tolist()
        return self._state.tokens(row)

    @torch.inference_mode()
    def step(self) -> bool:
        """Adds a token to every running sequence; False: there is none."""
        if not len(self._state):
            return False
        state, end = self._state, self._allowed.end
        forced, truncated = state.is_forced, state.at_segment_max
        tokens = self._next_tokens()
        ended = ~forced & (tokens == end)
        new = ~forced & ~ended
        is_last = state.segment == state.last_segment
        frames = self._frames[(tokens - self._allowed.first).clamp(0, len(self._frames) - 1)]
        state.add(tokens, frames, new)
        finished = self._stopping_criteria(state, ended & is_last, new)
        state.end_segment(ended & ~is_last, truncated)
        for row, failure in finished.items():
            index = int(state.index[row])
            self.failures[index], self._results[index] = failure, state.tokens(row)
        running = [row for row in range(len(state)) if row not in finished]
        self._keep(torch.tensor(running, dtype=torch.long, device=tokens.device), tokens)
        return True

    def _next_tokens(self) -> Int[Tensor, " B"]:
        """The next token of each sequence: a forced one, an end token at a segment's maximum, or a
        sampled one."""
        state, allowed = self._state, self._allowed
        tokens = torch.full_like(state.index, allowed.end)
        pending = state.is_forced.nonzero()[:, 0]
        tokens[pending] = state.forced[pending, state.cursor[pending]]
        state.cursor[pending] += 1
        logits = self._next_logits()
        rows = torch.ones_like(tokens, dtype=torch.bool)
        rows[pending] = False
        rows = (rows & ~state.at_segment_max).nonzero()[:, 0]
        if len(rows):
            everything = len(rows) == len(state)
            running = state if everything else state.select(rows)
            columns = self._sampler(
                self._minimum_length(logits if everything else logits[rows.cpu()], running),
                running.recent(self._window).cpu() - allowed.first,
                [self._generators[index] for index in running.index.tolist()],
                running.greedy.cpu(),
            ).to(tokens.device)
            is_end = columns == logits.shape[1] - 1
            tokens[rows] = torch.where(is_end, allowed.end, columns + allowed.first)
        return tokens

    def _next_logits(self) -> Float[Tensor, "B N"]:
        """Logits of the allowed ids on the CPU; the last column is the end token's."""
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -self._tokens.shape[1] :]
        # Without padding no mask is needed, and attention has a faster kernel.
        mask = None if bool(self._mask.all()) else self._mask
        logits = next_logits(
            self._lm, self._ids, self._cache, input_ids=self._tokens, attention_mask=mask,
            position_ids=positions, use_cache=True,
        ).float().cpu()  # fmt: skip
        if len(self._ids.spans) > 1:
            return logits
        column = self._allowed.end - self._allowed.first
        last = logits[:, column, None].clone()
        logits[:, column] = -torch.inf
        return torch.cat([logits, last], dim=1)

    def _keep(self, rows: Int[Tensor, " N"], tokens: Int[Tensor, " B"]) -> None:
        """Only these sequences stay, and read their newest token; forced tokens that all of them
        have pending are read in the same pass."""
        if 0 < len(rows) < len(tokens):
            self._cache.batch_select_indices(rows)
            self._mask = self._mask[rows]
        if len(rows) < len(tokens):
            self._state = self._state.select(rows)
        if not len(rows):
            return
        ahead = int((self._state.cursor_stop - self._state.cursor).min())
        self._tokens = torch.cat([tokens[rows, None], self._state.pop_forced(ahead)], dim=1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1 + ahead)], dim=1)


def left_padded(contexts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, L), and a mask of those that are no padding."""
    flipped = [list(context)[::-1] for context in contexts]
    mask = right_padded([[1] * len(context) for context in contexts]).flip(1)
    return right_padded(flipped, padding).flip(1), mask


def right_padded(rows: Sequence[Sequence[int]], padding: int = 0) -> Int[Tensor, "B L"]:
    """Rows of any length as one tensor."""
    longest = max((len(row) for row in rows), default=0)
    table = torch.full((len(rows), longest), padding)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row, dtype=torch.long)
    return table
