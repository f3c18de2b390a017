"""Token shards to length-bucketed batches under a budget of positions.

Which items stand in which batch is a pure function of (seed, step, rank, world), so a run resumes
without any sampler state, and one rank that accumulates two batches sees what two ranks see.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from codec.tokens import TokenShard
from slm.config import BatchConfig, NARConfig, TaskConfig
from slm.prompts import TASKS, has_words, layout, layout_length
from slm.vocab import Vocabulary, encode_texts

logger = logging.getLogger(__name__)

IGNORE = -100
BUCKET_GROWTH = 1.04
"""Lengths within one bucket differ by at most this factor: the price of shuffling, in padding."""
NUM_LISTED = 20
"""Most skipped items that the log names."""


class ARBatch(NamedTuple):
    """Sequences padded on the right: what is causal never sees the padding."""

    tokens: Int[Tensor, "B L"]
    labels: Int[Tensor, "B L"]
    """The next token where it is a target, else IGNORE."""
    tasks: Int[Tensor, " B"]
    """Indices into TASKS."""


class NARBatch(NamedTuple):
    """Utterances padded on the right."""

    text: Int[Tensor, "B N"]
    text_mask: Bool[Tensor, "B N"]
    codes: Int[Tensor, "B Q T"]
    lengths: Int[Tensor, " B"]
    """Frames, the prompt included."""
    prompt_lengths: Int[Tensor, " B"]
    """Frames whose every codebook is given."""
    stages: Int[Tensor, " S"]
    """Codebooks to predict, counted from 0."""


class Share(NamedTuple):
    """What one rank does in one micro-step."""

    batch: Any
    num_targets: float
    """Targets of the whole step, over ranks and micro-steps, divided by their number: the divisor
    that makes the step's gradient the mean over its targets."""
    weight: float
    """0 for a batch that only fills up the last step of an evaluation."""


@runtime_checkable
class Data(Protocol):
    """What the training loop needs to know of data."""

    padding_share: float

    def share(self, step: int, micro: int, rank: int, world: int, accumulate: int) -> Share: ...

    def num_steps(self, world: int, accumulate: int) -> int: ...


