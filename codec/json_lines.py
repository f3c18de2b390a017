"""JSON Lines files: the reader and the writer of all lists, results and logs.

A line ends at "\\n" alone: U+2028, U+2029 and U+0085 are characters of strings. Files are UTF-8,
with or without a byte order mark; a name that ends with .gz is gzipped. Numbers are finite.
"""

import codecs
import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from codec.io import MAX_DEPTH, atomic_file, check_depth, lock_file, write_errors

MAX_LINE_BYTES = 2**26
"""A longer line is an error."""
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
"""Byte order marks of encodings other than UTF-8."""
# Other programs end lines at these too.
ESCAPES = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


class JsonLine(NamedTuple):
    """A line that is not blank."""

    number: int
    """In the file, from 1."""
    value: Any
    """None if it cannot be parsed."""
    error: str | None
    """Why it cannot be used; None: it can."""


def scan_json_lines(path: str | Path) -> Iterator[JsonLine]:
    """Yields the lines of a file that are not blank, also those that cannot be used.

    Raises:
        ValueError: the file is missing, damaged, or not UTF-8.
    """
    yield from _lines(path, _raw_lines(Path(path)))


def read_json_lines(path: str | Path) -> Iterator[JsonLine]:
    """Yields the lines of a file that are not blank.

    Raises:
        ValueError: as `scan_json_lines`, and for a line that is no JSON, has a number that is not
            finite, or half of a surrogate pair.
    """
    yield from _usable(path, _raw_lines(Path(path)))


def read_appended(path: str | Path, *, strict: bool = True) -> list[JsonLine]:
    """Returns the lines of a file of `append_json_lines`, without a last line that is incomplete;
    none if there is no file.

    Args:
        strict: False leaves out lines that cannot be used.

    Raises:
        ValueError: as `read_json_lines`.
    """
    path = Path(path)
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size = _complete_size(file)
        file.seek(0)
        content = file.read(size)
    lines = enumerate(content.split(b"\n"), start=1)
    if strict:
        return list(_usable(path, lines))
    return [line for line in _lines(path, lines) if line.error is None]


def append_json_lines(path: str | Path, records: Iterable[Any], *, sync: bool = True) -> None:
    """Appends a line per record in one write; removes a last line that is incomplete first.

    Args:
        sync: wait until the lines are on the disk.

    Raises:
        ValueError: the file is a symbolic link that leads out of its folder.
        WriteError: the disk is full.
    """
    path = Path(path)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent)):
        raise ValueError(f"{path}: a symbolic link that leads out of its folder; remove it")
    added = "".join(f"{to_json_line(record)}\n" for record in records).encode()
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, added, sync)


def _append(path: Path, added: bytes, sync: bool) -> None:
    with open(path, "a+b") as file:
        lock_file(file.fileno(), wait=True)
        file.truncate(_complete_size(file))
        file.write(added)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def write_json_lines(path: str | Path, records: Iterable[Any]) -> None:
    """Writes a line per record, atomically."""
    path = Path(path)
    with atomic_file(path) as temporary, open(temporary, "wb") as plain:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=plain, mtime=0) as file:
                file.writelines(f"{to_json_line(record)}\n".encode() for record in records)
        else:
            plain.writelines(f"{to_json_line(record)}\n".encode() for record in records)


def to_json_line(record: Any) -> str:
    """Returns a record as JSON, without the line end: numbers that are not finite are null, and
    half of a surrogate pair is an escape."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)
    return text.translate(ESCAPES).encode("utf-8", "backslashreplace").decode()


def decode_utf8(content: bytes, path: str | Path, line: int = 1) -> str:
    """Returns a text without its byte order mark.

    Args:
        path: of the file, for the message.
        line: number of the first line of `content`.

    Raises:
        ValueError: it is not UTF-8.
    """
    convert = "convert it to UTF-8: iconv -f {} -t UTF-8 OLD > NEW"
    for mark, name in ENCODINGS:
        if content.startswith(mark):
            raise ValueError(f"{path}: is {name}, not UTF-8; {convert.format(name)}")
    if (zero := content.find(b"\0")) >= 0:
        number = line + content.count(b"\n", 0, zero)
        raise ValueError(
            f"{path}: is no text in UTF-8 (a zero byte in line {number}); if it is UTF-16, "
            f"{convert.format('UTF-16LE')}"
        )
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        content, start = error.object, error.start  # Without the mark.
        number = line + content.count(b"\n", 0, start)
        raise ValueError(
            f"{path}: is not UTF-8 (byte 0x{content[start]:02x} in line {number}); if it is "
            f"Latin-1, {convert.format('LATIN1')}"
        ) from None


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
            for number, raw in enumerate(lines, start=1):
                if len(raw) > MAX_LINE_BYTES:
                    raise ValueError(
                        f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB; is it a "
                        "JSON Lines file?"
                    )
                yield number, raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged ({error}); copy it again") from error


def _lines(path: str | Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[JsonLine]:
    for number, raw in lines:
        text = decode_utf8(raw, path, number)
        if text.strip():
            yield _parsed(number, text)


def _usable(path: str | Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[JsonLine]:
    for line in _lines(path, lines):
        if line.error is not None:
            raise ValueError(f"{path}, line {line.number}: {line.error}")
        yield line


def _parsed(number: int, text: str) -> JsonLine:
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite_float)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            check_depth(value)
    except RecursionError:
        return JsonLine(number, None, "no JSON (nested too deeply)")
    except ValueError as error:
        return JsonLine(number, None, f"no JSON ({error})")
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            return JsonLine(number, value, f"has half of a surrogate pair ({half})")
    return JsonLine(number, value, None)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is too large")
    return number


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _complete_size(file: IO[bytes]) -> int:
    """Bytes up to the last line end."""
    stop = file.seek(0, os.SEEK_END)
    while stop:
        start = max(0, stop - 2**16)
        file.seek(start)
        end = file.read(stop - start).rfind(b"\n")
        if end >= 0:
            return start + end + 1
        stop = start
    return 0
