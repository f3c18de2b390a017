"""Token shards and texts to batches under a budget of positions (slm/data/batching.py says
which)."""

import logging
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from codec.tokens import TokenShard
from codec.training.supervised import Share
from slm.config import BatchConfig, TaskConfig
from slm.data.batching import Batch, Draw, Plan
from slm.data.corpus import Corpus, Ragged, name_of, pieces_of, usable, within
from slm.data.interleaving import edges_fit, hearing_layout, speaking_layout
from slm.data.sequences import ASR, CONTINUATION, TASKS, TEXT, TTS, Layout, layout
from slm.tokenization.tokenizer import SpeechTextTokenizer

logger = logging.getLogger(__name__)

IGNORE = -100
TEXTS_AT_ONCE = 4096
"""Texts that are turned into ids together: lists of them are large."""


class ARBatch(NamedTuple):
    """Rows padded on the right: what is causal never sees the padding."""

    tokens: Int[Tensor, "B L"]
    labels: Int[Tensor, "B L"]
    """The next token where it is a target, else IGNORE."""
    tasks: Int[Tensor, "B L"]
    """Indices into TASKS."""
    documents: Int[Tensor, "B L"] | None
    """Of packed rows: which item of its row a position belongs to, from 1; 0 is padding."""


Epochs = Callable[[int], np.ndarray]
"""The items of an epoch."""


class Start(NamedTuple):
    """What the first epochs are made of."""

    rows: Bool[np.ndarray, " N"]
    """Of the shard: the utterances that alone are spoken in them."""
    epochs: float
    """How many; of the last a share alone, where this is no whole number."""


