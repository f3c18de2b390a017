"""Rows and clips of several OUT folders of benchmark.py, by part, list, measure and system."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codec.json_lines import read_appended
from eval.benchmark import ASR_PREFIX, WORD_METRICS, Row
from eval.metrics import MEASURES
from eval.stats import Sums
from recipes.scoring.rows import CLIPS, read_rows

ANCHOR = "anchor-3.5kHz"
"""The low anchor of MUSHRA."""


class Column(NamedTuple):
    """What may be compared: numbers of one measure on one list, scored in one way."""

    part: str
    list: str
    metric: str
    library: str
    """Libraries, their versions and the judge."""


class UtteranceScore(NamedTuple):
    """A score of an utterance; of several seeds the sums."""

    errors: float
    """Of a rate the errors, of a mean the score."""
    units: float
    """Of a rate the words (characters) of the reference, of a mean 1."""

    @property
    def value(self) -> float:
        """The rate or the mean; an empty reference counts as one unit."""
        return self.errors / max(1.0, self.units)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredClip:
    """A line of clips.jsonl: a recording of a system."""

    part: str
    list: str
    system: str
    id: str
    text: str | None
    """Reference."""
    transcript: str | None
    """Of the judge, or of the system itself."""
    audio: Path | None
    reference_audio: Path | None
    """Original recording, prompt (tts) or target (vc)."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Sex, accent, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The rows and clips of all folders. A system that several folders scored differently has the
    folder's name in its own."""

    values: dict[Column, dict[str, Row]]
    """Numbers of lists by system."""
    scores: dict[Column, dict[str, dict[str, UtteranceScore]]]
    """Scores of utterances by system and utterance."""
    clips: list[ScoredClip]
    folders: dict[str, set[str]]
    """The systems of each folder."""


def is_rate(metric: str) -> bool:
    """Whether the utterances of a list count by their words (characters). WIL and MER of a list are
    of summed counts, which the rows lack: their means by words are close to it."""
    return metric.removeprefix(ASR_PREFIX) in WORD_METRICS


def title_of(metric: str) -> str:
    """Returns the heading of a measure."""
    return MEASURES[metric].title if metric in MEASURES else metric


def sums_of(scores: Iterable[UtteranceScore]) -> Sums:
    """Returns the scores of utterances as numerators and denominators."""
    pairs = np.array([(score.errors, score.units) for score in scores], np.float64).reshape(-1, 2)
    return Sums(pairs[:, 0], pairs[:, 1])


def read_results(folders: Sequence[Path]) -> Results:
    """Returns the rows and clips of OUT folders. Of rows that differ in value, git revision or
    machine alone, the last one counts.

    Raises:
        ValueError: a folder has no rows, or a file cannot be read.
    """
    rows = {folder: _last(folder) for folder in dict.fromkeys(folders)}
    labels = _labels(rows)
    values: dict[Column, dict[str, Row]] = defaultdict(dict)
    sums: dict[Column, dict[str, dict[str, dict[int, UtteranceScore]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for folder, own in rows.items():
        for row in own.values():
            column = Column(row.part, row.list, row.metric, row.library)
            system = labels[folder, row.system]
            if row.utterance is None:
                values[column][system] = row
            else:
                sums[column][system][row.utterance][row.seed] = _score_of(row)
    scores = {
        column: {
            system: {name: UtteranceScore(*map(sum, zip(*seeds.values(), strict=True)))
                     for name, seeds in utterances.items()}
            for system, utterances in systems.items()
        }
        for column, systems in sums.items()
    }  # fmt: skip
    return Results(
        values=dict(values),
        scores=scores,
        clips=list(_clips(rows, labels)),
        folders={str(folder): {labels[folder, row.system] for row in own.values()}
                 for folder, own in rows.items()},
    )  # fmt: skip


def _score_of(row: Row) -> UtteranceScore:
    if is_rate(row.metric):
        return UtteranceScore(row.value * max(1, row.n), row.n)
    return UtteranceScore(row.value, 1)


def _last(folder: Path) -> dict[tuple[Any, ...], Row]:
    found = read_rows(folder / "rows.jsonl")
    if not found:
        raise ValueError(f"{folder}: has no rows.jsonl with scores; benchmark.py writes it")
    return {
        (row.part, row.list, row.system, row.utterance, row.metric, row.library, row.seed): row
        for row in found
    }


def _labels(rows: Mapping[Path, Mapping[tuple[Any, ...], Row]]) -> dict[tuple[Path, str], str]:
    """Returns the name of each folder's systems."""
    of_system: dict[str, dict[Path, dict[tuple[Any, ...], Row]]] = defaultdict(dict)
    for folder, own in rows.items():
        for key, row in own.items():
            of_system[row.system].setdefault(folder, {})[key] = row
    labels: dict[tuple[Path, str], str] = {}
    for system, folders in of_system.items():
        merged: dict[tuple[Any, ...], tuple[float, str]] = {}
        same = all(
            merged.setdefault(key, (row.value, row.model)) == (row.value, row.model)
            for own in folders.values()
            for key, row in own.items()
        )
        models = {row.model for own in folders.values() for row in own.values()}
        same &= len(models) == 1
        names = {folder: folder.name for folder in folders}
        if len(set(names.values())) < len(names):
            names = {folder: str(folder) for folder in folders}
        for folder in folders:
            labels[folder, system] = system if same else f"{system} ({names[folder]})"
    return labels


def _clips(
    rows: Mapping[Path, Any], labels: Mapping[tuple[Path, str], str]
) -> Iterable[ScoredClip]:  # fmt: skip
    seen: dict[tuple[str, ...], ScoredClip] = {}
    for folder in rows:
        for number, line, _ in read_appended(folder / CLIPS):
            try:
                system = labels.get((folder, line["system"]), line["system"])
                clip = ScoredClip(
                    part=line["part"], list=line["list"], system=system, id=line["id"],
                    text=line.get("text"), transcript=line.get("transcript"),
                    audio=_found(folder, line.get("audio")),
                    reference_audio=_found(folder, line.get("reference_audio")),
                    columns=line.get("columns") or {},
                )  # fmt: skip
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{folder / CLIPS}, line {number} is no clip: {error}") from error
            seen[clip.part, clip.list, clip.system, clip.id] = clip
    return seen.values()


def _found(folder: Path, name: str | None) -> Path | None:
    """Returns the path of a recording; None if there is none."""
    path = None if name is None else folder / name
    return path if path is not None and path.is_file() else None
