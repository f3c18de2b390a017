"""Compares systems over the utterances that they share: `python recipes/benchmark.py compare`."""

import argparse
from collections.abc import Iterable, Sequence
from html import escape
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from eval.metrics import HIGHER_IS_BETTER
from eval.stats import (
    Interval,
    Spread,
    almost_stochastic_order,
    bonferroni,
    resampled_rates,
    spread,
    utterances_needed,
)
from recipes.scoring.page import html_table, markdown_text
from recipes.scoring.results import (
    ANCHOR,
    Column,
    Results,
    UtteranceScore,
    read_results,
    sums_of,
    title_of,
)
from recipes.scoring.rows import ORIGINAL

REFERENCES = (ORIGINAL, ANCHOR)
"""Systems that are not compared."""
ALPHA = 0.05
DOMINATES = 0.005
"""An epsilon that is printed as 0.00."""
EXPLANATION = (
    "Epsilon of almost stochastic order (del Barrio et al. 2018, Dror et al. 2019) that the row's "
    "system is better than the column's: 0.00\u2605 almost stochastically dominant, below 0.50 "
    "better, which is weak evidence: of two equal systems with 100 utterances each it is below "
    "0.50 in one direction in 16 % of draws. Epsilons and the paired bootstrap intervals of "
    "differences are at alpha, 0.05 divided by the number of pairs and measures of the list "
    "(Bonferroni); a difference is settled if its interval excludes 0."
)
_DIFFERENCE_HEADS = ("difference", "interval", "settled", "utterances needed")


class Difference(NamedTuple):
    """The second system minus the first one, on one measure."""

    first: str
    second: str
    interval: Interval
    """At the level 1 - alpha, alpha after Bonferroni."""
    needed: int | None
    """Utterances that would show the observed difference at this alpha; None: more than any
    number, as there is no difference."""


class SystemScores(NamedTuple):
    """A system's scores of the shared utterances."""

    value: Interval
    """The rate of summed errors, or the mean; 95 % interval."""
    spread: Spread
    """Mean and standard deviation of utterances."""


class Comparison(NamedTuple):
    """Systems on one measure."""

    column: Column
    num_utterances: int
    alpha: float
    """After Bonferroni."""
    comparisons: int
    """Pairs times measures."""
    systems: dict[str, SystemScores]
    epsilons: dict[tuple[str, str], float]
    """That the first system is better than the second one."""
    differences: list[Difference]


def add_compare_command(kinds: Any) -> None:
    """Adds `compare` to the subparsers of benchmark.py."""
    about = "which system is better: almost stochastic order and paired bootstrap intervals"
    command = kinds.add_parser("compare", help=about, description=about.capitalize() + ".")
    command.add_argument(
        "outs", type=Path, nargs="+", metavar="OUT", help="folder of benchmark.py, with rows.jsonl"
    )
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")


def print_comparison(args: argparse.Namespace) -> None:
    """Prints a matrix of systems for every measure.

    Raises:
        ValueError: systems share no utterance, or were scored by different judges.
    """
    found = compare_systems(read_results(args.outs), seed=args.seed)
    print("\n\n".join([*map(comparison_table, found), EXPLANATION]))


def compare_systems(results: Results, *, seed: int = 0) -> list[Comparison]:
    """Returns a comparison for each part, list and measure that several systems have, of the
    utterances that they share. Originals are left out.

    Raises:
        ValueError: no systems, or none of different folders, share an utterance; or systems were
            scored by different judges.
    """
    shared = {
        column: systems
        for column, systems in _shared(results).items()
        if column.metric in HIGHER_IS_BETTER
    }
    _check_folders(results, shared)
    lists: dict[tuple[str, str], list[Column]] = {}
    for column in shared:
        lists.setdefault((column.part, column.list), []).append(column)
    work = [(column, sum(_pairs(shared[one]) for one in columns))
            for columns in lists.values() for column in columns]  # fmt: skip
    return [
        _compared(column, shared[column], seed, comparisons)
        for column, comparisons in tqdm(work, "comparisons", unit="measure")
    ]


def _pairs(systems: Sequence[str] | dict[str, Any]) -> int:
    return len(systems) * (len(systems) - 1) // 2


