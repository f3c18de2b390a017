"""Scores of utterances: computed once, by one or several processes, and stored.

OUT/utterances/ has a file per system and key, a line per utterance; a restart reads them.
"""

import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from codec.io import WriteError, sha256_of
from codec.json_lines import append_json_lines, read_appended, write_json_lines
from eval.benchmark import ScoredUtterance, all_libraries
from recipes.scoring.judges import safe_name

logger = logging.getLogger(__name__)


@runtime_checkable
class Item(Protocol):
    """An utterance to score; several processes need one that can be pickled."""

    @property
    def id(self) -> str:
        """Unique in its list."""
        ...


Score = Callable[[Any, Sequence[str]], Iterator[tuple[str, ScoredUtterance]]]
"""An item and names of systems to the scores of each system, in that order. What it raises as
ValueError or OSError is why the item is left out for the remaining systems."""
ItemScores = Iterable[tuple[str, ScoredUtterance | str]]
"""The scores of each system, or the reason why there are none."""


def score_all(
    folder: Path, items: Sequence[Item], keys: Mapping[str, str], make: Callable[[], Score],
    processes: int = 1,
) -> dict[str, list[ScoredUtterance]]:  # fmt: skip
    """Returns each system's scores of the items; computes those that FOLDER/utterances/ does not
    have yet.

    An item that cannot be scored is left out and listed in FOLDER/skipped-SYSTEM.jsonl.

    Args:
        keys: by system, everything that its scores depend on besides library versions.
        make: loads the models and returns what scores; each process calls it once. Several
            processes need one that can be pickled.
        processes: number of processes that score.

    Raises:
        ValueError: no item of a system could be scored.
        WriteError: the disk is full.
    """
    stored, done = {}, {}
    for system, key in keys.items():
        digest = sha256_of(f"{key} {all_libraries()}", 12)
        stored[system] = folder / "utterances" / f"{safe_name(system)}-{digest}.jsonl"
        before = [ScoredUtterance.from_record(line.value) for line in read_appended(stored[system])]
        done[system] = {one.id: one for one in before}
    work: list[tuple[Item, list[str]]] = []
    for item in items:
        lacking = [system for system in keys if item.id not in done[system]]
        if lacking:
            work.append((item, lacking))
    skipped: dict[str, list[dict[str, str]]] = {system: [] for system in keys}
    label = next(iter(keys)) if len(keys) == 1 else f"{len(keys)} systems"
    with tqdm(
        total=len(items), initial=len(items) - len(work), desc=label, unit="utterance"
    ) as progress:
        for item, scores in _scored(work, make, min(processes, len(work))):
            for system, scored in scores:
                if isinstance(scored, str):
                    skipped[system].append({"id": item.id, "reason": scored})
                else:
                    done[system][item.id] = scored
                    append_json_lines(stored[system], [scored.to_record()])
            progress.update()
    places = {item.id: place for place, item in enumerate(items)}
    found = {}
    for system, reasons in skipped.items():
        reasons.sort(key=lambda one: places[one["id"]])
        write_json_lines(folder / f"skipped-{safe_name(system)}.jsonl", reasons)
        if reasons:
            logger.warning("%d of %d utterances of %s skipped", len(reasons), len(items), system)
        scored = [done[system][item.id] for item in items if item.id in done[system]]
        for metric in sorted({metric for one in scored for metric in one.missing}):
            count = sum(metric in one.missing for one in scored)
            logger.warning("%s is not defined for %d utterances of %s", metric, count, system)
        if not scored:
            why = "; ".join(one["reason"] for one in reasons[:2])
            raise ValueError(f"no utterance of {system} could be scored: {why}")
        found[system] = scored
    return found


def _scored(
    work: Sequence[tuple[Item, list[str]]], make: Callable[[], Score], processes: int
) -> Iterator[tuple[Item, ItemScores]]:
    """The items and their scores, as they become ready."""
    if processes <= 1:
        if work:
            score = make()
            for item, systems in work:
                yield item, _attempt(score, item, systems)
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_load, initargs=(make,)
    )
    try:
        futures = {pool.submit(_attempt_loaded, item, systems): item for item, systems in work}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(score: Score, item: Item, systems: Sequence[str]) -> ItemScores:
    left = list(systems)
    try:
        for system, scored in score(item, systems):
            left.remove(system)
            yield system, scored
    except WriteError:
        raise
    except (ValueError, OSError) as error:
        yield from ((system, str(error)) for system in left)


_loaded: Score | None = None
"""What scores in a process of its own."""


def _load(make: Callable[[], Score]) -> None:
    global _loaded
    _loaded = make()


def _attempt_loaded(item: Item, systems: Sequence[str]) -> ItemScores:
    assert _loaded is not None
    return list(_attempt(_loaded, item, systems))
