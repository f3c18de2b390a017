"""rows.jsonl: the file of rows of scores. Names that all programs use which write or read it."""

from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from codec.json_lines import append_json_lines, read_appended
from eval.benchmark import Row

CLIPS = "clips.jsonl"
"""Texts, transcripts and waves of all scored utterances, next to rows.jsonl."""
ORIGINAL = "original"
"""The system of the recordings themselves: the judges' own errors."""


def append_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Appends rows to a rows.jsonl."""
    append_json_lines(path, map(asdict, rows))


def read_rows(path: str | Path) -> list[Row]:
    """Returns the rows of a rows.jsonl.

    Raises:
        ValueError: a line is no row.
    """
    known = {entry.name for entry in fields(Row)}
    rows: list[Row] = []
    for number, stored, _ in read_appended(path):
        where = f"{path}, line {number} is no row of scores"
        try:
            rows.append(
                Row(**{name: stored[name] for name in known if name in stored or name != "part"})
            )
        except KeyError as error:
            raise ValueError(f"{where}: no {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
    return rows