def _shared(results: Results) -> dict[Column, dict[str, dict[str, UtteranceScore]]]:
    """Returns the scores of shared utterances, for columns that two systems or more have.

    Raises:
        ValueError: a measure has systems that no judge has in common.
    """
    shared: dict[Column, dict[str, dict[str, UtteranceScore]]] = {}
    judges: dict[tuple[str, str, str], dict[str, set[str]]] = {}
    for column, systems in results.scores.items():
        own = {name: scores for name, scores in systems.items() if name not in REFERENCES}
        of_measure = judges.setdefault((column.part, column.list, column.metric), {})
        for name in own:
            of_measure.setdefault(name, set()).add(column.library)
        common = set.intersection(*map(set, own.values())) if own else set()
        if len(own) > 1 and common:
            ids = sorted(common)
            shared[column] = {
                name: {each: scores[each] for each in ids} for name, scores in own.items()
            }
    for (part, list_name, metric), systems in judges.items():
        if len(systems) > 1 and not set.intersection(*systems.values()):
            first, *others = systems
            other = next(one for one in others if not systems[first] & systems[one])
            raise ValueError(
                f"{metric} of {part} {list_name} was scored in two ways: {first} by "
                f"{min(systems[first])}; {other} by {min(systems[other])}: score both with the same"
            )
    return shared


def _check_folders(results: Results, shared: Iterable[Column]) -> None:
    """Raises ValueError if a folder has no system that is compared with another folder's."""
    together = [
        {system for system in results.scores[column] if system not in REFERENCES}
        for column in shared
    ]
    for folder, own in results.folders.items():
        others = [systems for name, systems in results.folders.items() if name != folder] or [own]
        if not any(own & one and other & one for one in together for other in others):
            names = ", ".join(name for name in results.folders if name != folder)
            lists = sorted({f"{c.part} {c.list}".strip() for c, s in results.scores.items()
                            if own & set(s)})  # fmt: skip
            raise ValueError(
                f"{folder} ({'; '.join(lists) or 'no utterances'}) shares no utterance of a part, "
                f"a list and a measure with {names or 'another system'}: score systems on the "
                "same list, under the same name"
            )


def _compared(
    column: Column, systems: dict[str, dict[str, UtteranceScore]], seed: int, comparisons: int
) -> Comparison:
    alpha = bonferroni(ALPHA, comparisons)
    sums = {name: sums_of(scores.values()) for name, scores in systems.items()}
    units = {
        name: np.array([score.value for score in scores.values()])
        for name, scores in systems.items()
    }
    number = len(next(iter(units.values())))
    resampled = resampled_rates(list(sums.values()), seed=seed)
    rates = dict(zip(sums, resampled.T, strict=True))
    found = {
        name: SystemScores(_interval(own.rate, rates[name], ALPHA), spread(units[name]))
        for name, own in sums.items()
    }
    sign = 1 if HIGHER_IS_BETTER[column.metric] else -1
    epsilons = {
        (first, second): almost_stochastic_order(
            sign * units[first], sign * units[second], alpha=alpha, seed=seed
        )
        for first, second in permutations(systems, 2)
    }
    differences = []
    for first, second in combinations(systems, 2):
        value = sums[second].rate - sums[first].rate
        interval = _interval(value, rates[second] - rates[first], alpha)
        needed = None
        if number > 1:
            needed = utterances_needed(sums[first], sums[second], alpha=alpha)
        differences.append(Difference(first, second, interval, needed))
    return Comparison(column, number, alpha, comparisons, found, epsilons, differences)


def _interval(value: float, resampled: np.ndarray, alpha: float) -> Interval:
    low, high = np.nanquantile(resampled, [alpha / 2, 1 - alpha / 2]).tolist()
    return Interval(value, low, high)


