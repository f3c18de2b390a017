"""Learning curves of run folders as a picture: `plot_curves.py runs=[a,b] out=curves.png`.

A column for each task of the AR (tts, asr, continuation, text) and each group of codebooks of the
NAR; above over steps, below over hours of speech, where a run says how many a step sees. Thin lines
are the training loss, thick ones the dev loss. Needs matplotlib (pip install -e '.[demo]'). Prints
JSON: the last losses of every run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipes.lib.run import load_config, run_program
from recipes.lib.voice_training import SEEN_FILE

METRICS_FILE = "metrics.jsonl"
SUFFIX = "_loss"
WIDTH, HEIGHT = 4.2, 3.2
"""Inches of a panel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlotCurvesConfig:
    """Which runs, and what is drawn of them."""

    runs: tuple[str, ...] = ("out/smoke/tts",)
    """Run folders of recipes/tts.py or recipes/asr.py."""
    names: tuple[str, ...] = ()
    """What the legend calls them; empty: their folders' names."""
    panels: tuple[str, ...] = ()
    """Which columns, in the runs' own order: tasks and groups of codebooks, such as tts and
    codebook_2; empty: all."""
    out: str = "out/curves.png"
    """The picture."""
    smooth: int = 1
    """Training losses are means over so many log lines."""
    most: float | None = None
    """The highest loss that is drawn; null: as high as they are."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs is empty; give run folders: runs=[out/a,out/b]")
        if self.names and len(self.names) != len(self.runs):
            raise ValueError(f"{len(self.runs)} runs, but {len(self.names)} names")
        if self.smooth < 1:
            raise ValueError(f"smooth must be at least 1, got {self.smooth}")


class Curve(NamedTuple):
    """Losses of one task in one run."""

    steps: np.ndarray
    """(N,)"""
    losses: np.ndarray
    """(N,)"""


class Stage(NamedTuple):
    """One stage of a run."""

    train: dict[str, Curve]
    """By task or group of codebooks."""
    dev: dict[str, Curve]
    hours_per_step: float | None


def main(argv: list[str]) -> None:
    config = load_config(PlotCurvesConfig, argv, "Draw the learning curves of runs.")
    names = config.names or names_of(config.runs)
    runs = {name: read_run(Path(folder)) for name, folder in zip(names, config.runs, strict=True)}
    draw(Path(config.out), runs, config)
    last = {
        name: {
            f"{kind}/{panel}": round(float(curve.losses[-1]), 4)
            for stage in stages.values()
            for kind, curves in (("train", stage.train), ("dev", stage.dev))
            for panel, curve in curves.items()
        }
        for name, stages in runs.items()
    }
    print(json.dumps({"out": config.out, "last": last}))


def names_of(runs: tuple[str, ...]) -> list[str]:
    """The folders' names, or their paths where two have the same."""
    short = [Path(folder).name for folder in runs]
    if len(set(short)) == len(runs):
        return short
    if len(set(runs)) < len(runs):
        raise ValueError(f"a run is given twice: {', '.join(runs)}")
    return list(runs)


def read_run(folder: Path) -> dict[str, Stage]:
    """The stages of a run by name. Raises ValueError where there is none."""
    stages = {
        name: read_stage(folder / name)
        for name in ("ar", "nar")
        if (folder / name / METRICS_FILE).is_file()
    }
    if not stages:
        raise ValueError(f"{folder}: no ar/{METRICS_FILE}; give the run folder of a training")
    return stages


def read_stage(folder: Path) -> Stage:
    """Its curves; a line that a kill has torn is left out."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / METRICS_FILE).read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        for key, value in values.items():
            if key.endswith(SUFFIX):
                points.setdefault(key.removesuffix(SUFFIX), []).append((values["step"], value))
    curves: dict[str, dict[str, Curve]] = {"train": {}, "dev": {}}
    for key, found in points.items():
        kind, _, panel = key.partition("/")
        if kind in curves:
            steps, losses = zip(*sorted(dict(found).items()), strict=True)
            curves[kind][panel] = Curve(np.array(steps), np.array(losses))
    seen = folder / SEEN_FILE
    hours = json.loads(seen.read_text())["hours_per_step"] if seen.is_file() else None
    return Stage(curves["train"], curves["dev"], hours)


def draw(out: Path, runs: dict[str, dict[str, Stage]], config: PlotCurvesConfig) -> None:
    """Writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [stage for run in runs.values() for stage in run.items()]
    panels = list(
        dict.fromkeys((name, key) for name, stage in stages for key in [*stage.train, *stage.dev])
    )
    if not panels:
        raise ValueError("the runs have logged no losses yet")
    known = [panel for _, panel in panels]
    if unknown := [panel for panel in config.panels if panel not in known]:
        raise ValueError(f"panels: the runs have no {unknown[0]}; they have {', '.join(known)}")
    panels = [pair for pair in panels if not config.panels or pair[1] in config.panels]
    timed = any(stage.hours_per_step for _, stage in stages)
    rows = 2 if timed else 1
    figure, axes = pyplot.subplots(
        rows, len(panels), figsize=(WIDTH * len(panels), HEIGHT * rows), squeeze=False
    )
    colors = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    for column, (name, panel) in enumerate(panels):
        for number, (label, run) in enumerate(runs.items()):
            if name not in run:
                continue
            color = colors[number % len(colors)]
            for row, scale in enumerate((1.0, run[name].hours_per_step)[:rows]):
                if scale is not None:
                    _draw_panel(axes[row, column], run[name], panel, scale, (label, color), config)
        axes[0, column].set_title(f"{name}: {panel}", fontsize=10)
        axes[0, column].legend(fontsize=8)
        for row, what in enumerate(("steps", "hours of speech seen")[:rows]):
            axes[row, column].set_xlabel(what)
            axes[row, column].grid(alpha=0.3)
            if config.most is not None:
                axes[row, column].set_ylim(top=config.most)
    for row in range(rows):
        axes[row, 0].set_ylabel("loss (nats)")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _draw_panel(
    axis: Any, stage: Stage, panel: str, scale: float, style: tuple[str, str],
    config: PlotCurvesConfig,
) -> None:  # fmt: skip
    """Both curves of one run; `style` is its label and colour."""
    label, color = style
    if panel in stage.train:
        steps, losses = smoothed(stage.train[panel], config.smooth)
        axis.plot(steps * scale, losses, color=color, linewidth=0.8, alpha=0.6, label=label)
    if panel in stage.dev:
        steps, losses = stage.dev[panel]
        axis.plot(
            steps * scale, losses, color=color, linewidth=2, marker="o", markersize=3,
            label=f"{label}, dev",
        )  # fmt: skip


def smoothed(curve: Curve, window: int) -> Curve:
    """Means over `window` points, and as many as there are at the ends."""
    if window == 1:
        return curve
    ones = np.ones(min(window, len(curve.losses)))
    means = np.convolve(curve.losses, ones, "same") / np.convolve(
        np.ones_like(curve.losses), ones, "same"
    )
    return Curve(curve.steps, means)


if __name__ == "__main__":
    run_program(main)