class Plan:
    """Batches of like lengths; their number and sizes are the same in every epoch."""

    def __init__(self, lengths: np.ndarray, config: BatchConfig, seed: int):
        self._seed = seed
        self._bucket = np.ceil(np.log(np.maximum(lengths, 1)) / np.log(BUCKET_GROWTH)).astype(int)
        order = np.lexsort((lengths, self._bucket))
        self._starts = _cut(lengths, self._bucket, order, config)
        self._cache: tuple[int, list[np.ndarray]] | None = None

    def __len__(self) -> int:
        return len(self._starts) - 1

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch as item indices: items shuffled in their bucket, then batches."""
        if self._cache is None or self._cache[0] != epoch:
            random = np.random.default_rng((self._seed, epoch))
            order = np.lexsort((random.random(len(self._bucket)), self._bucket))
            batches = np.split(order, self._starts[1:-1])
            self._cache = (epoch, [batches[i] for i in random.permutation(len(batches))])
        return self._cache[1]

    def group(self, step: int, size: int) -> tuple[int, list[np.ndarray]]:
        """The epoch of a step and its `size` batches; the epoch's last group begins again."""
        epoch, index = divmod(step, self.num_groups(size))
        batches = self.epoch(epoch)
        return epoch, [batches[(index * size + i) % len(batches)] for i in range(size)]

    def num_groups(self, size: int) -> int:
        return -(-len(self) // size)


def _cut(
    lengths: np.ndarray, bucket: np.ndarray, order: np.ndarray, config: BatchConfig
) -> np.ndarray:
    """Starts of the batches in the sorted order, and its end.

    The budget counts every item as its bucket's longest, so that any shuffle within buckets fits.
    """
    longest = np.zeros(bucket.max(initial=0) + 1, dtype=np.int64)
    np.maximum.at(longest, bucket, lengths)
    starts = [0]
    for position, item in enumerate(order):
        count = position - starts[-1] + 1
        # Sorted by bucket, the newest item is the longest.
        if count > 1 and (
            count > config.max_items or count * longest[bucket[item]] > config.positions
        ):
            starts.append(position)
    return np.array([*starts, len(order)])


@dataclass(frozen=True, slots=True)
class Corpus:
    """Usable utterances of a shard: those with something to say, and not too long."""

    shard: TokenShard
    items: np.ndarray
    """Their rows in the shard, (N,)."""
    texts: list[Sequence[int]]
    """Their text ids."""
    num_frames: np.ndarray
    num_text: np.ndarray

    def codes(self, item: int | np.integer) -> np.ndarray:
        """(Q, T) int64."""
        return self.shard[int(self.items[item])].codes.astype(np.int64)


def usable(
    shard: TokenShard, texts: list[Sequence[int]], longest: int, limit: int | None = None
) -> Corpus:
    """Drops what cannot be trained on; counts and lists it in the log.

    `texts` are the text ids of every row, `longest` is the most positions that an item may take,
    `limit` keeps the first usable items only.
    """
    name = _name(shard)
    lengths = layout_length(np.array([len(text) for text in texts]), shard.num_frames)
    empty = np.array([not has_words(text) for text in shard.texts], dtype=bool)
    reasons = {
        "without words": empty,
        "without frames": ~empty & (shard.num_frames == 0),
        f"longer than {longest} positions": ~empty & (lengths > longest),
    }
    keep = np.ones(len(shard), dtype=bool)
    for reason, mask in reasons.items():
        keep &= ~mask
        if mask.any():
            ids = [shard.ids[i] for i in np.flatnonzero(mask)]
            tail = " ..." if len(ids) > NUM_LISTED else ""
            logger.warning(
                "%s: skipped %d items %s: %s%s",
                name, len(ids), reason, ", ".join(ids[:NUM_LISTED]), tail,
            )  # fmt: skip
    items = np.flatnonzero(keep)[:limit]
    if not items.size:
        raise ValueError(
            f"{name}: no item is usable; raise batch.positions, or export other tokens"
        )
    kept = [texts[i] for i in items]
    num_text = np.array([len(text) for text in kept], dtype=np.int64)
    return Corpus(shard, items, kept, shard.num_frames[items], num_text)


def _name(shard: TokenShard) -> str:
    """For messages: its file, or the folder of its files."""
    return str(shard.files[0] if len(shard.files) == 1 else shard.files[0].parent)


class ARData:
    """Batches for the AR: every epoch draws the task of every item anew."""

    def __init__(
        self,
        corpus: Corpus,
        vocabulary: Vocabulary,
        tasks: TaskConfig,
        batch: BatchConfig,
        seed: int,
    ):
        vocabulary.check_codec(corpus.shard.stamp, _name(corpus.shard))
        self.corpus, self.vocabulary, self._seed = corpus, vocabulary, seed
        self._weights = np.array([getattr(tasks, name) for name in TASKS], dtype=float)
        self._weights /= self._weights.sum()
        self._lengths = layout_length(corpus.num_text, corpus.num_frames)
        self._plan = Plan(self._lengths, batch, seed)
        self.padding_share = _padding(self._lengths, self._plan)
        self._tasks: tuple[int, np.ndarray] | None = None

    @classmethod
    def open(
        cls, shard: TokenShard, tokenizer: Any, vocabulary: Vocabulary, tasks: TaskConfig,
        batch: BatchConfig, seed: int, *, longest: int, limit: int | None = None,
    ) -> "ARData":  # fmt: skip
        texts = encode_texts(tokenizer, shard.texts)
        corpus = usable(shard, [*texts], min(longest, batch.positions), limit)
        return cls(corpus, vocabulary, tasks, batch, seed)

    def num_steps(self, world: int, accumulate: int) -> int:
        return self._plan.num_groups(world * accumulate)

    def share(self, step: int, micro: int, rank: int, world: int, accumulate: int) -> Share:
        size, slot = world * accumulate, micro * world + rank
        epoch, group = self._plan.group(step, size)
        tasks = self._epoch_tasks(epoch)
        num_text, num_frames = self.corpus.num_text, self.corpus.num_frames
        targets = sum(
            int(np.where(tasks[items] == 0, num_frames[items], num_text[items]).sum() + len(items))
            for items in group
        )
        fill = step % self._plan.num_groups(size) * size + slot >= len(self._plan)
        return Share(self.collate(group[slot], tasks), targets / size, 0.0 if fill else 1.0)

    def collate(self, items: np.ndarray, tasks: np.ndarray) -> ARBatch:
        layouts = [
            layout(
                int(tasks[item]),
                self.vocabulary,
                self.corpus.texts[item],
                self.corpus.codes(item)[0],
            )
            for item in items
        ]
        longest = max(len(one.tokens) for one in layouts)
        # The padding is any valid id: causal attention keeps it from the tokens before it.
        tokens = np.full((len(items), longest), self.vocabulary.eos, dtype=np.int64)
        labels = np.full((len(items), longest), IGNORE, dtype=np.int64)
        for row, one in enumerate(layouts):
            length = len(one.tokens)
            tokens[row, :length] = one.tokens
            labels[row, one.num_context - 1 : length - 1] = one.tokens[one.num_context :]
        return ARBatch(*map(torch.from_numpy, (tokens, labels, tasks[items])))

    def _epoch_tasks(self, epoch: int) -> np.ndarray:
        if self._tasks is None or self._tasks[0] != epoch:
            random = np.random.default_rng((self._seed, epoch, 1))
            drawn = random.choice(len(TASKS), size=len(self.corpus.items), p=self._weights)
            self._tasks = (epoch, drawn.astype(np.int64))
        return self._tasks[1]


class NARData:
    """Batches for the NAR: codebook 2 always, and one codebook of the rest (USLM)."""

    def __init__(self, corpus: Corpus, config: NARConfig, batch: BatchConfig, seed: int):
        self.corpus, self._config, self._seed = corpus, config, seed
        lengths = layout_length(corpus.num_text, corpus.num_frames)
        self._plan = Plan(lengths, batch, seed)
        self.padding_share = _padding(lengths, self._plan)

    @classmethod
    def open(
        cls, shard: TokenShard, config: NARConfig, batch: BatchConfig, seed: int, *,
        limit: int | None = None,
    ) -> "NARData":  # fmt: skip
        texts: list[Sequence[int]] = [text_bytes(text) for text in shard.texts]
        return cls(usable(shard, texts, batch.positions, limit), config, batch, seed)

    def num_steps(self, world: int, accumulate: int) -> int:
        return self._plan.num_groups(world * accumulate)

    def share(self, step: int, micro: int, rank: int, world: int, accumulate: int) -> Share:
        size, slot = world * accumulate, micro * world + rank
        _, group = self._plan.group(step, size)
        random = np.random.default_rng((self._seed, step, 2))
        stages = self._draw_stages(random)
        prompts = [self._draw_prompts(items, random) for items in group]
        targets = sum(
            int((self.corpus.num_frames[items] - prompt).sum())
            for items, prompt in zip(group, prompts, strict=True)
        )
        fill = step % self._plan.num_groups(size) * size + slot >= len(self._plan)
        batch = self._collate(group[slot], prompts[slot], stages)
        return Share(batch, targets * len(stages) / size, 0.0 if fill else 1.0)

    def _draw_stages(self, random: np.random.Generator) -> list[int]:
        num_codebooks = len(self._config.codebook_sizes)
        return [1] if num_codebooks == 2 else [1, int(random.integers(2, num_codebooks))]

    def _draw_prompts(self, items: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Frames of each item's prompt; at least one frame is left to predict."""
        frames = self.corpus.num_frames[items]
        share = random.uniform(*self._config.prompt_share, size=len(items))
        return np.minimum(
            np.minimum(frames * share, self._config.prompt_frames), frames - 1
        ).astype(int)

    def _collate(self, items: np.ndarray, prompts: np.ndarray, stages: list[int]) -> NARBatch:
        return nar_batch(
            [self.corpus.texts[item] for item in items],
            [self.corpus.codes(item) for item in items],
            prompts,
            stages,
        )


END_OF_TEXT = 256
NUM_TEXT_SYMBOLS = 257


def text_bytes(text: str) -> list[int]:
    """The NAR's text: UTF-8 bytes and an end, so that it knows nothing of the LLM."""
    return [*text.encode(), END_OF_TEXT]


def nar_batch(
    texts: Sequence[Sequence[int]],
    codes: Sequence[np.ndarray],
    prompt_lengths: Sequence[int] | np.ndarray,
    stages: Sequence[int],
) -> NARBatch:
    """Pads texts (ids of `text_bytes`) and codes (Q, T)."""
    num_text = [len(text) for text in texts]
    lengths = [one.shape[1] for one in codes]
    text = np.zeros((len(texts), max(num_text)), dtype=np.int64)
    padded = np.zeros((len(codes), codes[0].shape[0], max(lengths)), dtype=np.int64)
    for row, (symbols, one) in enumerate(zip(texts, codes, strict=True)):
        text[row, : len(symbols)] = symbols
        padded[row, :, : one.shape[1]] = one
    return NARBatch(
        text=torch.from_numpy(text),
        text_mask=torch.arange(text.shape[1])[None] < torch.tensor(num_text)[:, None],
        codes=torch.from_numpy(padded),
        lengths=torch.tensor(lengths),
        prompt_lengths=torch.tensor([int(length) for length in prompt_lengths]),
        stages=torch.tensor(list(stages)),
    )


def _padding(lengths: np.ndarray, plan: Plan) -> float:
    """Share of padded positions that hold nothing, over an epoch."""
    padded = sum(int(lengths[items].max()) * len(items) for items in plan.epoch(0))
    return 1 - float(lengths.sum()) / padded
