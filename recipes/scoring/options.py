"""Options that the parts of the benchmark share, and what follows from them."""

import argparse
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from codec.io import sha256_of
from codec.json_lines import read_appended, write_json_lines
from codec.program import counted
from codec.training.run import git_revision
from eval.benchmark import Embed, Provenance, Row, ScoredUtterance, rows_of, table
from recipes.lib.run import finished
from recipes.scoring.judges import Judges, load_judges
from recipes.scoring.lists import read_columns
from recipes.scoring.rows import CLIPS, ORIGINAL, append_rows, read_rows

T = TypeVar("T")


class Named(NamedTuple):
    """A value of the command line and its name: NAME=VALUE."""

    name: str
    value: str


def named(argument: str) -> Named:
    """Returns the parts of NAME=VALUE. A value alone is named after its last path component without
    its suffix."""
    name, equals, value = argument.partition("=")
    if equals and name and "/" not in name and not Path(argument).exists():
        return Named(name, value)
    return Named(list_name_of(Path(argument)) or argument, argument)


def list_name_of(path: Path) -> str:
    """Returns the name of a list, or of a folder."""
    return re.sub(r"\.(jsonl(\.gz)?|parquet)$", "", path.name)


def named_command(argument: str) -> Named:
    """Returns the parts of NAME=COMMAND. A command alone is named after its program."""
    name, equals, command = argument.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", name):
        return Named(name, command)
    return Named(Path((argument.split() or [""])[0]).name, argument)


def sample_options() -> argparse.ArgumentParser:
    """Returns the options of every part that scores lists."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for rows.jsonl, clips.jsonl and waves")
    add("--limit", type=int, metavar="N", help="score only the first N items of each list")
    add("--sample", type=int, metavar="N", help="score N random items of each list (see --seed)")
    add("--seed", type=int, default=0, help="of all that is random (default: 0)")
    add("--language", default="en", help="of the texts (default: en)")
    add(
        "--by", action="append", default=[], metavar="COLUMN",
        help="a row for each value of a column of the list too, such as sex; repeatable",
    )  # fmt: skip
    add("--columns", type=Path, help="JSON Lines with id and more columns for --by")
    return parser


def list_options() -> argparse.ArgumentParser:
    """Returns the options of the parts whose systems make waves or transcripts."""
    parser = argparse.ArgumentParser(add_help=False, parents=[sample_options()])
    add = parser.add_argument
    add("--name", help="name of the system in the rows, where there is one")
    add(
        "--processes", type=int, default=1,
        help="processes that score, each with its own models (default: 1)",
    )  # fmt: skip
    return parser


def judge_options() -> argparse.ArgumentParser:
    """Returns the options of the models that score."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--judge", help="ASR: Whisper folder (CTranslate2), or transformers folder or hub id")
    add("--speaker", help="speaker encoder: folder or hub id (default: no similarity)")
    add("--threads", type=int, help="of each process (default: the cores' share)")
    return parser


def add_list_sources(add: Callable[..., Any], what: str) -> None:
    """Adds `--list` and what belongs to it.

    Args:
        add: a parser's `add_argument`.
        what: content of the lists.
    """
    add(
        "--list", action="append", default=[], metavar="[SYSTEM=]LIST", dest="lists",
        help=f"{what}; repeatable",
    )  # fmt: skip
    add("--list-name", help="name of the lists in the rows (default: the file's)")
    add("--model-digest", default="", help="digest of the system of --list")


def check_sources(args: argparse.Namespace, inputs: str, makers: Sequence[str]) -> None:
    """Raises ValueError unless there are lists, or inputs and systems that make something of them.

    One --voice may name the system of one --list.

    Args:
        inputs: option of the inputs.
        makers: options of systems.
    """
    names = ", ".join(f"--{maker}" for maker in makers)
    used = {maker: len(getattr(args, maker)) for maker in makers if getattr(args, maker)}
    if bool(args.lists) == (getattr(args, inputs) is not None):
        raise ValueError(f"give --list, or --{inputs} and a system ({names})")
    if not args.lists and not used:
        raise ValueError(f"--{inputs} needs a system: {names}")
    is_digest = used == {"voice": 1} and len(args.lists) == 1
    if args.lists and used and not is_digest:
        raise ValueError(f"--{next(iter(used))} is a system for --{inputs}, not for --list")
    if args.name is not None and max(len(args.lists), sum(used.values())) > 1:
        raise ValueError("--name names one system; write SYSTEM=... for several")


