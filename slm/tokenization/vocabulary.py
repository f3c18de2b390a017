"""The id map of the extended vocabulary: text, special tokens and speech.

0 .. text_size - 1     the LLM's own rows: text, and padding rows of its table; unchanged
then special tokens     <|text|> <|speech|> <|/speech|>, and <|/text|> if the LLM has no end token
then codebook 1        one id per entry
then merges            one id per piece of several codes (slm/tokenization/acoustic_bpe.py); often
none
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from codec.io import DAMAGE, atomic_file, parse_json
from codec.tokens import CodecStamp
from slm.config import from_json

FILE_NAME = "vocabulary.json"
FORMAT_VERSION = 2
READABLE = (1, 2)
"""Format 1 had no merges."""
SPECIALS = ("<|text|>", "<|speech|>", "<|/speech|>")
OWN_EOS = "<|/text|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The id ranges of text, special tokens and speech, and the codec of the speech."""

    num_text: int
    """Ids of the LLM's tokenizer; transcripts use only these."""
    text_size: int
    """Rows of the LLM's table before it was extended; the first new id."""
    text_eos: int | None
    """The LLM's end token; None if it has none."""
    codebook_size: int
    """Entries of codebook 1."""
    codec: CodecStamp
    num_merges: int = 0
    """Merges of acoustic BPE."""

    def __post_init__(self) -> None:
        if not 0 < self.num_text <= self.text_size:
            raise ValueError(f"num_text {self.num_text} must be in 1..{self.text_size}")
        if self.text_eos is not None and not 0 <= self.text_eos < self.num_text:
            raise ValueError(f"end token {self.text_eos} is not one of {self.num_text} text ids")
        if self.codebook_size != self.codec.codebook_sizes[0]:
            raise ValueError(
                f"codebook size {self.codebook_size} is not the codec's "
                f"{self.codec.codebook_sizes[0]}"
            )
        if self.num_merges < 0:
            raise ValueError(f"num_merges must not be negative, got {self.num_merges}")

    @classmethod
    def of(cls, lm: Any, tokenizer: Any, codec: CodecStamp, num_merges: int = 0) -> "Vocabulary":
        """For a causal LM before it is extended, and its tokenizer."""
        num_rows = lm.get_input_embeddings().weight.shape[0]
        return cls(
            num_text=len(tokenizer),
            # Tables are often padded beyond the tokenizer; those rows are kept.
            text_size=max(num_rows, len(tokenizer)),
            text_eos=tokenizer.eos_token_id,
            codebook_size=codec.codebook_sizes[0],
            codec=codec,
            num_merges=num_merges,
        )

    @property
    def specials(self) -> tuple[str, ...]:
        """Names of the special tokens, in the order of their ids."""
        return SPECIALS if self.text_eos is not None else (*SPECIALS, OWN_EOS)

    @property
    def text(self) -> int:
        """Id of <|text|>."""
        return self.text_size

    @property
    def speech(self) -> int:
        """Id of <|speech|>."""
        return self.text_size + 1

    @property
    def speech_end(self) -> int:
        """Id of <|/speech|>."""
        return self.text_size + 2

    @property
    def eos(self) -> int:
        """Id of the end token of transcripts."""
        return self.text_eos if self.text_eos is not None else self.text_size + 3

    @property
    def first_speech(self) -> int:
        """Id of entry 0 of codebook 1."""
        return self.text_size + len(self.specials)

    @property
    def size(self) -> int:
        """Rows of the extended table."""
        return self.first_speech + self.num_pieces

    @property
    def num_pieces(self) -> int:
        """Number of speech ids: codes and merges."""
        return self.codebook_size + self.num_merges

    @property
    def new_ids(self) -> range:
        """Ids that the LLM did not have."""
        return range(self.text_size, self.size)

    def new_tokens(self) -> list[str]:
        """Names of all ids that the LLM's tokenizer lacks, in their order: padding rows of its
        table, special tokens, then <|s_0|>, <|s_1|>, ...: codes of codebook 1 and BPE merges."""
        padding = [f"<|unused_{row}|>" for row in range(self.num_text, self.text_size)]
        speech = [f"<|s_{number}|>" for number in range(self.num_pieces)]
        return [*padding, *self.specials, *speech]

    def check_free(self, tokenizer: Any) -> None:
        """Raises ValueError if the LLM's tokenizer has one of the new tokens."""
        known = tokenizer.get_vocab()
        if taken := [name for name in self.new_tokens() if name in known]:
            raise ValueError(
                f"the LLM's tokenizer already has the token {taken[0]}, which speech needs; choose "
                "another LLM (ar.base)"
            )

    def encode_speech(self, codes: Integer[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
        """Codes of codebook 1 to ids. Raises ValueError for a code out of range."""
        codes = np.asarray(codes, dtype=np.int64)
        outside = codes[(codes < 0) | (codes >= self.codebook_size)]
        if outside.size:
            raise ValueError(
                f"code {outside[0]} is outside codebook 1 of {self.codebook_size} entries; "
                "were these codes made by another codec?"
            )
        return codes + self.first_speech

    def decode_speech(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " T"]:
        """Ids (T,) to codes of codebook 1. Raises ValueError for other ids."""
        return self._offsets(ids, self.codebook_size, "the id of a code")

    def encode_pieces(self, pieces: Integer[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        """Acoustic BPE pieces to ids. Raises ValueError for a piece out of range."""
        pieces = np.asarray(pieces, dtype=np.int64)
        outside = pieces[(pieces < 0) | (pieces >= self.num_pieces)]
        if outside.size:
            raise ValueError(f"there is no piece {outside[0]} among {self.num_pieces}")
        return pieces + self.first_speech

    def decode_pieces(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " N"]:
        """Ids (N,) to acoustic BPE pieces. Raises ValueError for other ids."""
        return self._offsets(ids, self.num_pieces, "a speech id")

    def _offsets(self, ids: Sequence[int] | np.ndarray, stop: int, what: str) -> np.ndarray:
        offsets = np.asarray(ids, dtype=np.int64) - self.first_speech
        outside = offsets[(offsets < 0) | (offsets >= stop)]
        if outside.size:
            raise ValueError(f"id {outside[0] + self.first_speech} is not {what}")
        return offsets

    def decode_text(self, tokenizer: Any, ids: Sequence[int]) -> str:
        """The text of a transcript's ids (no end token). Raises ValueError for other ids."""
        outside = [token for token in ids if not 0 <= token < self.num_text]
        if outside:
            raise ValueError(f"id {outside[0]} is not a text id")
        written = tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return written.strip()

    def check_codec(self, stamp: CodecStamp, what: str) -> None:
        """Raises ValueError if `what` is of another codec."""
        if stamp.digest != self.codec.digest:
            raise ValueError(
                f"{what}: codec {stamp.id} ({stamp.digest}) is not the one that the model was "
                f"trained with, {self.codec.id} ({self.codec.digest}); use that one"
            )

    def save(self, folder: str | Path) -> None:
        """Writes vocabulary.json."""
        with atomic_file(Path(folder) / FILE_NAME) as temporary:
            record = {"format": FORMAT_VERSION, **asdict(self), "specials": self.specials}
            temporary.write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> "Vocabulary":
        """From the folder ar/ of a voice. Raises ValueError for a missing or damaged file."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"{path} is missing; is {folder} the ar/ folder of a voice?")
        try:
            record = parse_json(path.read_text())
            if not isinstance(record, dict):
                raise ValueError("no JSON object")
            if record.pop("format") not in READABLE:
                raise ValueError("it is of another format; update parlance or train again")
            del record["specials"]
            stamp = record.pop("codec")
            stamp["codebook_sizes"] = tuple(stamp["codebook_sizes"])
            stamp = CodecStamp(**stamp)
            stamp.check()
            return from_json(cls, {**record, "codec": stamp})
        except DAMAGE as error:
            raise ValueError(
                f"{path}: not a vocabulary map: {error}; copy the voice again"
            ) from error


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, without special tokens."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
    return encoded["input_ids"]


def extend(lm: Any, vocabulary: Vocabulary, seed: int, scale: float = 1.0) -> None:
    """Adds the vocabulary's new rows to a causal LM, in place, before any engine wraps it.

    New rows are normal random numbers with the mean of the LLM's text rows and scale**2 times their
    covariance, seeded. Old rows keep ids and values bit for bit. A tied head stays
    tied; an untied one is extended from its own rows.

    Where the tokenizer has more tokens than the table has rows, the table first grows to the
    tokenizer's size: those rows are not trained or saved with adapters, and are the same for every
    `seed` and `scale`.
    """
    embedding = lm.get_input_embeddings()
    head = lm.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    num_rows = embedding.weight.shape[0]
    rows_before = min(num_rows, vocabulary.num_text)
    lm.resize_token_embeddings(vocabulary.size, mean_resizing=False)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if tied != (head.weight is embedding.weight):
        raise RuntimeError("resizing changed whether the head is tied to the embeddings")
    generator = torch.Generator().manual_seed(seed)
    first = vocabulary.text_size
    fixed = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for table in [embedding] if tied else [embedding, head]:
            if rows_before < vocabulary.num_text:  # text_size is the tokenizer's size then.
                rows = table.weight[:rows_before]
                table.weight[rows_before:first] = _draw_rows(rows, first - rows_before, 1.0, fixed)
            count = vocabulary.size - first
            table.weight[first:] = _draw_rows(table.weight[:rows_before], count, scale, generator)
        if not tied and getattr(head, "bias", None) is not None:
            head.bias[min(first, num_rows) :] = head.bias[:rows_before].mean()


def _draw_rows(
    old: Float[Tensor, "V D"], count: int, scale: float, generator: torch.Generator
) -> Float[Tensor, "N D"]:
    """Normal rows with the mean and covariance of `old`, which is read in chunks."""
    num_rows, width = old.shape
    mean = torch.zeros(width, dtype=torch.float64)
    for chunk in old.split(8192):
        mean += chunk.double().cpu().sum(0) / num_rows
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for chunk in old.split(8192):
        centered = chunk.double().cpu() - mean
        covariance += centered.T @ centered / num_rows
    # With fewer rows than features, or constant features, the covariance is singular: a millionth
    # of the mean variance on the diagonal makes it positive definite.
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean() + 1e-30)
    factor = torch.linalg.cholesky(covariance)
    noise = torch.randn(count, width, dtype=torch.float64, generator=generator)
    return (mean + scale * noise @ factor.T).to(old)


def row_parameters(lm: nn.Module, rows: Sequence[int]) -> dict[str, list[int]]:
    """For peft's `trainable_token_indices`: `rows` of embedding and LM head, by module name.

    A tied head is left out. Raises ValueError for a head with a bias.
    """
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()  # type: ignore[operator]
    tables = [embedding] if head.weight is embedding.weight else [embedding, head]
    if getattr(head, "bias", None) is not None and len(tables) == 2:
        raise ValueError(
            "the head of this LLM has a bias, which the adapter cannot extend; "
            "use full fine-tuning (ar.lora=null)"
        )
    names = {id(module): name for name, module in lm.named_modules()}
    return {names[id(table)]: list(rows) for table in tables}
