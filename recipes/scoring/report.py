"""Tables for a paper and one HTML page of scores: `python recipes/benchmark.py report`."""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codec.audio import audio_tags
from codec.io import atomic_file
from codec.json_lines import read_appended
from codec.program import counted
from eval.benchmark import ASR_PREFIX, Row
from eval.metrics import HIGHER_IS_BETTER
from eval.stats import Interval, Sums, resampled_rates
from recipes.lib.run import finished
from recipes.scoring.charts import Line, distribution, line_chart, style_of
from recipes.scoring.clips import ClipSet, choose_clips, marked_words, pictures, player, read_waves
from recipes.scoring.compare import comparison_sections
from recipes.scoring.page import html_page, html_table, markdown_text
from recipes.scoring.ratings import KINDS, write_listening_page
from recipes.scoring.results import (
    Column,
    Results,
    ScoredClip,
    read_results,
    sums_of,
    title_of,
)
from recipes.scoring.rows import ORIGINAL

HEADINGS = {
    "reconstruction": "Reconstruction",
    "tokens": "Tokens",
    "tts": "Text to speech",
    "asr": "Speech recognition",
    "vc": "Voice conversion",
    "speed": "Speed",
    "ratings": "Ratings of listeners",
    "": "Scores",
}
"""Parts in the order of a report, with their headings."""
ARROWS = {True: " \u2191", False: " \u2193", None: ""}


class Cell(NamedTuple):
    """A number of a table, with its interval."""

    row: Row
    interval: Interval
    best: bool


class ScoreTable(NamedTuple):
    """The numbers of a list: systems by columns."""

    part: str
    list_name: str
    columns: list[Column]
    cells: dict[str, dict[Column, Cell]]
    """By system, the originals first."""
    grouped: bool = False
    """Of the values of a column, such as sex; the keys of `cells` name value and system."""

    def heading(self, column: Column) -> str:
        """Returns a column's measure; with a number where it was scored in several ways."""
        ways = [one for one in self.columns if one.metric == column.metric]
        number = f" ({ways.index(column) + 1})" if len(ways) > 1 else ""
        return f"{title_of(column.metric)}{number}{ARROWS[HIGHER_IS_BETTER.get(column.metric)]}"


def add_report_command(kinds: Any) -> None:
    """Adds `report` to the subparsers of benchmark.py."""
    about = "tables for a paper, and one HTML page with curves and players"
    command = kinds.add_parser("report", help=about, description=about.capitalize() + ".")
    command.add_argument(
        "outs", type=Path, nargs="+", metavar="OUT", help="folder of benchmark.py, with rows.jsonl"
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="write the page")
    command.add_argument(
        "--clips", type=int, default=6, metavar="N", help="utterances of each list to play (6)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the choice of clips (default: 0)")
    command.add_argument(
        "--runs", type=Path, nargs="+", default=[], metavar="DIR", help="run folders, for curves"
    )
    command.add_argument("--listening", type=Path, metavar="FILE", help="write a listening test")
    command.add_argument(
        "--kind", dest="test_kind", choices=[*KINDS], default="mushra",
        help="of the test: " + "; ".join(f"{kind}: {text}" for kind, text in KINDS.items()),
    )  # fmt: skip
    command.add_argument("--part", help="of the clips of the test, where there are several")
    command.add_argument("--title", default="Evaluation", help="heading of the page")


def write_report(args: argparse.Namespace) -> None:
    """Prints the tables, and writes the page; or writes the page of a listening test.

    Raises:
        ValueError: a folder has no rows, or a file is damaged.
    """
    if args.clips < 0:
        raise ValueError(f"--clips must be 0 or more, got {args.clips}")
    results = read_results(args.outs)
    if args.listening is not None:
        write_listening_page(results, args)
        return
    tables = score_tables(results)
    print("\n\n".join(markdown(table) for table in tables))
    if args.html is not None:
        page = report_page(results, tables, args)
        with atomic_file(args.html) as temporary:
            temporary.write_text(page, encoding="utf-8")
        finished(f"a report of {counted(len(tables), 'table')}", args.html, f"open {args.html}")