def check_distinct(names: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError if a list has two systems of one name.

    Args:
        names: of systems and their lists.
    """
    seen: set[tuple[str, str]] = set()
    for system, list_name in names:
        if (system, list_name) in seen or system == ORIGINAL:
            raise ValueError(f"two systems of {list_name} are called {system}; write SYSTEM=...")
        seen.add((system, list_name))


def add_measures(add: Callable[..., Any], names: Sequence[str]) -> None:
    """Adds `--measures`, those of waves, besides words and speakers.

    Args:
        add: a parser's `add_argument`.
        names: those that there are, which are the default.
    """
    add(
        "--measures", nargs="*", choices=names, default=list(names), metavar="MEASURE",
        help=f"measures of waves (default: all): {', '.join(names)}",
    )  # fmt: skip


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that is out of range."""
    for option in ("limit", "sample", "processes", "threads"):
        value = getattr(args, option, None)
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    if args.limit is not None and args.sample is not None:
        raise ValueError("--limit and --sample: give one of them")
    if getattr(args, "threads", 1) is None:
        args.threads = max(1, (os.cpu_count() or 1) // getattr(args, "processes", 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeOptions:
    """The models that score, not loaded yet."""

    judge: str | None
    speaker: str | None
    threads: int
    language: str

    @classmethod
    def of(cls, args: argparse.Namespace) -> "JudgeOptions":
        """Returns those of the command line."""
        return cls(
            judge=args.judge, speaker=args.speaker, threads=args.threads, language=args.language
        )

    def load(self) -> Judges:
        """Returns the models, and sets the number of threads of torch.

        Raises:
            ValueError: one cannot be loaded.
        """
        import torch

        torch.set_num_threads(self.threads)
        judges = load_judges(
            self.judge, self.speaker, num_threads=self.threads, language=self.language
        )
        return judges if judges.embed is None else judges._replace(embed=remembered(judges.embed))


NUM_REMEMBERED = 512
"""Embeddings of `remembered`."""


def remembered(embed: Embed) -> Embed:
    """Returns a function that embeds a wave once: prompts and originals come several times."""
    known: dict[str, np.ndarray] = {}

    def once(wave: np.ndarray, sample_rate: int) -> np.ndarray:
        key = f"{sample_rate} {sha256_of(wave.tobytes())}"
        if key not in known:
            if len(known) == NUM_REMEMBERED:
                del known[next(iter(known))]
            known[key] = embed(wave, sample_rate)
        return known[key]

    return once


def chosen(items: Sequence[T], args: argparse.Namespace) -> list[T]:
    """Returns the items of --limit or --sample, in the list's order."""
    if args.sample is None or args.sample >= len(items):
        return list(items[: args.limit])
    places = random.Random(args.seed).sample(range(len(items)), args.sample)
    return [items[place] for place in sorted(places)]


class Columns:
    """Values of the columns of --by."""

    def __init__(self, args: argparse.Namespace):
        """
        Raises:
            ValueError: --columns is no such list.
        """
        self.names: list[str] = list(dict.fromkeys(args.by))
        self._more = read_columns(args.columns) if args.columns is not None else {}

    def of(
        self, scored: Sequence[ScoredUtterance], entries: Mapping[str, Mapping[str, Any]],
        list_name: str,
    ) -> dict[str, dict[str, str]]:  # fmt: skip
        """Returns the columns of each utterance; all have `length` (see `length_group`).

        Args:
            entries: the list's own columns by utterance.

        Raises:
            ValueError: no utterance has a column.
        """
        found: dict[str, dict[str, str]] = {}
        for one in scored:
            known = {"length": length_group(one), **entries[one.id], **self._more.get(one.id, {})}
            found[one.id] = {
                name: str(known[name]) for name in self.names if known.get(name) not in (None, "")
            }
        for name in self.names:
            if not any(name in columns for columns in found.values()):
                raise ValueError(
                    f"--by {name}: no item of {list_name} has this column; --columns names a list "
                    "of id and columns"
                )
        return found


LENGTHS = (3, 10, 25, 75)
"""Limits in words of the groups of the column `length`; 75 words take about 30 s."""


def length_group(scored: ScoredUtterance) -> str:
    """Returns the group of the reference's number of words (of characters, in scripts without
    spaces), such as `4-10 words`."""
    count = len(scored.text.split()) if scored.words is None else scored.words.num_words
    low = 1
    for high in LENGTHS:
        if count <= high:
            return f"{low}-{high} words"
        low = high + 1
    return f"{low} words or more"


def origin_of(
    args: argparse.Namespace, part: str, system: str, inputs: Iterable[Path],
    judges: Judges | None = None, model: str = "", seed: int = 0, **options: Any,
) -> Provenance:  # fmt: skip
    """Returns the provenance of the rows of a system.

    Args:
        inputs: lists that were scored; the configuration's digest is of them and the options.
        model: digest of the system.
        options: settings of the part.
    """
    shared = {key: getattr(args, key) for key in ("limit", "sample", "language")}
    if args.sample is not None:
        shared["seed"] = args.seed
    settings = {
        "part": part, "lists": [sha256_of(path, 16) for path in inputs], **shared, **options
    }  # fmt: skip
    return Provenance(
        part=part,
        system=system,
        seed=seed,
        git=git_revision(),
        config=sha256_of(json.dumps(settings, sort_keys=True, default=str), 16),
        model=model,
        judge=judges.judge_name if judges else "",
        speaker=judges.speaker_name if judges else "",
        language=args.language,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredSystem:
    """A system's scores of a list."""

    list_name: str
    scored: Sequence[ScoredUtterance]
    origin: Provenance
    constants: Mapping[str, float]
    """Numbers of the system, such as its bit rate."""
    columns: Mapping[str, Mapping[str, str]]
    """Columns of each utterance."""
    references: Mapping[str, str | None]
    """Original, prompt or target recording of each utterance, absolute or relative to OUT."""
    prefix: str = ""
    """Of the word metrics (eval.benchmark.ASR_PREFIX)."""

    def rows(self) -> list[Row]:
        """Returns the rows of the utterances, of the list, and of each group of its columns."""
        rows = rows_of(self.list_name, self.scored, self.origin, self.constants, self.prefix)
        names = dict.fromkeys(name for columns in self.columns.values() for name in columns)
        for name in names:
            groups: dict[str, list[ScoredUtterance]] = {}
            for one in self.scored:
                value = self.columns.get(one.id, {}).get(name)
                if value is not None:
                    groups.setdefault(value, []).append(one)
            for value in sorted(groups, key=_natural):
                members = groups[value]
                label = f"{self.list_name}/{name}={value}"
                made = rows_of(label, members, self.origin, prefix=self.prefix)
                rows += [row for row in made if row.utterance is None]
        return rows

    def clips(self, out: Path, language: str) -> list[dict[str, Any]]:
        """Returns the lines of clips.jsonl; paths below `out` are relative to it.

        Args:
            language: of the texts, unless there is a column `language`.
        """

        def place(path: str | None) -> str | None:
            if path is None:
                return None
            root = out.resolve()
            where = (root / path).resolve()
            return where.relative_to(root).as_posix() if where.is_relative_to(root) else str(where)

        return [
            {
                "part": self.origin.part,
                "list": self.list_name,
                "system": self.origin.system,
                "id": one.id,
                "text": one.text or None,
                "transcript": one.transcript or None,
                "audio": place(one.audio),
                "failure": one.failure,
                "reference_audio": place(self.references.get(one.id)),
                "columns": {"language": language, **self.columns.get(one.id, {})},
            }
            for one in self.scored
        ]


def _natural(value: str) -> list[tuple[int, str]]:
    """Sorts numbers within texts by their value: `4-10 words` before `11-25 words`."""
    return [(int(part or 0), "") if part.isdecimal() else (0, part)
            for part in re.split(r"(\d+)", value)]  # fmt: skip


def write_scores(part: str, args: argparse.Namespace, systems: Sequence[ScoredSystem]) -> None:
    """Writes OUT/rows.jsonl and OUT/clips.jsonl, and prints the table."""
    report_rows(part, args.out, [row for system in systems for row in system.rows()])
    write_clips(args, systems)


def write_clips(args: argparse.Namespace, systems: Sequence[ScoredSystem]) -> None:
    """Writes OUT/clips.jsonl, in which the clips of systems and lists that were scored before are
    replaced."""
    new = [clip for system in systems for clip in system.clips(args.out, args.language)]

    def key(clip: Mapping[str, Any]) -> tuple[Any, ...]:
        return (clip["part"], clip["list"], clip["system"])

    scored = {key(clip) for clip in new}
    before = [line.value for line in read_appended(args.out / CLIPS)]
    write_json_lines(args.out / CLIPS, [clip for clip in before if key(clip) not in scored] + new)


def report_rows(
    part: str, out: Path, rows: Iterable[Row], columns: Sequence[str] | None = None
) -> None:
    """Appends new rows to OUT/rows.jsonl, and prints the table of `rows`.

    Args:
        columns: metrics of the table (default: all).
    """
    new = list(rows)
    known = set(read_rows(out / "rows.jsonl"))
    append_rows(out / "rows.jsonl", [row for row in new if row not in known])
    present = {row.metric for row in new}
    print(table(new, columns and [one for one in columns if one in present]))
    again = (
        f"python recipes/benchmark.py {part} ... --out {out}   (adds the scores of another system)"
    )
    finished(f"scores of {counted(len(new), 'row')}", out / "rows.jsonl", again)
