"""Batches for the NAR from token shards."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from codec.tokens import TokenShard
from codec.training.data import Share
from slm.config import BatchConfig, NARConfig
from slm.data.batching import Plan
from slm.data.corpus import Corpus, name_of, usable, within
from slm.tokenization.tokenizer import SpeechTextTokenizer


class NARBatch(NamedTuple):
    """Utterances padded on the right."""

    text: Int[Tensor, "B N"]
    """Symbols of `text_bytes`."""
    text_mask: Bool[Tensor, "B N"]
    """Positions that are no padding."""
    codes: Int[Tensor, "B Q T"]
    lengths: Int[Tensor, " B"]
    """Frames, the prompt included."""
    prompt_lengths: Int[Tensor, " B"]
    """Frames of the prompt, whose codebooks are all input."""
    stages: Int[Tensor, " S"]
    """Codebooks to predict, from 0."""


class NARData:
    """Batches for the NAR: each step predicts codebook 2 and one codebook above it (USLM).

    Batches are a function of (seed, step). Dropped texts have their own random numbers: they change
    neither codebooks nor prompts.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: SpeechTextTokenizer,
        config: NARConfig,
        batch: BatchConfig,
        seed: int,
    ):
        """
        Raises:
            ValueError: shards of another codec or of a codec with one codebook, no usable item, or
                packed batches.
        """
        if batch.packed is not None:
            raise ValueError("nar_batch.packed: only the AR's batches can be packed; leave it out")
        stamp = corpus.shard.stamp
        tokenizer.vocabulary.check_codec(stamp, name_of(corpus.shard))
        if len(stamp.codebook_sizes) < 2:
            raise ValueError(f"{name_of(corpus.shard)}: its codec has one codebook: set nar=null")
        if config.codebook_sizes != stamp.codebook_sizes:
            raise ValueError(
                f"{name_of(corpus.shard)}: its codebooks {stamp.codebook_sizes} are not the NAR's, "
                f"{config.codebook_sizes}; set nar.codebook_sizes to them"
            )
        texts = [text_bytes(tokenizer.tts_form(text)) for text in corpus.texts]
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
        cls, shard: TokenShard, tokenizer: SpeechTextTokenizer, config: NARConfig,
        batch: BatchConfig, seed: int, *, limit: int | None = None,
    ) -> "NARData":  # fmt: skip
        """The batches of a token shard; `limit`: its first N usable items, None: all.

        Raises:
            ValueError: as the constructor.
        """
        return cls(usable(shard, limit), tokenizer, config, batch, seed)

    def num_steps(self, world: int, accumulate: int) -> int:
        """Training steps of the first epoch, on `world` ranks with `accumulate` micro-batches."""
        return self._plan.num_groups(world * accumulate)

    def share(self, step: int, micro: int, rank: int, world: int, accumulate: int) -> Share:
        """A rank's micro-batch of a step: a `NARBatch`, the mean targets of the step's
        micro-batches, and weight 0 if it only fills up the epoch's last step."""
        size, slot = world * accumulate, micro * world + rank
        group, num_fill = self._plan.group(step, size)
        items = [np.concatenate(batch) for batch in group]
        random = np.random.default_rng((self._seed, step, 2))
        stages = self._draw_stages(random)
        prompts = [self._draw_prompts(rows, random) for rows in items]
        asked = [self._frames[rows] - prompt for rows, prompt in zip(items, prompts, strict=True)]
        weight = 0.0 if slot >= size - num_fill else 1.0
        batch = nar_batch(
            self._draw_texts(items[slot], (step, slot)),
            [self.corpus.codes(item) for item in items[slot]],
            prompts[slot],
            stages,
        )
        targets = sum(int(frames.sum()) for frames in asked)
        return Share(batch, targets * len(stages) / size, weight)

    def _draw_stages(self, random: np.random.Generator) -> list[int]:
        weights = self._config.stage_decay ** np.arange(len(self._config.codebook_sizes) - 2)
        if not len(weights):
            return [1]
        return [1, 2 + int(random.choice(len(weights), p=weights / weights.sum()))]

    def _draw_prompts(self, items: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Frames of each item's prompt; at least one frame remains to predict."""
        frames = self._frames[items]
        share = random.uniform(*self._config.prompt_share, size=len(items))
        return np.minimum(
            np.minimum(frames * share, self._config.prompt_frames), frames - 1
        ).astype(int)

    def _draw_texts(self, items: np.ndarray, place: tuple[int, int]) -> list[list[int]]:
        texts = [self._texts[item] for item in items]
        if self._config.text_dropout:
            random = np.random.default_rng((self._seed, *place, 5))
            dropped = random.random(len(items)) < self._config.text_dropout
            texts = [
                text_bytes("") if no else text for no, text in zip(dropped, texts, strict=True)
            ]
        return texts


END_OF_TEXT = 256
NUM_TEXT_SYMBOLS = 257


def text_bytes(text: str) -> list[int]:
    """The NAR's text input: UTF-8 bytes and an end symbol, independent of the LLM's tokenizer."""
    return [*text.encode(), END_OF_TEXT]


def nar_batch(
    texts: Sequence[Sequence[int]],
    codes: Sequence[Int[np.ndarray, "Q _"]],
    prompt_lengths: Sequence[int] | np.ndarray,
    stages: Sequence[int],
) -> NARBatch:
    """Pads utterances to a batch.

    Args:
        texts: symbols of `text_bytes`.
        codes: (Q, T) of each utterance, the prompt included.
        prompt_lengths: frames of each prompt.
        stages: codebooks to predict, from 0.
    """
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
