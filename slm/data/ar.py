"""Batches for the AR from token shards and texts, with the loss mask of each task."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from codec.tokens import TokenShard
from codec.training.data import Share
from slm.config import BatchConfig, TaskConfig
from slm.data.batching import Batch, Draw, Plan
from slm.data.corpus import Corpus, Ragged, name_of, pieces_of, usable, within
from slm.data.interleaving import sequence_format
from slm.data.sequences import (
    ASR,
    CONTINUATION,
    TASKS,
    TEXT,
    TTS,
    Layout,
    PlainFormat,
    encoded,
    layout,
)
from slm.tokenization.tokenizer import SpeechTextTokenizer

IGNORE = -100


class ARBatch(NamedTuple):
    """Rows padded on the right, which causal attention never reads."""

    tokens: Int[Tensor, "B L"]
    labels: Int[Tensor, "B L"]
    """The next token where it is a target, else IGNORE: the loss mask."""
    tasks: Int[Tensor, "B L"]
    """Indices into TASKS."""
    documents: Int[Tensor, "B L"] | None
    """For packed rows: number of the item within its row, from 1; 0 is padding."""


Epochs = Callable[[int], np.ndarray]
"""The items of an epoch."""


class Start(NamedTuple):
    """Utterances of the first epochs."""

    rows: Bool[np.ndarray, " N"]
    """Mask over the shard: the utterances of these epochs."""
    epochs: float
    """Number of epochs; of a fractional one only a share of the items is used."""


class ARData:
    """Batches for the AR. An item is an utterance in one task's layout, or a piece of a text.

    An epoch has each utterance once in the task of the highest weight; of another task it has the
    share w / max(w) of the utterances, and the next epochs have the others. Texts are weighted by
    positions, because their pieces are longer than utterances.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: SpeechTextTokenizer, tasks: TaskConfig, batch: BatchConfig,
        seed: int, *, longest: int, texts: Sequence[str] = (), start: Start | None = None,
    ):  # fmt: skip
        """
        Args:
            longest: the LLM's context length, in positions; longer items are dropped.
            texts: documents for the task `text`.
            start: restricts the utterances of the first epochs.

        Raises:
            ValueError: shards of another codec, no usable item, or texts without a weight.
        """
        tokenizer.vocabulary.check_codec(corpus.shard.stamp, name_of(corpus.shard))
        if bool(texts) != bool(tasks.text):
            raise ValueError("ar.tasks.text and texts belong together: give both, or neither")
        longest = min(longest, batch.packed or batch.positions)
        self.tokenizer, self._packed = tokenizer, batch.packed is not None
        weights = {task: getattr(tasks, TASKS[task]) for task in (TTS, ASR, CONTINUATION)}
        weights = {task: weight for task, weight in weights.items() if weight}
        codes = Ragged((corpus.codes(row)[0] for row in range(len(corpus.items))), np.uint16)
        plain, form = PlainFormat(tokenizer), sequence_format(tokenizer)
        self._examples = [
            (plain if task == CONTINUATION else form).examples(task, corpus, codes, seed)
            for task in weights
        ]
        lengths = np.max([one.lengths for one in self._examples], axis=0)
        self.corpus = within(corpus, lengths, longest)
        self._kept = kept = np.flatnonzero(np.isin(corpus.items, self.corpus.items))
        self._pieces = Ragged(_pieces(tokenizer, texts, longest))
        if texts and not len(self._pieces):
            raise ValueError("the texts have no piece of two tokens; give longer ones")
        number = len(kept)
        self._tasks = np.repeat([*weights, TEXT], [number] * len(weights) + [len(self._pieces)])
        sizes = self._pieces.lengths
        self._targets = np.concatenate([*(one.targets[kept] for one in self._examples), sizes - 1])
        self.lengths = np.concatenate([*(one.lengths[kept] for one in self._examples), sizes])
        """Positions of every item."""
        draw = self._draw(weights, tasks.text if texts else 0.0, seed)
        if start is not None and start.epochs:
            draw = self._beginning(draw, start, seed)
        self._plan = Plan(self.lengths, batch, seed, draw)
        self.padding_share = self._plan.padding_share

    def _draw(self, weights: dict[int, float], text: float, seed: int) -> Epochs:
        """The items of an epoch, by task weights."""
        number, sizes = len(self.corpus.items), self._pieces.lengths
        heaviest = max(weights, key=lambda task: weights[task])
        pools = [np.arange(number) + number * index for index in range(len(weights))]
        counts = [number * weight / weights[heaviest] for weight in weights.values()]
        if text:
            positions = self.lengths[self._tasks == heaviest].sum()
            pools.append(np.arange(len(sizes)) + number * len(weights))
            counts.append(positions * text / weights[heaviest] / sizes.mean())
        return Draw(pools, [max(1, round(count)) for count in counts], seed)

    @classmethod
    def open(
        cls, shard: TokenShard, tokenizer: SpeechTextTokenizer, tasks: TaskConfig,
        batch: BatchConfig, seed: int, *, longest: int, limit: int | None = None,
        texts: Sequence[str] = (),
    ) -> "ARData":  # fmt: skip
        """The batches of a token shard; `limit`: its first N usable items, None: all.

        Raises:
            ValueError: as the constructor, and a shard without a usable item.
        """
        corpus = usable(shard, limit)
        return cls(corpus, tokenizer, tasks, batch, seed, longest=longest, texts=texts)

    def _beginning(self, draw: Epochs, start: Start, seed: int) -> Epochs:
        """`draw` restricted, in the first epochs, to the utterances of `start` and the texts."""
        clips = start.rows[self.corpus.items]
        if not clips.any():
            raise ValueError("clip_epochs: no clip is usable; set it to 0")
        inside = np.append(
            np.tile(clips, len(self._examples)), np.ones(len(self._pieces), dtype=bool)
        )

        def items(epoch: int) -> np.ndarray:
            chosen, left = draw(epoch), start.epochs - epoch
            if left <= 0:
                return chosen
            chosen = chosen[inside[chosen]]
            if left >= 1:
                return chosen
            random = np.random.default_rng((seed, epoch, 2))
            return random.permutation(chosen)[: max(1, round(left * len(chosen)))]

        return items

    @property
    def num_frames(self) -> int:
        """Frames of the first epoch's utterances."""
        items = np.concatenate([row for rows in self._plan.epoch(0) for row in rows])
        number = len(self.corpus.items)
        speech = items[items < number * len(self._examples)]
        return int(self.corpus.num_frames[speech % number].sum())

    def num_steps(self, world: int, accumulate: int) -> int:
        """Training steps of the first epoch, on `world` ranks with `accumulate` micro-batches."""
        return self._plan.num_groups(world * accumulate)

    def share(self, step: int, micro: int, rank: int, world: int, accumulate: int) -> Share:
        """A rank's micro-batch of a step: an `ARBatch`, the mean targets of the step's
        micro-batches, and weight 0 if it only fills up the epoch's last step."""
        size, slot = world * accumulate, micro * world + rank
        group, num_fill = self._plan.group(step, size)
        targets = int(self._targets[np.concatenate([row for rows in group for row in rows])].sum())
        weight = 0.0 if slot >= size - num_fill else 1.0
        return Share(self.collate(group[slot]), targets / size, weight)

    def layout(self, item: int | np.integer) -> Layout:
        """The training sequence of an item."""
        task, number = int(self._tasks[item]), len(self.corpus.items)
        vocabulary = self.tokenizer.vocabulary
        if task == TEXT:
            piece = self._pieces[int(item) - number * len(self._examples)]
            return layout(task, vocabulary, piece.tolist(), [])
        return self._examples[int(item) // number][int(self._kept[int(item) % number])]

    def collate(self, batch: Batch) -> ARBatch:
        """A batch of rows of items."""
        rows = [[self.layout(item) for item in row] for row in batch]
        longest = max(sum(len(one.tokens) for one in row) for row in rows)
        # Any valid id pads: causal attention never reads it.
        tokens = np.full((len(rows), longest), self.tokenizer.vocabulary.eos, dtype=np.int64)
        labels = np.full((len(rows), longest), IGNORE, dtype=np.int64)
        tasks, documents = np.zeros((2, len(rows), longest), dtype=np.int64)
        for index, (row, items) in enumerate(zip(rows, batch, strict=True)):
            start = 0
            for number, (one, item) in enumerate(zip(row, items, strict=True), start=1):
                end = start + len(one.tokens)
                tokens[index, start:end] = one.tokens
                first = start + one.num_context
                wanted = one.tokens[one.num_context :]
                if one.forced is not None:
                    wanted = np.where(one.forced, IGNORE, wanted)
                labels[index, first - 1 : end - 1] = wanted
                tasks[index, start:end] = self._tasks[item]
                documents[index, start:end] = number
                start = end
        held = torch.from_numpy(documents) if self._packed else None
        tensors = map(torch.from_numpy, (tokens, labels, tasks))
        return ARBatch(*tensors, documents=held)


def _pieces(
    tokenizer: SpeechTextTokenizer, texts: Sequence[str], longest: int
) -> Iterator[np.ndarray]:
    return pieces_of(encoded(tokenizer, TASKS[TEXT], texts), tokenizer.vocabulary.eos, longest)