def score_tables(results: Results) -> list[ScoreTable]:
    """Returns a table for each part and list, with 95 % intervals of numbers whose utterances are
    known."""
    lists: dict[tuple[str, str], list[Column]] = {}
    for column in results.values:
        lists.setdefault((column.part, column.list), []).append(column)
    tables = []
    for part, list_name in sorted(lists, key=lambda key: _place(key[0])):
        columns = [one for one in lists[part, list_name] if not _base(results, one)]
        names = dict.fromkeys(name for column in columns for name in results.values[column])
        cells: dict[str, dict[Column, Cell]] = {
            name: {} for name in sorted(names, key=lambda name: name != ORIGINAL)
        }
        intervals = {} if part == "speed" else _intervals(results, columns)
        for column in columns:
            rows = results.values[column]
            best = _best(rows, HIGHER_IS_BETTER.get(column.metric))
            for name, row in rows.items():
                interval = intervals.get((column, name), Interval(row.value, None, None))
                cells[name][column] = Cell(row, interval, name in best)
        tables.append(ScoreTable(part, list_name, columns, cells))
    return _joined_groups(tables)


def _joined_groups(tables: Sequence[ScoreTable]) -> list[ScoreTable]:
    """Returns the tables, those of lists LIST/COLUMN=VALUE as one for each column."""
    joined: dict[tuple[str, str], ScoreTable] = {}
    for table in tables:
        group = re.fullmatch(r"(.+)/([^/=]+)=(.*)", table.list_name, re.DOTALL)
        if group is None:
            joined[table.part, table.list_name] = table
            continue
        name = f"{group[1]} by {group[2]}"
        own = joined.setdefault((table.part, name), ScoreTable(table.part, name, [], {}, True))
        for system, cells in table.cells.items():
            moved = {column._replace(list=name): cell for column, cell in cells.items()}
            own.cells[f"{group[3]}: {system}"] = moved
            own.columns.extend(column for column in moved if column not in own.columns)
    return [*joined.values()]


def _place(part: str) -> int:
    return [*HEADINGS].index(part) if part in HEADINGS else len(HEADINGS)


def _base(results: Results, column: Column) -> Column | None:
    """Returns the column whose interval has this one as an end."""
    stem, _, end = column.metric.rpartition("_")
    base = column._replace(metric=stem)
    return base if end in ("low", "high") and base in results.values else None


def _best(rows: Mapping[str, Row], higher: bool | None) -> set[str]:
    values = {name: row.value for name, row in rows.items() if name != ORIGINAL}
    if higher is None or len(values) < 2:
        return set()
    best = max(values.values()) if higher else min(values.values())
    return {name for name, value in values.items() if value == best}


def _intervals(
    results: Results, columns: Sequence[Column]
) -> dict[tuple[Column, str], Interval]:  # fmt: skip
    """Returns 95 % intervals of the numbers of a list, by column and system: the rows METRIC_low
    and METRIC_high, or a bootstrap over utterances.

    WIL and MER of a list are of summed counts: their intervals are those of the means that are
    weighted by words, around the list's number.
    """
    found: dict[tuple[Column, str], Interval] = {}
    by_size: dict[int, dict[tuple[Column, str], Sums]] = {}
    for column in columns:
        ends = [results.values.get(column._replace(metric=f"{column.metric}_{end}"), {})
                for end in ("low", "high")]  # fmt: skip
        for name, row in results.values[column].items():
            scores = results.scores.get(column, {}).get(name, {})
            if all(name in end for end in ends):
                found[column, name] = Interval(row.value, *(end[name].value for end in ends))
            elif len(scores) > 1:
                by_size.setdefault(len(scores), {})[column, name] = sums_of(scores.values())
    for sums in by_size.values():
        quantiles = np.nanquantile(resampled_rates(list(sums.values())), [0.025, 0.975], axis=0)
        for ((column, name), own), ends in zip(sums.items(), quantiles.T, strict=True):
            value = results.values[column][name].value
            low, high = (ends - own.rate + value).tolist()
            if column.metric.removeprefix(ASR_PREFIX) in ("wil", "mer"):
                low, high = max(low, 0.0), min(high, 1.0)
            found[column, name] = Interval(value, low, high)
    return found


