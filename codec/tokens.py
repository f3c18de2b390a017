"""The token shard: codes of utterances in Parquet files, readable by any Parquet reader.

Columns: id, text, speaker, language, duration, num_frames, codes (row-major Q x T). The schema's
metadata identifies the codec of the codes. This file imports no torch.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from errno import EIO, EMFILE, ENFILE, ENOMEM, ESTALE, ETIMEDOUT
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from codec.io import DAMAGE, atomic_file, parse_json
from codec.program import reason_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT_VERSION = 1
ROWS_PER_GROUP = 64
"""Rows of a Parquet row group. Reading a row reads the codes of its group, less than a megabyte."""
NUM_READERS = 64
"""Files that a `TokenShard` keeps open; a process may have 1024 where nothing else is set."""
NO_DAMAGE = (EIO, EMFILE, ENFILE, ENOMEM, ESTALE, ETIMEDOUT)
"""Numbers of errors of the machine: the same file may be readable later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecStamp:
    """Identity and format of the codec that produced some codes and that decodes them."""

    id: str
    """The folder or hub id that the codec was loaded from, for messages."""
    digest: str
    """The first 16 hex digits of the SHA-256 of its weights: equal for equal codecs."""
    sample_rate: int
    """Hz."""
    frame_rate: float
    """Frames per second."""
    num_codebooks: int
    """Q."""
    codebook_sizes: tuple[int, ...]
    """K of every codebook."""

    def check(self) -> None:
        """Raises `ValueError` for values that no codec has, such as those of a damaged shard."""
        sizes = self.codebook_sizes
        texts = isinstance(self.id, str) and isinstance(self.digest, str)
        counts = all(type(each) is int and each > 0 for each in (self.sample_rate, *sizes))
        rate = type(self.frame_rate) in (int, float) and 0 < self.frame_rate < float("inf")
        if not (texts and counts and rate) or not 0 < len(sizes) == self.num_codebooks:
            raise ValueError(f"the codec's facts are not as expected: {self}")
        if max(sizes) > 2**16:
            raise ValueError(f"a codebook has {max(sizes)} entries; a shard holds up to {2**16}")


class DamagedShard(ValueError):
    """A shard is truncated or corrupted."""


class TokenRow(NamedTuple):
    """One utterance; text, speaker and language may be empty."""

    id: str
    text: str
    speaker: str
    language: str
    duration: float
    """Seconds."""
    codes: Integer[np.ndarray, "Q T"]
    """uint16 when read from a shard."""

    @property
    def num_frames(self) -> int:
        """T."""
        return self.codes.shape[1]


