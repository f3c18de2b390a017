"""recipes/scoring/scores.py: stored scores, skipped utterances, several processes."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from codec.io import WriteError
from codec.json_lines import read_json_lines
from eval.benchmark import ScoredUtterance
from recipes.scoring.scores import Score, score_all


class Word(NamedTuple):
    """An item of these tests."""

    id: str


def lengths(log: Path, bad: Sequence[str] = (), error: type[Exception] = ValueError) -> Score:
    """Scores the length of an item's id for each system; `log` has a line per score."""

    def score(item: Word, systems: Sequence[str]) -> Iterator[tuple[str, ScoredUtterance]]:
        for system in systems:
            if f"{item.id} {system}" in bad:
                raise error(f"{item.id}.wav is silent")
            with log.open("a") as file:
                file.write(f"{item.id} {system}\n")
            yield system, ScoredUtterance(id=item.id, values={"length": float(len(item.id))})

    return score


ITEMS = [Word("a"), Word("bb"), Word("ccc")]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, list[ScoredUtterance]]]:
    def score(keys: dict[str, str], *, processes: int = 1, **options: object) -> dict:
        make = partial(lengths, tmp_path / "log", **options)  # type: ignore[arg-type]
        return score_all(tmp_path / "out", ITEMS, keys, make, processes)

    return score


def test_each_score_is_computed_once(run: Callable, tmp_path: Path) -> None:
    first = run({"x": "k"}, processes=2)
    assert [one.id for one in first["x"]] == ["a", "bb", "ccc"]
    both = run({"x": "k", "y": "k"})
    assert both["x"] == first["x"]
    assert [one.values["length"] for one in both["y"]] == [1, 2, 3]
    log = (tmp_path / "log").read_text().splitlines()
    assert sorted(log) == sorted(f"{item.id} {system}" for item in ITEMS for system in "xy")
    run({"x": "another key"})
    assert len((tmp_path / "log").read_text().splitlines()) == 9


def test_what_cannot_be_scored_is_listed_for_the_systems_that_lack_it(
    run: Callable, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"of y could be scored: a\.wav is silent; bb"):
        run({"x": "k", "y": "k"}, bad=["a y", "bb y", "ccc y"])
    found = run({"x": "k", "y": "k"}, bad=["bb y"])
    assert [one.id for one in found["x"]] == ["a", "bb", "ccc"]
    assert [one.id for one in found["y"]] == ["a", "ccc"]
    (line,) = read_json_lines(tmp_path / "out" / "skipped-y.jsonl")
    assert line.value == {"id": "bb", "reason": "bb.wav is silent"}
    assert not (tmp_path / "out" / "skipped-x.jsonl").read_text()


def test_a_full_disk_ends_the_scoring_and_costs_no_utterance(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"bb\.wav"):
        run({"x": "k"}, bad=["bb x"], error=WriteError)
    assert not (tmp_path / "out" / "skipped-x.jsonl").exists()