def markdown(table: ScoreTable) -> str:
    """Returns a table as Markdown: numbers with their intervals, the best one bold."""
    heads = ["system", "n", *(table.heading(column) for column in table.columns)]
    lines = [f"### {HEADINGS.get(table.part, table.part)}: {table.list_name}", ""]
    lines += [f"| {' | '.join(heads)} |", f"|---|---:|{'---:|' * len(table.columns)}"]
    for name, cells in table.cells.items():
        n = max(cell.row.n for cell in cells.values())
        shown = [_markdown_cell(cells.get(column), n) for column in table.columns]
        lines.append(f"| {' | '.join([markdown_text(name), str(n), *shown])} |")
    return "\n".join(lines)


def _markdown_cell(cell: Cell | None, n: int) -> str:
    if cell is None:
        return ""
    number = f"**{number_of(cell.row.value)}**" if cell.best else number_of(cell.row.value)
    if cell.interval.low is not None and cell.interval.high is not None:
        number += f" [{number_of(cell.interval.low)}, {number_of(cell.interval.high)}]"
    return number if cell.row.n == n else f"{number} (n={cell.row.n})"


def number_of(value: float) -> str:
    """Returns a number with three digits behind the point, with none from 100 on."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}"


def report_page(results: Results, tables: Sequence[ScoreTable], args: argparse.Namespace) -> str:
    """Returns the page as HTML."""
    plain = [table for table in tables if not table.grouped]
    names = dict.fromkeys(name for table in plain for name in table.cells)
    styles = {name: number for number, name in enumerate(names)}
    chosen = choose_clips(results.clips, args.clips, args.seed)
    comparisons = comparison_sections(results)
    sections: dict[str, str] = {}
    for part in dict.fromkeys(table.part for table in tables):
        own = [table for table in tables if table.part == part]
        sections[HEADINGS.get(part, part)] = (
            "".join(_score_section(table) for table in own)
            + comparisons.get(part, "")
            + _chart_section(results, [table for table in plain if table.part == part], styles)
            + _clip_section([one for one in chosen if one.part == part], results)
        )
    if args.runs:
        sections["Training"] = _training_section(args.runs)
    sections["Provenance"] = _provenance_section(tables)
    links = "".join(f'<li><a href="#{_anchor(name)}">{escape(name)}</a></li>' for name in sections)
    body = "".join(f'<section aria-labelledby="{_anchor(name)}"><h2 id="{_anchor(name)}">'
                   f"{escape(name)}</h2>{content}</section>"
                   for name, content in sections.items())  # fmt: skip
    about = (
        "Numbers in brackets are 95 % bootstrap intervals over utterances; bold is the best system "
        "of a column, originals aside. Arrows give the better direction."
    )
    main = (
        f"<h1>{escape(args.title)}</h1><p>{about}</p>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main>'
    )
    return html_page(args.title, main, "report.js")


def _anchor(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower())


def _score_section(table: ScoreTable) -> str:
    heads = ["system", "n", *(table.heading(column) for column in table.columns)]
    rows = []
    for name, cells in table.cells.items():
        n = max(cell.row.n for cell in cells.values())
        shown = "".join(_html_cell(cells.get(column), n) for column in table.columns)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>'
                    f'<td data-value="{n}">{n}</td>{shown}</tr>')  # fmt: skip
    return html_table(f"List {table.list_name}", heads, rows, sortable=True) + _libraries(table)


def _html_cell(cell: Cell | None, n: int) -> str:
    if cell is None:
        return '<td data-value=""></td>'
    value, low, high = cell.interval
    number = number_of(value)
    if low is not None and high is not None:
        number += f" <small>[{number_of(low)}, {number_of(high)}]</small>"
    if cell.row.n != n:
        number += f" <small>n={cell.row.n}</small>"
    best = ' class="best"' if cell.best else ""
    return f'<td{best} data-value="{value!r}">{number}</td>'


def _libraries(table: ScoreTable) -> str:
    ways: dict[str, list[str]] = {}
    for column in table.columns:
        ways.setdefault(column.library, []).append(table.heading(column))
    items = "".join(f"<li>{escape(', '.join(metrics))}: {escape(library)}</li>"
                    for library, metrics in ways.items())  # fmt: skip
    return f"<details><summary>Scored by</summary><ul>{items}</ul></details>"


def _chart_section(
    results: Results, tables: Sequence[ScoreTable], styles: Mapping[str, int]
) -> str:  # fmt: skip
    charts, names = [], dict.fromkeys(name for table in tables for name in table.cells)
    for table in tables:
        for column in table.columns:
            lines = [
                Line(name, styles[name], *distribution([one.value for one in scores.values()]))
                for name, scores in results.scores.get(column, {}).items()
                if name in styles and len(scores) > 1 and table.part != "speed"
            ]
            # One value for all, such as no failure, is no curve.
            if len({value for line in lines for value in line.x}) > 1:
                title = f"{table.list_name}: cumulative distribution of {title_of(column.metric)}"
                charts.append(line_chart(lines, title, table.heading(column), "share"))
    section = _figures("Distributions over utterances", charts, names, styles)
    curves, families = [], {}
    for table in tables:
        members = _families(table)
        families |= {stem: styles[names[-1]] for stem, names in members.items()}
        curves += _rate_curves(table, members, styles)
    return section + _figures("Quality by bit rate", curves, families, families)


def _families(table: ScoreTable) -> dict[str, list[str]]:
    """Returns the systems NAME-1, NAME-8, ... with a bit rate by NAME, where there are several."""
    members: dict[str, list[str]] = {}
    for name, cells in table.cells.items():
        numbered = re.fullmatch(r"(.*)-\d+( \(.*\))?", name, re.DOTALL)
        if numbered and any(column.metric == "bitrate" for column in cells):
            members.setdefault(numbered[1] + (numbered[2] or ""), []).append(name)
    return {stem: names for stem, names in members.items() if len(names) > 1}


def _rate_curves(
    table: ScoreTable, families: Mapping[str, Sequence[str]], styles: Mapping[str, int]
) -> list[str]:
    charts = []
    for column in table.columns:
        lines = []
        for stem, names in families.items():
            points = []
            for name in names:
                cells = {one.metric: cell for one, cell in table.cells[name].items()}
                if column in table.cells[name]:
                    points.append((cells["bitrate"].row.value / 1000,
                                   *table.cells[name][column].interval))  # fmt: skip
            if len(points) > 1:
                lines.append(Line(stem, styles[names[-1]], *zip(*sorted(points), strict=True)))
        values = {value for line in lines for value in line.y}
        if len(values) > 1 and column.metric in HIGHER_IS_BETTER:
            title = f"{table.list_name}: {title_of(column.metric)} by bit rate"
            label = table.heading(column)
            charts.append(line_chart(lines, title, "kbit/s", label, markers=True))
    return charts


def _figures(
    heading: str, charts: Sequence[str], names: Iterable[str], styles: Mapping[str, int]
) -> str:
    if not charts:
        return ""
    legend = "".join(
        f'<li><svg viewBox="0 0 28 12" aria-hidden="true"><path class="line '
        f'{style_of(styles[name])}" d="M1 6H27"/></svg>{escape(name)}</li>'
        for name in names
    )
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts)
    return (
        f'<h3>{escape(heading)}</h3><ul class="legend">{legend}</ul>'
        f'<div class="charts">{figures}</div>'
    )


def _clip_section(chosen: Sequence[ClipSet], results: Results) -> str:
    if not chosen:
        return ""
    about = (
        "A random sample, embedded as Ogg Opus. Errors against the reference: <del>deleted</del>, "
        "<ins>inserted</ins>, <del>substituted</del> <ins>by</ins>."
    )
    return f"<h3>Clips</h3><p>{about}</p>" + "".join(_clip(one, results) for one in chosen)


def _clip(clip_set: ClipSet, results: Results) -> str:
    clips = clip_set.clips
    paths = {name: clip.audio for name, clip in clips.items() if clip.audio is not None}
    first = next(iter(clips.values()))
    named = {"vc": "target", "reconstruction": ""}.get(clip_set.part, "prompt")
    others = dict.fromkeys(clip.reference_audio for clip in clips.values() if named)
    for number, path in enumerate(one for one in others if one and one not in paths.values()):
        paths[named + (f" {number + 1}" if number else "")] = path
    waves, rate = read_waves(paths)
    peak = max((float(np.abs(wave).max(initial=0)) for wave in waves.values()), default=0.0)
    takes = []
    for name in [*(name for name in waves if name not in clips), *clips]:
        content = [f"<h5>{escape(name)}</h5>"]
        if name in waves:
            label = f"{name}, {clip_set.id}"
            content.append(player(waves[name], rate, label, audio_tags(paths[name])))
            content.append(pictures(waves[name], rate, label, peak))
        else:
            content.append("<p>No audio.</p>")
        if name in clips:
            content.append(_texts(clips[name]) + _scores_of(clip_set, name, results))
        takes.append(f'<div class="take">{"".join(content)}</div>')
    columns = "".join(f", {escape(str(key))} {escape(str(value))}"
                      for key, value in first.columns.items())  # fmt: skip
    return (
        f'<article class="clip"><h4>{escape(clip_set.id)} '
        f'<span class="faint">{escape(clip_set.list)}{columns}</span></h4>'
        f'<p>{escape(first.text or "")}</p><div class="takes">{"".join(takes)}</div></article>'
    )


def _texts(clip: ScoredClip) -> str:
    if clip.transcript is None:
        return ""
    language = str(clip.columns.get("language", "en"))
    text = escape(clip.transcript)
    if clip.text is not None:
        text = marked_words(clip.text, clip.transcript, language)
    return f"<p>{text or '(empty transcript)'}</p>"


def _scores_of(clip_set: ClipSet, system: str, results: Results) -> str:
    found = [
        f"{title_of(column.metric)} {number_of(systems[system][clip_set.id].value)}"
        for column, systems in results.scores.items()
        if (column.part, column.list) == (clip_set.part, clip_set.list)
        and clip_set.id in systems.get(system, {})
    ]
    return f'<p class="faint">{escape(", ".join(found))}</p>' if found else ""


def _training_section(runs: Sequence[Path]) -> str:
    """Returns the curves of metrics.jsonl of run folders, a chart for each metric.

    Raises:
        ValueError: a folder has no metrics.jsonl.
    """
    curves: dict[str, list[Line]] = {}
    labels = {run: run.name for run in runs}
    if len(set(labels.values())) < len(labels):
        labels = {run: str(run) for run in runs}
    for style, run in enumerate(labels):
        lines = [line.value for line in read_appended(run / "metrics.jsonl")]
        if not lines:
            raise ValueError(f"{run}: has no metrics.jsonl with metrics; --runs names run folders")
        for key in dict.fromkeys(key for line in lines for key in line if key != "step"):
            points = [(float(line["step"]), float(line[key])) for line in lines
                      if line.get(key) is not None]  # fmt: skip
            if points:
                x, y = zip(*points, strict=True)
                curves.setdefault(key, []).append(Line(labels[run], style, x, y))
    charts = [line_chart(lines, f"{key} by step", "step", key) for key, lines in curves.items()]
    styles = {label: style for style, label in enumerate(labels.values())}
    return _figures("Learning curves", charts, styles, styles)


def _provenance_section(tables: Sequence[ScoreTable]) -> str:
    seen = dict.fromkeys(
        (name, table.list_name, cell.row.seed, cell.row.git[:12], cell.row.config, cell.row.model,
         cell.row.machine)
        for table in tables for name, cells in table.cells.items() for cell in cells.values()
    )  # fmt: skip
    heads = ["system", "list", "seed", "git", "configuration", "model", "machine"]
    rows = [
        f'<tr><th scope="row">{escape(line[0])}</th>'
        + "".join(f'<td class="left">{escape(str(value))}</td>' for value in line[1:]) + "</tr>"
        for line in seen
    ]  # fmt: skip
    return html_table(
        "Origin of the numbers: digests and revisions", heads, rows, sortable=True, left=len(heads)
    )