def write_shard(
    path: str | Path,
    rows: Iterable[TokenRow],
    stamp: CodecStamp,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes one shard, atomically.

    Args:
        notes: further strings for the metadata.

    Raises:
        ValueError: codes that `stamp`'s codec cannot have made, or an id that occurs twice.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    seen: set[str] = set()
    schema = _schema(stamp, notes or {})
    with (
        atomic_file(path) as temporary,
        pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer,
    ):
        for group in _groups(rows):
            for row in group:
                _check_row(row, stamp)
                if row.id in seen:
                    raise ValueError(f"{path}: the id {row.id!r} occurs twice; ids must be unique")
                seen.add(row.id)
            writer.write_batch(_record_batch(group, schema))


class TokenShard:
    """One shard, or a folder of them opened as one: a sequence of `TokenRow`.

    Codes are read on access; the other columns are attributes: lists `ids`, `texts`, `speakers`,
    `languages`, and arrays (N,) `durations` in seconds and `num_frames`. A shard may be passed to
    data-loading processes: each process opens the files itself.
    """

    def __init__(self, files: Sequence[Path], tables: Sequence["pa.Table"], stamp: CodecStamp):
        self.stamp = stamp
        self.files = tuple(files)
        self.ids: list[str] = _joined(tables, "id")
        self.texts: list[str] = _joined(tables, "text")
        self.speakers: list[str] = _joined(tables, "speaker")
        self.languages: list[str] = _joined(tables, "language")
        self.durations = np.array(_joined(tables, "duration"), dtype=np.float64)
        self.num_frames = np.array(_joined(tables, "num_frames"), dtype=np.int64)
        self._file_starts = np.cumsum([0, *(table.num_rows for table in tables)])
        self._readers: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._group: tuple[tuple[int, int, int], Any] | None = None

    @classmethod
    def open(
        cls, path: str | Path | Sequence[str | Path], expect: CodecStamp | None = None
    ) -> "TokenShard":
        """Opens a .parquet file, a folder of them in the order of their names, or several of these.

        Args:
            expect: the codec that must have produced the codes; None: any.

        Raises:
            ValueError: a file is missing, of a later format or of another codec than the others or
                `expect`, or an id occurs twice.
            DamagedShard: a file is corrupted (a ValueError).
        """
        paths = [path] if isinstance(path, str | Path) else list(path)
        files = [file for each in paths for file in _shard_files(Path(each))]
        if not files:
            raise ValueError("no token shard is named; name a .parquet file or a folder of them")
        path = " and ".join(map(str, paths))
        opened = [_open_file(file) for file in files]
        stamp = opened[0][0]
        for file, (other, _) in zip(files, opened, strict=True):
            if other.digest != stamp.digest:
                raise ValueError(
                    f"{file}: made by codec {_name(other)}, but {files[0]} by {_name(stamp)}; "
                    "only one codec's shards go together: export or cut the other ones again"
                )
        if expect is not None and expect.digest != stamp.digest:
            raise ValueError(
                f"{path}: made by codec {_name(stamp)}, but codec {_name(expect)} is in use; "
                "export the tokens again with it, or pass the codec that made them"
            )
        shard = cls(files, [table for _, table in opened], stamp)
        if len(set(shard.ids)) < len(shard):
            seen: set[str] = set()
            twice = next(name for name in shard.ids if name in seen or seen.add(name))
            raise ValueError(f"{path}: the id {twice!r} occurs twice; ids must be unique")
        return shard

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> TokenRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        file = int(np.searchsorted(self._file_starts, index, side="right")) - 1
        flat = self._codes(file, index - int(self._file_starts[file]))
        self._check_codes(file, index, flat)
        return TokenRow(
            id=self.ids[index],
            text=self.texts[index],
            speaker=self.speakers[index],
            language=self.languages[index],
            duration=float(self.durations[index]),
            codes=flat.reshape(self.stamp.num_codebooks, -1),
        )

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[index] for index in range(len(self)))

    def notes(self) -> list[dict[str, str]]:
        """The `notes` of `write_shard`, of each file."""
        return [read_notes(file) for file in self.files]

    def _check_codes(self, file: int, index: int, flat: np.ndarray) -> None:
        """Checks the number and range of codes, for files without checksums."""
        path, books = self.files[file], self.stamp.num_codebooks
        if flat.size != books * self.num_frames[index]:
            raise DamagedShard(
                f"{path}: {self.ids[index]!r} has {flat.size} codes, but {self.num_frames[index]} "
                f"frames of {books} codebooks; export it again"
            )
        if (flat.reshape(books, -1).max(axis=1, initial=0) >= self.stamp.codebook_sizes).any():
            raise DamagedShard(
                f"{path}: {self.ids[index]!r} has codes beyond the codebooks; export it again"
            )

    def _codes(self, file: int, row: int) -> np.ndarray:
        import pyarrow as pa

        # Two processes must not share a handle after a fork: they would move one file position.
        key = (os.getpid(), file)
        with _damage_named(self.files[file]):
            if key not in self._readers:
                while len(self._readers) >= NUM_READERS:
                    self._readers.popitem(last=False)[1].close()
                self._readers[key] = _reader(self.files[file])
            self._readers.move_to_end(key)
            reader = self._readers[key]
            group, row_in_group = _find_group(reader.metadata, row)
            if self._group is None or self._group[0] != (*key, group):
                read = reader.read_row_group(group, columns=["codes"])["codes"]
                column = read.cast(pa.list_(pa.uint16())).combine_chunks()
                if column.null_count or column.values.null_count:
                    raise ValueError("a code is not there")
                self._group = ((*key, group), column)
        values = self._group[1][row_in_group].values
        return values.to_numpy(zero_copy_only=False).astype(np.uint16, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict(), "_group": None}


def read_notes(path: str | Path) -> dict[str, str]:
    """The `notes` of `write_shard`, of one file.

    Raises:
        ValueError: the file is missing, corrupted or no token shard.
    """
    metadata = _read_metadata(Path(path))
    with _damage_named(Path(path)):
        return parse_json(metadata["notes"])


def _schema(stamp: CodecStamp, notes: Mapping[str, str]) -> "pa.Schema":
    import pyarrow as pa

    columns = [
        ("id", pa.string()),
        ("text", pa.string()),
        ("speaker", pa.string()),
        ("language", pa.string()),
        ("duration", pa.float64()),
        ("num_frames", pa.int32()),
        ("codes", pa.list_(pa.uint16())),
    ]
    metadata = {f"codec_{key}": json.dumps(value) for key, value in asdict(stamp).items()}
    metadata["format_version"] = str(FORMAT_VERSION)
    metadata["notes"] = json.dumps(dict(notes))
    return pa.schema(columns, metadata=metadata)


def _groups(rows: Iterable[TokenRow]) -> Iterator[list[TokenRow]]:
    group: list[TokenRow] = []
    for row in rows:
        group.append(row)
        if len(group) == ROWS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group


