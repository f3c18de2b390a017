"""Token shards and texts to batches under a budget of positions (slm/plan.py says which)."""

from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from codec.tokens import TokenShard
from slm.alphabet import Alphabet
from slm.config import BatchConfig, TaskConfig
from slm.corpus import Corpus, name_of, pieces_of, usable, within
from slm.plan import Batch, Draw, Plan
from slm.prompts import ASR, CONTINUATION, TASKS, TEXT, TTS, Layout, layout

IGNORE = -100


class ARBatch(NamedTuple):
    """Rows padded on the right: what is causal never sees the padding."""

    tokens: Int[Tensor, "B L"]
    labels: Int[Tensor, "B L"]
    """The next token where it is a target, else IGNORE."""
    tasks: Int[Tensor, "B L"]
    """Indices into TASKS."""
    documents: Int[Tensor, "B L"] | None
    """Of packed rows: which item of its row a position belongs to, from 1; 0 is padding."""


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


class ARData:
    """Batches for the AR. An item is an utterance in one task's layout, or a piece of a text.

    An epoch has every utterance in the layout of the heaviest task, and of the other tasks the
    share that their weights say, the rest of it in the epochs after.
    """

    def __init__(
        self, corpus: Corpus, alphabet: Alphabet, tasks: TaskConfig, batch: BatchConfig, seed: int,
        *, longest: int, texts: Sequence[str] = (),
    ):  # fmt: skip
        alphabet.vocabulary.check_codec(corpus.shard.stamp, name_of(corpus.shard))
        if bool(texts) != bool(tasks.text):
            raise ValueError("ar.tasks.text and texts belong together: give both, or neither")
        longest = min(longest, batch.packed or batch.positions)
        self.alphabet, self._packed = alphabet, batch.packed is not None
        weights = {task: getattr(tasks, TASKS[task]) for task in (TTS, ASR, CONTINUATION)}
        weights = {task: weight for task, weight in weights.items() if weight}
        forms = [_Form(task, corpus, alphabet) for task in weights]
        self.corpus = within(corpus, np.max([form.lengths for form in forms], axis=0), longest)
        kept = np.isin(corpus.items, self.corpus.items)
        self._forms = [form.at(kept) for form in forms]
        self._pieces = _pieces(alphabet, texts, longest)
        number = len(self.corpus.items)
        self._tasks = np.concatenate(
            [np.repeat(list(weights), number), np.full(len(self._pieces), TEXT)]
        )
        sizes = np.array([len(piece) for piece in self._pieces], dtype=np.int64)
        self._targets = np.concatenate([*(form.targets for form in self._forms), sizes - 1])
        pools = [np.arange(number) + number * index for index in range(len(weights))]
        counts = [round(number * weight / max(weights.values())) for weight in weights.values()]
        if self._pieces:
            pools.append(np.arange(len(self._pieces)) + number * len(weights))
            counts.append(round(number * tasks.text / max(weights.values())))
        lengths = np.concatenate([*(form.lengths for form in self._forms), sizes])
        self._plan = Plan(lengths, batch, seed, Draw(pools, counts, seed))
        self.padding_share = self._plan.padding_share

    @classmethod
    def open(
        cls, shard: TokenShard, alphabet: Alphabet, tasks: TaskConfig, batch: BatchConfig,
        seed: int, *, longest: int, limit: int | None = None, texts: Sequence[str] = (),
    ) -> "ARData":  # fmt: skip
        corpus = usable(shard, limit)
        return cls(corpus, alphabet, tasks, batch, seed, longest=longest, texts=texts)

    def num_steps(self, world: int, accumulate: int) -> int:
        return self._plan.num_groups(world * accumulate)

    def share(self, step: int, micro: int, rank: int, world: int, accumulate: int) -> Share:
        size, slot = world * accumulate, micro * world + rank
        group, num_fill = self._plan.group(step, size)
        targets = sum(int(self._targets[row].sum()) for batch in group for row in batch)
        weight = 0.0 if slot >= size - num_fill else 1.0
        return Share(self.collate(group[slot]), targets / size, weight)

    def layout(self, item: int | np.integer) -> Layout:
        """The sequence of an item."""
        task, number = int(self._tasks[item]), len(self.corpus.items)
        if task == TEXT:
            piece = self._pieces[int(item) - number * len(self._forms)]
            return layout(task, self.alphabet.vocabulary, piece.tolist(), [])
        form, row = self._forms[int(item) // number], int(item) % number
        text, speech = form.ids(row, self.corpus, self.alphabet)
        return layout(task, self.alphabet.vocabulary, text, speech)

    def collate(self, batch: Batch) -> ARBatch:
        """A batch from the items of its rows."""
        rows = [[self.layout(item) for item in row] for row in batch]
        longest = max(sum(len(one.tokens) for one in row) for row in rows)
        # The padding is any valid id: causal attention keeps it from the tokens before it.
        tokens = np.full((len(rows), longest), self.alphabet.vocabulary.eos, dtype=np.int64)
        labels = np.full((len(rows), longest), IGNORE, dtype=np.int64)
        tasks, documents = np.zeros((2, len(rows), longest), dtype=np.int64)
        for index, (row, items) in enumerate(zip(rows, batch, strict=True)):
            start = 0
            for number, (one, item) in enumerate(zip(row, items, strict=True), start=1):
                end = start + len(one.tokens)
                tokens[index, start:end] = one.tokens
                first = start + one.num_context
                labels[index, first - 1 : end - 1] = one.tokens[one.num_context :]
                tasks[index, start:end] = self._tasks[item]
                documents[index, start:end] = number
                start = end
        held = torch.from_numpy(documents) if self._packed else None
        tensors = map(torch.from_numpy, (tokens, labels, tasks))
        return ARBatch(*tensors, documents=held)


class _Form:
    """What the utterances of a corpus are in one task: ids, or how to make them."""

    def __init__(self, task: int, corpus: Corpus, alphabet: Alphabet):
        self.task, name = task, TASKS[task]
        empty: list[list[int]] = [[]] * len(corpus.items)
        self._texts = empty if task == CONTINUATION else alphabet.text_ids(name, corpus.texts)
        # Codes are read from the shard when they are asked for; pieces of them are kept.
        self._pieces = None
        num_speech = corpus.num_frames.astype(np.int64)
        if alphabet.has_pieces(name):
            rows = range(len(corpus.items))
            self._pieces = [alphabet.speech_ids(name, corpus.codes(row)[0]) for row in rows]
            num_speech = np.array([len(pieces) for pieces in self._pieces], dtype=np.int64)
        num_text = np.array([len(text) for text in self._texts], dtype=np.int64)
        self.targets = (num_text if task == ASR else num_speech) + 1
        self.lengths = num_text + num_speech + {TTS: 3, ASR: 4, CONTINUATION: 2}[task]

    def at(self, kept: np.ndarray) -> "_Form":
        """Of the utterances that are kept."""
        part = copy(self)
        where = np.flatnonzero(kept)
        part._texts = [self._texts[row] for row in where]
        part._pieces = self._pieces and [self._pieces[row] for row in where]
        part.targets, part.lengths = self.targets[where], self.lengths[where]
        return part

    def ids(
        self, row: int, corpus: Corpus, alphabet: Alphabet
    ) -> tuple[list[int], Int[np.ndarray, " _"]]:
        """Of an utterance's text and speech."""
        if self._pieces is not None:
            return self._texts[row], self._pieces[row]
        return self._texts[row], alphabet.speech_ids(TASKS[self.task], corpus.codes(row)[0])


def _pieces(alphabet: Alphabet, texts: Sequence[str], longest: int) -> list[np.ndarray]:
    if not texts:
        return []
    return pieces_of(alphabet.text_ids("text", texts), alphabet.vocabulary.eos, longest)
