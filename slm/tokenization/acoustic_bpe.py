"""Acoustic BPE: SentencePiece BPE over codes of codebook 1.

Pieces 0 .. K-1 are the codes; K .. K+M-1 are merges of several. For SentencePiece a code is a
character of Unicode's private planes, which it does not normalize or split.
"""

import base64
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from codec.io import DAMAGE, atomic_file, parse_json, sha256_of
from codec.program import reason_of
from codec.tokens import CodecStamp

FORMAT_VERSION = 1
MAX_CODEBOOK_SIZE = 65_536
FIRST_CHARACTER = 0xF0000
PLANE_SIZE = 0xFFFE
"""The last two code points of a plane are no characters."""
TRAINING_CODES = 512
"""Maximum codes of a training sequence; longer utterances are split."""
ENCODING_CODES = 8192
"""Longer sequences are encoded in parts, which bounds the memory."""
PIECE_CODES = 32
"""Maximum codes of a merge."""


class Trained(NamedTuple):
    """Provenance of a model, in its file."""

    codec: CodecStamp
    remove_runs: bool
    """Repetitions of a code are removed before encoding: durations are lost."""


class AcousticBPE:
    """A BPE model over codes of codebook 1, made by `train` or `load`."""

    def __init__(self, model: bytes, trained: Trained):
        import sentencepiece

        self._model, self.trained = model, trained
        self.codebook_size = trained.codec.codebook_sizes[0]
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        names = [self._processor.IdToPiece(index) for index in range(len(self._processor))]
        # Ids of SentencePiece: unknown, merges in the order they were found, single codes.
        expanded = [_codes(name) for name in names[1:]]
        merges = [codes for codes in expanded if len(codes) > 1]
        self._expanded = [*np.arange(self.codebook_size)[:, None], *merges]
        singles = {int(codes[0]) for codes in expanded if len(codes) == 1}
        if singles != set(range(self.codebook_size)):
            raise ValueError(f"its single pieces are not the {self.codebook_size} codes")
        self._piece_of = np.full(len(names), -1, dtype=np.int64)
        number = self.codebook_size
        for index, codes in enumerate(expanded, start=1):
            self._piece_of[index] = codes[0] if len(codes) == 1 else number
            number += len(codes) > 1

    @classmethod
    def train(
        cls,
        sequences: Iterable[Integer[np.ndarray, " _"]],
        codec: CodecStamp,
        size: int,
        remove_runs: bool = False,
    ) -> "AcousticBPE":
        """Trains up to `size` merges on codes of `codec`; every code of the codebook is a piece.

        Raises:
            ValueError: no codes, codes out of range, or a codebook that is too large.
        """
        import sentencepiece

        codebook_size = codec.codebook_sizes[0]
        if codebook_size > MAX_CODEBOOK_SIZE:
            raise ValueError(f"codebook 1 has {codebook_size} entries, {MAX_CODEBOOK_SIZE} at most")
        if size < 0:
            raise ValueError(f"the number of merges must not be negative, got {size}")
        texts = _sentences(sequences, codebook_size, remove_runs)
        first = next(texts, None)
        if first is None:
            raise ValueError("there are no codes to train acoustic BPE on")
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.Train(
            # Sentences of one code add all codes to the vocabulary.
            sentence_iterator=chain(_text(np.arange(codebook_size)), [first], texts),
            model_writer=written,
            model_type="bpe",
            vocab_size=1 + codebook_size + size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            byte_fallback=False,
            max_sentence_length=4 * TRAINING_CODES + 4,
            max_sentencepiece_length=PIECE_CODES,
            unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )  # fmt: skip
        return cls(written.getvalue(), Trained(codec, remove_runs))

    @property
    def remove_runs(self) -> bool:
        """Whether repetitions of a code are removed before encoding."""
        return self.trained.remove_runs

    @property
    def num_merges(self) -> int:
        """Number of pieces of several codes."""
        return len(self._expanded) - self.codebook_size

    @cached_property
    def digest(self) -> str:
        """16 hex digits over the model and its provenance."""
        about = json.dumps([self.trained.codec.digest, self.remove_runs])
        return sha256_of(about.encode() + self._model, 16)

    @cached_property
    def lengths(self) -> Int[np.ndarray, " P"]:
        """Number of codes of each piece."""
        return np.array([len(codes) for codes in self._expanded], dtype=np.int64)

    def encode(self, codes: Integer[np.ndarray, " T"]) -> Int[np.ndarray, " N"]:
        """Codes of codebook 1 to pieces. Raises ValueError for a code out of range."""
        codes = np.asarray(codes, dtype=np.int64)
        _check_codes(codes, self.codebook_size)
        if self.remove_runs:
            codes = without_runs(codes)
        parts = []
        for start in range(0, len(codes), ENCODING_CODES):
            ids = self._processor.EncodeAsIds(_text(codes[start : start + ENCODING_CODES]))
            parts.append(self._piece_of[np.asarray(ids, dtype=np.int64)])
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def decode(self, pieces: Sequence[int] | Int[np.ndarray, " N"]) -> Int[np.ndarray, " T"]:
        """Pieces to codes, without removed repetitions. Raises ValueError for an unknown piece."""
        pieces = np.asarray(pieces, dtype=np.int64)
        outside = pieces[(pieces < 0) | (pieces >= len(self._expanded))]
        if outside.size:
            raise ValueError(f"there is no piece {outside[0]} among {len(self._expanded)}")
        if not pieces.size:
            return np.zeros(0, dtype=np.int64)
        return np.concatenate([self._expanded[piece] for piece in pieces])

    def check_codec(self, codec: CodecStamp, what: str = "the acoustic BPE model") -> None:
        """Raises ValueError unless the model was trained on this codec's codes."""
        known = self.trained.codec
        if codec.digest != known.digest:
            raise ValueError(
                f"{what}: trained on codes of {known.id} ({known.digest}), but these are of "
                f"{codec.id} ({codec.digest}); train a model on them (recipes/train_units.py)"
            )

    def save(self, path: str | Path) -> None:
        """Writes one JSON file, atomically."""
        record = {
            "format": FORMAT_VERSION,
            "codec": asdict(self.trained.codec),
            "remove_runs": self.remove_runs,
            "num_merges": self.num_merges,
            "sentencepiece": base64.b64encode(self._model).decode(),
        }
        with atomic_file(Path(path)) as temporary:
            temporary.write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "AcousticBPE":
        """A model written by `save`. Raises ValueError for a missing or damaged file."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"{path}: no such acoustic BPE model; recipes/train_units.py makes one"
            )
        try:
            record = parse_json(path.read_text())
            if record["format"] != FORMAT_VERSION:
                raise ValueError("it is of another format; update parlance or train again")
            stamp = record["codec"]
            stamp["codebook_sizes"] = tuple(stamp["codebook_sizes"])
            codec = CodecStamp(**stamp)
            codec.check()
            trained = Trained(codec, bool(record["remove_runs"]))
            return cls(base64.b64decode(record["sentencepiece"], validate=True), trained)
        except (*DAMAGE, RuntimeError) as error:
            raise ValueError(
                f"{path}: not an acoustic BPE model (or a damaged one) ({reason_of(error)})"
            ) from error


def without_runs(codes: Int[np.ndarray, " T"]) -> Int[np.ndarray, " N"]:
    """Codes without repetitions of the one before."""
    return codes[np.diff(codes, prepend=-1) != 0]


def _sentences(
    sequences: Iterable[np.ndarray], codebook_size: int, remove_runs: bool
) -> Iterator[str]:
    for sequence in sequences:
        codes = np.asarray(sequence, dtype=np.int64)
        _check_codes(codes, codebook_size)
        codes = without_runs(codes) if remove_runs else codes
        for start in range(0, len(codes), TRAINING_CODES):
            yield _text(codes[start : start + TRAINING_CODES])


def _check_codes(codes: np.ndarray, codebook_size: int) -> None:
    outside = codes[(codes < 0) | (codes >= codebook_size)]
    if outside.size:
        raise ValueError(
            f"code {outside[0]} is outside codebook 1 of {codebook_size} entries; "
            "were these codes made by another codec?"
        )


def _text(codes: np.ndarray) -> str:
    numbers = FIRST_CHARACTER + codes + 2 * (codes >= PLANE_SIZE)
    return numbers.astype("<u4").tobytes().decode("utf-32-le")


def _codes(text: str) -> np.ndarray:
    numbers = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)
    codes = numbers - FIRST_CHARACTER
    return codes - 2 * (codes >= PLANE_SIZE + 2)