def comparison_table(comparison: Comparison) -> str:
    """Returns a comparison as Markdown: the matrix of epsilons, then the differences."""
    column, systems = comparison.column, [*comparison.systems]
    better = "higher" if HIGHER_IS_BETTER[column.metric] else "lower"
    where, title = f"{column.part} {column.list}".strip(), title_of(column.metric)
    shown = [markdown_text(name) for name in systems]
    lines = [
        f"### {where}: {title} ({better} is better)",
        "",
        f"{comparison.num_utterances} shared utterances; alpha {comparison.alpha:.2g} (0.05 / "
        f"{comparison.comparisons}); {column.library}",
        "",
        f"| system | {title} | mean \u00b1 deviation | {' | '.join(shown)} |",
        f"|---|---:|---:|{'---:|' * len(systems)}",
    ]
    for first, label in zip(systems, shown, strict=True):
        value, own = comparison.systems[first]
        deviation = "-" if own.deviation is None else _number(own.deviation)
        cells = ["-" if second == first else _epsilon_text(comparison.epsilons[first, second])
                 for second in systems]  # fmt: skip
        number, mean = f"{_number(value.value)} {_ends(value)}", _number(own.mean)
        lines.append(f"| {label} | {number} | {mean} \u00b1 {deviation} | {' | '.join(cells)} |")
    lines += ["", f"| pair | {' | '.join(_DIFFERENCE_HEADS)} |", "|---|---:|---:|---|---:|"]
    for one in comparison.differences:
        names = markdown_text(f"{one.second} - {one.first}")
        lines.append(f"| {names} | {' | '.join(_difference_texts(one))} |")
    return "\n".join(lines)


def comparison_sections(results: Results) -> dict[str, str]:
    """Returns the comparisons of systems as HTML by part; none where nothing can be compared."""
    try:
        found = compare_systems(results)
    except ValueError:
        return {}
    parts = dict.fromkeys(one.column.part for one in found)
    return {part: _comparison_section([one for one in found if one.column.part == part])
            for part in parts}  # fmt: skip


def _comparison_section(comparisons: Sequence[Comparison]) -> str:
    matrices = "".join(_epsilon_table(one) for one in comparisons)
    heads = ["list", "measure", "pair", *_DIFFERENCE_HEADS]
    rows = []
    for comparison in comparisons:
        for one in comparison.differences:
            names = (comparison.column.list, title_of(comparison.column.metric),
                     f"{one.second} - {one.first}")  # fmt: skip
            numbers = (one.interval.value, None, None, one.needed)
            cells = [f'<td class="left">{escape(name)}</td>' for name in names]
            for text, number in zip(_difference_texts(one), numbers, strict=True):
                value = "" if number is None else f' data-value="{number!r}"'
                cells.append(f"<td{value}>{escape(text)}</td>")
            rows.append(f"<tr>{''.join(cells)}</tr>")
    differences = html_table("Differences and their intervals", heads, rows, sortable=True, left=3)
    return (
        f"<details><summary>Significance</summary><p>{EXPLANATION}</p>"
        f'<div class="charts">{matrices}</div>{differences}</details>'
    )


def _epsilon_table(comparison: Comparison) -> str:
    column, systems = comparison.column, [*comparison.systems]
    rows = []
    for first in systems:
        cells = "".join(_epsilon_cell(comparison, first, second) for second in systems)
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    caption = f"{title_of(column.metric)}, {column.list}, n = {comparison.num_utterances}"
    return html_table(caption, ["better than", *systems], rows)


def _epsilon_cell(comparison: Comparison, first: str, second: str) -> str:
    if first == second:
        return "<td>-</td>"
    epsilon = comparison.epsilons[first, second]
    return f"<td{' class=best' if epsilon < 0.5 else ''}>{_epsilon_text(epsilon)}</td>"


def _epsilon_text(epsilon: float) -> str:
    """Returns an epsilon with two digits; with a star if these are zeros."""
    if epsilon < DOMINATES:
        return "0.00\u2605"
    return f"{epsilon:.2f}"


def _difference_texts(difference: Difference) -> list[str]:
    """Returns the cells of a difference under `_DIFFERENCE_HEADS`."""
    interval = difference.interval
    settled = interval.low is not None and (interval.low > 0 or (interval.high or 0) < 0)
    needed = "-" if difference.needed is None else str(difference.needed)
    value = f"{interval.value:+.3f}"
    return [value, _ends(interval), "yes" if settled else "no", needed]


def _ends(interval: Interval) -> str:
    assert interval.low is not None
    assert interval.high is not None
    return f"[{_number(interval.low)}, {_number(interval.high)}]"


def _number(value: float) -> str:
    return f"{value:.3f}"
