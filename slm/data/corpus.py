"""Training data: the usable utterances of token shards, and pieces of plain texts."""

import gzip
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from codec.json_lines import decode_utf8, read_json_lines
from codec.program import counted
from codec.tokens import TokenShard
from codec.transcripts import has_words, lowercase_if_all_caps

logger = logging.getLogger(__name__)

NUM_LISTED = 20
"""Maximum number of skipped items that the log names."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Usable utterances of a shard: those with words and frames, and not too long."""

    shard: TokenShard
    items: Int[np.ndarray, " N"]
    """Their rows in the shard."""
    word_boundaries: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Frames between the words of `text.split()`, by utterance id: one more than words, from 0 to
    the number of frames. Not of all utterances."""

    @property
    def num_frames(self) -> Int[np.ndarray, " N"]:
        """Frames of each item."""
        return self.shard.num_frames[self.items]

    @property
    def texts(self) -> list[str]:
        """Transcripts; those all in capitals in lower case."""
        return [lowercase_if_all_caps(self.shard.texts[i]) for i in self.items]

    def boundaries_of(self, item: int | np.integer) -> Sequence[int] | None:
        """Word boundaries of an item, in frames; None: not known."""
        return self.word_boundaries.get(self.shard.ids[int(self.items[item])])

    def codes(self, item: int | np.integer) -> Int[np.ndarray, "Q T"]:
        """Codes of an item, all codebooks."""
        return self.shard[int(self.items[item])].codes.astype(np.int64)


class Ragged:
    """Integer rows of different lengths in two arrays: less memory than lists of lists."""

    def __init__(self, rows: Iterable[Sequence[int] | np.ndarray], dtype: type = np.int32):
        parts = [np.asarray(row, dtype) for row in rows]
        self.lengths = np.array([len(part) for part in parts], dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        self._values = np.concatenate(parts) if parts else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int | np.integer) -> np.ndarray:
        return self._values[self._ends[row] - self.lengths[row] : self._ends[row]]


def usable(shard: TokenShard, limit: int | None = None) -> Corpus:
    """The items with words and frames; the others are counted and named in the log.

    Args:
        limit: keep the first N usable items; None: all.

    Raises:
        ValueError: no usable item, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; null takes all items")
    empty = np.array([not has_words(text) for text in shard.texts], dtype=bool)
    reasons = {"without words": empty, "without frames": ~empty & (shard.num_frames == 0)}
    keep = np.ones(len(shard), dtype=bool)
    for reason, mask in reasons.items():
        keep &= ~mask
        log_skipped(shard, np.flatnonzero(mask), reason)
    items = np.flatnonzero(keep)[:limit]
    if not items.size:
        raise ValueError(f"{name_of(shard)}: no item has words and frames; export other tokens")
    return Corpus(shard, items)


def within(corpus: Corpus, lengths: Int[np.ndarray, " N"], longest: int) -> Corpus:
    """The items of at most `longest` positions; the others are counted and named in the log.

    Raises:
        ValueError: no item is left.
    """
    keep = lengths <= longest
    log_skipped(corpus.shard, corpus.items[~keep], f"longer than {longest} positions")
    if not keep.any():
        raise ValueError(
            f"{name_of(corpus.shard)}: no item has at most {longest} positions, the minimum of "
            "batch.positions, batch.packed and the LLM's context length; raise that, or export "
            "other tokens"
        )
    return replace(corpus, items=corpus.items[keep])


def log_skipped(shard: TokenShard, rows: Int[np.ndarray, " N"], reason: str) -> None:
    """Logs a warning with the number of skipped rows and the ids of the first NUM_LISTED."""
    if rows.size:
        ids = [shard.ids[i] for i in rows]
        tail = " ..." if len(ids) > NUM_LISTED else ""
        logger.warning(
            "%s: skipped %s %s: %s%s",
            name_of(shard), counted(len(ids), "item"), reason, ", ".join(ids[:NUM_LISTED]), tail,
        )  # fmt: skip


def name_of(shard: TokenShard) -> str:
    """Name for messages: its file, or the folders of its files."""
    if len(shard.files) == 1:
        return str(shard.files[0])
    return " and ".join(dict.fromkeys(str(file.parent) for file in shard.files))


def read_texts(path: str | Path) -> list[str]:
    """Documents of a .txt (paragraphs between blank lines) or .jsonl file (`text` of each line),
    gzipped or not.

    Raises:
        ValueError: another kind of file, a damaged one, or one without a text.
    """
    path = Path(path)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("txt", "jsonl") or not path.is_file():
        raise ValueError(f"{path}: no such .txt or .jsonl file (or .gz of one) of texts")
    try:
        found = [text for text in _documents(path, kind) if has_words(text)]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    if not found:
        raise ValueError(f"{path}: no text in it")
    return found


def _documents(path: Path, kind: str) -> Iterator[str]:
    if kind == "txt":
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = decode_utf8(file.read(), path)
        yield from (part.strip() for part in re.split(r"\n\s*\n", content.replace("\r\n", "\n")))
        return
    for number, record, _ in read_json_lines(path):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f"{path}, line {number}: no JSON object with a text")
        yield record["text"]


def pieces_of(
    documents: Iterable[Sequence[int]], end: int, longest: int
) -> Iterator[Int[np.ndarray, " _"]]:
    """Ids of documents, each with its end token, in pieces of 2 to `longest` ids.

    Raises:
        ValueError: `longest` is less than 2.
    """
    if longest < 2:
        raise ValueError(f"pieces of texts need at least 2 positions, not {longest}")
    for ids in documents:
        array = np.array([*ids, end], dtype=np.int32)
        # A last piece of one id would have no target: it gets one more from the piece before it.
        bounds = list(range(0, len(array), longest))
        if len(array) - bounds[-1] == 1 and len(bounds) > 1 and longest > 2:
            bounds[-1] -= 1
        pieces = (array[i:j] for i, j in zip(bounds, [*bounds[1:], len(array)], strict=True))
        yield from (piece for piece in pieces if len(piece) > 1)