def _check_row(row: TokenRow, stamp: CodecStamp) -> None:
    if row.codes.ndim != 2 or row.codes.shape[0] != stamp.num_codebooks:
        raise ValueError(
            f"{row.id}: codes have shape {row.codes.shape}, "
            f"but codec {_name(stamp)} has {stamp.num_codebooks} codebooks"
        )
    if row.codes.shape[1] == 0:
        raise ValueError(f"{row.id}: no frames")
    for book, (codes, size) in enumerate(zip(row.codes, stamp.codebook_sizes, strict=True)):
        if codes.min() < 0 or codes.max() >= size:
            raise ValueError(
                f"{row.id}: codebook {book + 1} has {size} entries, but the codes range from "
                f"{codes.min()} to {codes.max()}"
            )


def _record_batch(rows: Sequence[TokenRow], schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    flat = [row.codes.astype(np.uint16).reshape(-1) for row in rows]
    ends = np.cumsum([0, *(len(codes) for codes in flat)])
    codes = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(np.concatenate(flat)))
    columns = [
        pa.array([getattr(row, field.name) for row in rows], field.type)
        for field in list(schema)[:-1]
    ]
    return pa.RecordBatch.from_arrays([*columns, codes], schema=schema)


def _shard_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise ValueError(f"{path}: no token shard (*.parquet) in this folder")
        return files
    if not path.exists():
        raise ValueError(f"{path}: no such token shard")
    return [path]


def _read_metadata(path: Path) -> dict[str, str]:
    """A shard file's metadata. Raises ValueError for an unknown format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        raw = pq.read_schema(path).metadata or {}
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeError) as error:
        _raise_no_damage(error, path)
        raise DamagedShard(
            f"{path}: corrupted token shard (truncated, or not Parquet); export it again"
        ) from error
    with _damage_named(path):
        metadata = {key.decode(): value.decode() for key, value in raw.items()}
    if "format_version" not in metadata or "codec_digest" not in metadata:
        raise ValueError(f"{path}: a Parquet file, but not a token shard; use `codec encode`")
    if not metadata["format_version"].isdecimal():
        raise DamagedShard(f"{path}: corrupted token shard (its format version); export it again")
    if int(metadata["format_version"]) > FORMAT_VERSION:
        raise ValueError(
            f"{path}: token format {metadata['format_version']}, but this version of parlance "
            f"reads up to {FORMAT_VERSION}; update parlance"
        )
    return metadata


def _open_file(path: Path) -> tuple[CodecStamp, "pa.Table"]:
    import pyarrow as pa

    metadata = _read_metadata(path)
    names = ["id", "text", "speaker", "language", "duration", "num_frames"]
    with _damage_named(path):
        values = {
            field.name: parse_json(metadata[f"codec_{field.name}"]) for field in fields(CodecStamp)
        }
        values["codebook_sizes"] = tuple(values["codebook_sizes"])
        with _reader(path) as reader:
            table = reader.read(columns=names)
            if table.column_names != names:
                raise KeyError("a column is not there")
        stamp = CodecStamp(**values)
        stamp.check()
        table = table.cast(pa.schema([_schema(stamp, {}).field(name) for name in names]))
        if any(table[name].null_count for name in names):
            raise ValueError("a value is not there")
        table.validate(full=True)  # Texts are UTF-8.
    return stamp, table


def _reader(path: Path) -> "pq.ParquetFile":
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, page_checksum_verification=True)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns the errors of reading a corrupted file into DamagedShard."""
    import pyarrow as pa

    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except (*DAMAGE, pa.ArrowException, RecursionError) as error:
        _raise_no_damage(error, path)
        reason = reason_of(error)
        raise DamagedShard(f"{path}: corrupted token shard ({reason}); export it again") from error


def _raise_no_damage(error: Exception, path: Path) -> None:
    """Raises OSError for an error of the machine."""
    number = error.errno if isinstance(error, OSError) else None
    if number is not None and number in NO_DAMAGE:
        remedy = "; start again after `ulimit -n 8192`" if number in (EMFILE, ENFILE) else ""
        raise OSError(f"{path}: cannot be read now ({os.strerror(number)}){remedy}") from error


def _joined(tables: Sequence["pa.Table"], column: str) -> list[Any]:
    return [value for table in tables for value in table[column].to_pylist()]


def _find_group(metadata: Any, row: int) -> tuple[int, int]:
    """The row group that holds a file's `row`, and the row's place in it."""
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if row < size:
            return group, row
        row -= size
    raise AssertionError("row beyond the file's end")


def _name(stamp: CodecStamp) -> str:
    return f"{stamp.id} ({stamp.digest})"