class ARData:
    """Batches for the AR. An item is an utterance in one task's layout, or a piece of a text.

    An epoch has every utterance in the layout of the heaviest task, and of the other tasks the
    share that their weights say, the rest of it in the epochs after. Pieces of texts are longer
    than utterances: their weight is in positions.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: SpeechTextTokenizer, tasks: TaskConfig, batch: BatchConfig,
        seed: int, *, longest: int, texts: Sequence[str] = (), start: Start | None = None,
    ):  # fmt: skip
        """`longest` in positions; `start` says what the first epochs are made of."""
        tokenizer.vocabulary.check_codec(corpus.shard.stamp, name_of(corpus.shard))
        if bool(texts) != bool(tasks.text):
            raise ValueError("ar.tasks.text and texts belong together: give both, or neither")
        longest = min(longest, batch.packed or batch.positions)
        self.tokenizer, self._packed = tokenizer, batch.packed is not None
        weights = {task: getattr(tasks, TASKS[task]) for task in (TTS, ASR, CONTINUATION)}
        weights = {task: weight for task, weight in weights.items() if weight}
        codes = Ragged((corpus.codes(row)[0] for row in range(len(corpus.items))), np.uint16)
        forms = [_Form(task, corpus, codes, tokenizer, seed) for task in weights]
        self.corpus = within(corpus, np.max([form.lengths for form in forms], axis=0), longest)
        kept = np.flatnonzero(np.isin(corpus.items, self.corpus.items))
        self._codes, self._forms = codes.at(kept), [form.at(kept) for form in forms]
        self._pieces = Ragged(_pieces(tokenizer, texts, longest))
        if texts and not len(self._pieces):
            raise ValueError("the texts have no piece of two tokens; give longer ones")
        number = len(kept)
        self._tasks = np.repeat([*weights, TEXT], [number] * len(weights) + [len(self._pieces)])
        sizes = self._pieces.lengths
        self._targets = np.concatenate([*(form.targets for form in self._forms), sizes - 1])
        self.lengths = np.concatenate([*(form.lengths for form in self._forms), sizes])
        """Positions of every item."""
        draw = self._draw(weights, tasks.text if texts else 0.0, seed)
        if start is not None and start.epochs:
            draw = self._beginning(draw, start, seed)
        self._plan = Plan(self.lengths, batch, seed, draw)
        self.padding_share = self._plan.padding_share

    def _draw(self, weights: dict[int, float], text: float, seed: int) -> Epochs:
        """Which items an epoch has, by the weights of their tasks."""
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
        corpus = usable(shard, limit)
        return cls(corpus, tokenizer, tasks, batch, seed, longest=longest, texts=texts)

    def _beginning(self, draw: Epochs, start: Start, seed: int) -> Epochs:
        """`draw`, but in the first epochs of `start`'s utterances and the texts alone."""
        chosen = start.rows[self.corpus.items]
        if not chosen.any():
            raise ValueError("clip_epochs: no clip is usable; set it to 0")
        inside = np.append(
            np.tile(chosen, len(self._forms)), np.ones(len(self._pieces), dtype=bool)
        )

        def items(epoch: int) -> np.ndarray:
            drawn, left = draw(epoch), start.epochs - epoch
            if left <= 0:
                return drawn
            drawn = drawn[inside[drawn]]
            if left >= 1:
                return drawn
            random = np.random.default_rng((seed, epoch, 2))
            return random.permutation(drawn)[: max(1, round(left * len(drawn)))]

        return items

    @property
    def num_frames(self) -> int:
        """Of the utterances of the first epoch, each as often as it comes."""
        items = np.concatenate([row for rows in self._plan.epoch(0) for row in rows])
        number = len(self.corpus.items)
        spoken = items[items < number * len(self._forms)]
        return int(self.corpus.num_frames[spoken % number].sum())

    def num_steps(self, world: int, accumulate: int) -> int:
        return self._plan.num_groups(world * accumulate)

    def share(self, step: int, micro: int, rank: int, world: int, accumulate: int) -> Share:
        size, slot = world * accumulate, micro * world + rank
        group, num_fill = self._plan.group(step, size)
        targets = int(self._targets[np.concatenate([row for rows in group for row in rows])].sum())
        weight = 0.0 if slot >= size - num_fill else 1.0
        return Share(self.collate(group[slot]), targets / size, weight)

    def layout(self, item: int | np.integer) -> Layout:
        """The sequence of an item."""
        task, number = int(self._tasks[item]), len(self.corpus.items)
        vocabulary = self.tokenizer.vocabulary
        if task == TEXT:
            piece = self._pieces[int(item) - number * len(self._forms)]
            return layout(task, vocabulary, piece.tolist(), [])
        form, row = self._forms[int(item) // number], int(item) % number
        if form.layouts is not None:
            return form.layouts[row]
        if form.pieces is not None:
            speech = form.pieces[row]
        else:
            speech = self.tokenizer.speech_ids(TASKS[task], self._codes[row].astype(np.int64))
        return layout(task, vocabulary, form.texts[row].tolist(), speech)

    def collate(self, batch: Batch) -> ARBatch:
        """A batch from the items of its rows."""
        rows = [[self.layout(item) for item in row] for row in batch]
        longest = max(sum(len(one.tokens) for one in row) for row in rows)
        # The padding is any valid id: causal attention keeps it from the tokens before it.
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
                if one.given is not None:
                    wanted = np.where(one.given, IGNORE, wanted)
                labels[index, first - 1 : end - 1] = wanted
                tasks[index, start:end] = self._tasks[item]
                documents[index, start:end] = number
                start = end
        held = torch.from_numpy(documents) if self._packed else None
        tensors = map(torch.from_numpy, (tokens, labels, tasks))
        return ARBatch(*tensors, documents=held)


class _Form:
    """What the utterances of a corpus are in one task."""

    def __init__(
        self, task: int, corpus: Corpus, codes: Ragged, tokenizer: SpeechTextTokenizer, seed: int
    ):
        name, number = TASKS[task], len(codes)
        self.layouts: _Layouts | None = None
        """Their sequences, where these are no texts and speech side by side."""
        if task in (TTS, ASR) and tokenizer.text.interleaved:
            self.layouts = _Layouts(task, corpus, codes, tokenizer, seed)
            self.lengths, self.targets = self.layouts.lengths, self.layouts.targets
            return
        spelt = _encoded(tokenizer, name, corpus.texts) if task != CONTINUATION else [[]] * number
        self.texts = Ragged(spelt)
        self.pieces: Ragged | None = None
        """Ids of their speech, where it is not codes as they are."""
        if tokenizer.has_pieces(name):
            rows = (codes[row].astype(np.int64) for row in range(number))
            self.pieces = Ragged(tokenizer.speech_ids(name, row) for row in rows)
        num_speech = (codes if self.pieces is None else self.pieces).lengths
        self.targets = (self.texts.lengths if task == ASR else num_speech) + 1
        self.lengths = self.texts.lengths + num_speech + {TTS: 3, ASR: 4, CONTINUATION: 2}[task]

    def at(self, rows: np.ndarray) -> "_Form":
        """Of these utterances alone."""
        part = copy(self)
        if self.layouts is not None:
            part.layouts = self.layouts.at(rows)
            part.targets, part.lengths = self.targets[rows], self.lengths[rows]
            return part
        part.texts = self.texts.at(rows)
        part.pieces = self.pieces and self.pieces.at(rows)
        part.targets, part.lengths = self.targets[rows], self.lengths[rows]
        return part


class _Layouts:
    """Sequences of words and their speech by turns."""

    def __init__(
        self, task: int, corpus: Corpus, codes: Ragged, tokenizer: SpeechTextTokenizer, seed: int
    ):  # fmt: skip
        made, known = [], 0
        for row, text in enumerate(corpus.texts):
            said, edges = codes[row].astype(np.int64), corpus.edges_of(row)
            known += edges_fit(edges, len(text.split()), len(said))
            if task == ASR:
                made.append(hearing_layout(tokenizer, text, said, edges))
            else:
                random = np.random.default_rng((seed, row, 6))
                made.append(speaking_layout(tokenizer, text, said, edges, random))
        if not known:
            raise ValueError(
                f"edges: none are those of {name_of(corpus.shard)}; name the edges.jsonl.gz that "
                "recipes/make_clips.py wrote of these tokens"
            )
        if known < len(made):
            logger.warning(
                "%s: %d of %d items have no edges that fit: each is learnt as one word (texts with "
                "digits, and other tokens' edges)",
                name_of(corpus.shard), len(made) - known, len(made),
            )  # fmt: skip
        self._tokens = Ragged(one.tokens for one in made)
        self._given = Ragged((one.given for one in made if one.given is not None), np.bool_)
        self.lengths = self._tokens.lengths
        self.targets = np.array([int((~self._given[row]).sum()) for row in range(len(made))])

    def __getitem__(self, row: int) -> Layout:
        tokens, given = self._tokens[row].astype(np.int64), self._given[row]
        return Layout(tokens, len(tokens) - len(given), given)

    def at(self, rows: np.ndarray) -> "_Layouts":
        """Of these utterances alone."""
        part = copy(self)
        part._tokens, part._given = self._tokens.at(rows), self._given.at(rows)
        part.lengths, part.targets = self.lengths[rows], self.targets[rows]
        return part


def _encoded(
    tokenizer: SpeechTextTokenizer, task: str, texts: Sequence[str]
) -> Iterator[list[int]]:
    """Ids of texts, some thousands at a time."""
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        yield from tokenizer.text_ids(task, texts[start : start + TEXTS_AT_ONCE])


def _pieces(
    tokenizer: SpeechTextTokenizer, texts: Sequence[str], longest: int
) -> Iterator[np.ndarray]:
    return pieces_of(_encoded(tokenizer, TASKS[TEXT], texts), tokenizer.vocabulary.eos, longest)
