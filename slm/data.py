"""Token shards and texts to batches under a budget of positions (slm/plan.py says which)."""

from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from codec.tokens import TokenShard
from slm.alphabet import Alphabet
from slm.config import BatchConfig, NARConfig, TaskConfig
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


class NARData:
    """Batches for the NAR: codebook 2 always, and one codebook of the rest (USLM)."""

    def __init__(
        self, corpus: Corpus, alphabet: Alphabet, config: NARConfig, batch: BatchConfig, seed: int
    ):
        if batch.packed is not None:
            raise ValueError("nar_batch.packed: only the AR's batches can be packed; leave it out")
        texts = [text_bytes(alphabet.spelt(text)) for text in corpus.texts]
        lengths = np.array([len(text) for text in texts]) + corpus.num_frames
        self.corpus = within(corpus, lengths, batch.positions)
        kept = np.flatnonzero(np.isin(corpus.items, self.corpus.items))
        self._texts = [texts[row] for row in kept]
        self._frames = self.corpus.num_frames
        self._config, self._seed = config, seed
        self._plan = Plan(lengths[kept], batch, seed)
        self.padding_share = self._plan.padding_share

    @classmethod
    def open(
        cls, shard: TokenShard, alphabet: Alphabet, config: NARConfig, batch: BatchConfig,
        seed: int, *, limit: int | None = None,
    ) -> "NARData":  # fmt: skip
        return cls(usable(shard, limit), alphabet, config, batch, seed)

    def num_steps(self, world: int, accumulate: int) -> int:
        return self._plan.num_groups(world * accumulate)

    def share(self, step: int, micro: int, rank: int, world: int, accumulate: int) -> Share:
        size, slot = world * accumulate, micro * world + rank
        group, num_fill = self._plan.group(step, size)
        items = [np.concatenate(batch) for batch in group]
        random = np.random.default_rng((self._seed, step, 2))
        stages = self._draw_stages(random)
        prompts = [self._draw_prompts(rows, random) for rows in items]
        targets = sum(
            int((self._frames[rows] - prompt).sum())
            for rows, prompt in zip(items, prompts, strict=True)
        )
        weight = 0.0 if slot >= size - num_fill else 1.0
        batch = nar_batch(
            [self._texts[item] for item in items[slot]],
            [self.corpus.codes(item) for item in items[slot]],
            prompts[slot],
            stages,
        )
        return Share(batch, targets * len(stages) / size, weight)

    def _draw_stages(self, random: np.random.Generator) -> list[int]:
        num_codebooks = len(self._config.codebook_sizes)
        return [1] if num_codebooks == 2 else [1, int(random.integers(2, num_codebooks))]

    def _draw_prompts(self, items: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Frames of each item's prompt; at least one frame is left to predict."""
        frames = self._frames[items]
        share = random.uniform(*self._config.prompt_share, size=len(items))
        return np.minimum(
            np.minimum(frames * share, self._config.prompt_frames), frames - 1
        ).astype(int)


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
