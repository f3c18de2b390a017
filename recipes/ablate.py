"""Trains, exports, probes and scores the codecs of a plan, and prints the table with significance.

    python recipes/ablate.py --plan recipes/configs/ablations/dmcodec_table3.yaml
    python recipes/ablate.py processes=8 --plan FILE --out DIR --rows "SM 0.2 LM 0.8" "SM 0 LM 1"

A row of a plan is a codec: configurations of recipes/train_codec.py, and key=value on top. Started
again, the same command runs what is not complete; an interrupted training resumes. OUT/table.md is
the table: each number, and in brackets its difference from the row `baseline` with a 95 % interval
over paired utterances, a star where that excludes 0, and the epsilon of almost stochastic order (0:
the row dominates; below 0.5: it is better).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from codec.config import at_least
from codec.io import FileLock, atomic_file, parse_json, sha256_of
from codec.program import ArgumentParser, counted, did_you_mean
from codec.training.run import resolved
from eval.benchmark import Row
from eval.metrics import HIGHER_IS_BETTER
from eval.stats import Sums, almost_stochastic_order, paired_difference
from recipes.lib.codec_training import TrainCodecConfig, check_codec, starting_architecture
from recipes.lib.commands import HERE, Command, launch, run
from recipes.lib.config import load_config as read_config
from recipes.lib.config import naming_key
from recipes.lib.run import finished, load_config, run_recipe
from recipes.scoring.judges import safe_name
from recipes.scoring.rows import ORIGINAL, read_rows

PERCENT = ("wer", "wil", "mer", "cer", "probe_wer", "probe_cer")
"""Metrics that the table shows in percent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRow:
    """One codec of a plan."""

    name: str
    """Name in the table, and of its folder in `out`."""
    configs: tuple[str, ...] = ()
    """Configurations of recipes/train_codec.py, after those of the plan."""
    settings: tuple[str, ...] = ()
    """key=value of recipes/train_codec.py, after those of the plan."""
    codec: str = ""
    """A trained codec, folder or hub id, that is scored as it is; empty: the row is trained."""
    codebooks: int | None = None
    """Codebooks to reconstruct with; null: all."""
    published: dict[str, float] = field(default_factory=dict)
    """The paper's numbers by metric, in the table's units."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or "=" in self.name or self.name == ORIGINAL:
            raise ValueError(
                f"rows: {self.name!r} is no name: it must not be empty, be {ORIGINAL}, or contain "
                "/ or ="
            )
        if self.codec and (self.configs or self.settings):
            raise ValueError(f"rows: {self.name} names a trained codec: leave its settings out")


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationPlan:
    """The codecs of an ablation, their data and their scores."""

    out: str = "out/ablations/smoke"
    """Folder of the plan; the same plan resumes in it."""
    configs: tuple[str, ...] = ("recipes/configs/codec/smoke.yaml",)
    """Configurations of recipes/train_codec.py that all rows have."""
    settings: tuple[str, ...] = ()
    """key=value of recipes/train_codec.py that all rows have."""
    rows: tuple[AblationRow, ...] = ()
    """The codecs."""
    baseline: str = ""
    """Row that the others are compared with; empty: the first."""
    train: Path = Path("out/smoke/cuts/train.jsonl.gz")
    """Cuts that train the codecs."""
    dev: Path = Path("out/smoke/cuts/dev.jsonl.gz")
    """Cuts that validate the codecs."""
    probe_train: Path | None = None
    """Cuts that train the probe; null: `train`."""
    probe_dev: Path | None = None
    """Cuts that the probe is scored on; null: `dev`."""
    test: Path | None = None
    """Cuts to reconstruct and score; null: `dev`."""
    sample: int | None = None
    """Random recordings of `test` to score; null: all."""
    seed: int = 42
    """Of the sample and the probe (2410.15017, section 3)."""
    judge: str = "models/whisper-base"
    """ASR of the word error rates, folder or hub id."""
    speaker: str | None = None
    """Speaker encoder, folder or hub id; null: no similarity."""
    probe: str = "small"
    """--setting of `benchmark.py tokens`: small or paper."""
    probe_epochs: int | None = None
    """Epochs of the probe; null: the setting's."""
    accelerate: str = "cpu"
    """File of recipes/accelerate that launches the training, without .yaml."""
    processes: int = 1
    """Processes of training and export; batches are per process."""
    metrics: tuple[str, ...] = (
        *("wer", "wil", "visqol", "stoi", "similarity"),
        *("probe_wer", "probe_cer", "mi_vclub"),
    )
    """Columns of the table, of those that are scored."""

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if not names:
            raise ValueError("rows: the plan has none")
        folders = [safe_name(name) for name in names]
        for name, folder in zip(names, folders, strict=True):
            if folders.count(folder) > 1:
                raise ValueError(f"rows: two are called {name}")
        if self.baseline and self.baseline not in names:
            raise ValueError(
                f"baseline: no row is called {self.baseline!r}{did_you_mean(self.baseline, names)}"
            )
        at_least(1, processes=self.processes)
        if not (HERE / "accelerate" / f"{self.accelerate}.yaml").is_file():
            raise ValueError(f"accelerate: no file recipes/accelerate/{self.accelerate}.yaml")


class AblationStep(NamedTuple):
    """A command of a row, and the digest of all that its results depend on."""

    name: str
    command: Command
    digest: str


def folder_of(plan: AblationPlan, row: AblationRow) -> Path:
    """Returns the folder of a row's codec, tokens and record."""
    return Path(plan.out) / "rows" / safe_name(row.name)


def scores_of(plan: AblationPlan) -> Path:
    """Returns the folder of the scores of all rows."""
    return Path(plan.out) / "scores"


def training_arguments(plan: AblationPlan, row: AblationRow) -> list[str]:
    """Returns the arguments of recipes/train_codec.py for a row."""
    files = [f"--config={file}" for file in (*plan.configs, *row.configs)]
    lists = [f"train={plan.train}", f"dev={plan.dev}"]
    out = f"out={folder_of(plan, row) / 'codec'}"
    return [*files, *lists, *plan.settings, *row.settings, out]


def probe_command(plan: AblationPlan, row: AblationRow, codec: str) -> list[str]:
    """Returns the command that scores a row's tokens: `benchmark.py tokens`."""
    tokens = folder_of(plan, row) / "tokens"
    arguments = ["tokens", "--codec", f"{row.name}={codec}", "--train", str(tokens / "train")]
    arguments += ["--dev", f"dev={tokens / 'dev'}", "--setting", plan.probe]
    if plan.probe_epochs is not None:
        arguments += ["--epochs", str(plan.probe_epochs)]
    arguments += ["--seed", str(plan.seed), "--out", str(scores_of(plan))]
    return [sys.executable, str(HERE / "benchmark.py"), *arguments]


def reconstruction_command(plan: AblationPlan, row: AblationRow, codec: str) -> list[str]:
    """Returns the command that scores a row's reconstructions."""
    arguments = ["reconstruction", "--codec", codec, "--name", row.name]
    arguments += ["--cuts", str(plan.test or plan.dev), "--judge", plan.judge]
    if row.codebooks is not None:
        arguments += ["--codebooks", str(row.codebooks)]
    if plan.speaker is not None:
        arguments += ["--speaker", plan.speaker]
    if plan.sample is not None:
        arguments += ["--sample", str(plan.sample), "--seed", str(plan.seed)]
    arguments += ["--out", str(scores_of(plan))]
    return [sys.executable, str(HERE / "benchmark.py"), *arguments]


def steps_of(plan: AblationPlan, row: AblationRow) -> list[AblationStep]:
    """Returns the steps of a row in their order.

    Raises:
        ValueError: the row's configuration is invalid, or a list of cuts is missing.
    """
    lists = {
        "train": plan.probe_train or plan.train,
        "dev": plan.probe_dev or plan.dev,
        "test": plan.test or plan.dev,
        "codec": plan.train,
    }
    for path in lists.values():
        if not path.is_file():
            raise ValueError(f"{path}: no such list of cuts (recipes/prepare_data.py writes it)")
    folder, state = folder_of(plan, row), [sha256_of(path) for path in lists.values()]
    codec, commands = row.codec or str(folder / "codec" / "codec"), []
    if not row.codec:
        arguments = training_arguments(plan, row)
        with naming_key(f"row {row.name}"):
            config = read_config(TrainCodecConfig, arguments)
            architecture = starting_architecture(config.codec, config.start_from)
            check_codec(architecture, config.losses, config.resynthesis, config.start_from)
        state += [json.dumps(resolved(config), sort_keys=True), str(plan.processes)]
        command = launch(plan.accelerate, plan.processes, "train_codec.py", *arguments)
        commands.append(("train", f"train {row.name}", command))
    for split in ("train", "dev"):
        arguments = [f"cuts={lists[split]}", f"codec={codec}", f"out={folder / 'tokens' / split}"]
        command = [sys.executable, str(HERE / "export_tokens.py"), *arguments]
        if plan.processes > 1:
            command = launch(plan.accelerate, plan.processes, "export_tokens.py", *arguments)
        commands.append((f"export {split}", f"export the {split} tokens of {row.name}", command))
    probe, score = probe_command(plan, row, codec), reconstruction_command(plan, row, codec)
    commands.append(("probe", f"probe the tokens of {row.name}", probe))
    commands.append(("score", f"score the reconstructions of {row.name}", score))
    steps = []
    for name, what, command in commands:
        # The training's configuration is in the state already, its launch depends on the machine.
        state += [name] if name == "train" else command[1:]
        steps.append(AblationStep(name, Command(what, command), sha256_of("\n".join(state), 16)))
    return steps


class Record:
    """done.json of a row: the digests of its complete steps."""

    def __init__(self, folder: Path):
        self._file = folder / "done.json"
        self._done: dict[str, str] = {}
        if self._file.is_file():
            self._done = parse_json(self._file.read_text(encoding="utf-8"))

    def __contains__(self, step: AblationStep) -> bool:
        return self._done.get(step.name) == step.digest

    def add(self, step: AblationStep) -> None:
        """Records that a step is complete."""
        self._done[step.name] = step.digest
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._file) as temporary:
            temporary.write_text(json.dumps(self._done, indent=1), encoding="utf-8")


def run_steps(plan: AblationPlan, rows: Sequence[AblationRow]) -> None:
    """Runs the steps of the rows that are not complete.

    Raises:
        ValueError: a row is invalid (nothing has been run then), or a step failed.
    """
    planned = {row.name: steps_of(plan, row) for row in rows}
    total, number = sum(map(len, planned.values())), 0
    for row in rows:
        record = Record(folder_of(plan, row))
        for step in planned[row.name]:
            number += 1
            if step in record:
                line = f"\n[{number}/{total}] {step.command.what}: complete"
                print(line, file=sys.stderr, flush=True)
                continue
            run(step.command, number, total, quiet=True)
            record.add(step)


class RowScores(NamedTuple):
    """A metric of a row."""

    value: float
    sums: dict[str, tuple[float, float]]
    """Numerator and denominator of each utterance."""


def read_scores(rows: Sequence[Row], name: str) -> dict[str, RowScores]:
    """Returns the newest scores of a plan's row by metric: those of its reconstructions (system
    NAME) and of codebook 1 in `benchmark.py tokens` (system NAME-1)."""
    systems = {name: "reconstruction", f"{name}-1": "tokens"}
    found: dict[str, RowScores] = {}
    own = [row for row in rows if systems.get(row.system) == row.part and "/" not in row.list]
    for newest in {row.metric: row for row in own if row.utterance is None}.values():
        origin = (newest.list, newest.metric, newest.config, newest.model)
        found[newest.metric] = RowScores(
            newest.value,
            {
                row.utterance: (row.value * row.n, float(row.n))
                for row in own
                if row.utterance is not None
                and (row.list, row.metric, row.config, row.model) == origin
            },
        )
    return found


def difference(metric: str, baseline: RowScores, other: RowScores) -> str:
    """Returns "-0.31 [-0.60, -0.02]*, eps 0.12" for the utterances that both have; "" if there are
    none. Epsilon is that of almost stochastic order of `other` over the baseline, for metrics that
    have a better direction."""
    shared = [one for one in baseline.sums if one in other.sums]
    pairs = np.array(
        [(*baseline.sums[one], *other.sums[one]) for one in shared], np.float64
    ).reshape(-1, 4)
    pairs = pairs[(pairs[:, 1] > 0) & (pairs[:, 3] > 0)]
    if not len(pairs):
        return ""
    interval = paired_difference(Sums(pairs[:, 0], pairs[:, 1]), Sums(pairs[:, 2], pairs[:, 3]))
    if interval.low is None or interval.high is None:
        return f"{interval.value:+.3f}"
    star = "*" if interval.low > 0 or interval.high < 0 else ""
    text = f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]{star}"
    higher = HIGHER_IS_BETTER.get(metric.removeprefix("probe_"))
    if higher is None:
        return text
    sign = 1 if higher else -1
    epsilon = almost_stochastic_order(
        sign * pairs[:, 2] / pairs[:, 3], sign * pairs[:, 0] / pairs[:, 1]
    )
    return f"{text}, eps {epsilon:.2f}"


def scaled(scores: Mapping[str, RowScores]) -> dict[str, RowScores]:
    """Returns the scores in the table's units."""
    return {
        metric: RowScores(
            100 * one.value, {name: (100 * top, low) for name, (top, low) in one.sums.items()}
        )
        if metric in PERCENT
        else one
        for metric, one in scores.items()
    }


def table_of(plan: AblationPlan, rows: Sequence[Row]) -> str:
    """Returns the Markdown table of the rows that have scores; a paper's numbers have columns of
    their own."""
    names = [ORIGINAL, *(row.name for row in plan.rows)]
    scores = {name: scaled(read_scores(rows, name)) for name in names}
    published = {row.name: row.published for row in plan.rows}
    baseline = plan.baseline or plan.rows[0].name
    header, columns = ["row"], []
    for metric in plan.metrics:
        if any(metric in scores[name] for name in names):
            columns.append((metric, False))
            header.append(f"{metric} (%)" if metric in PERCENT else metric)
        if any(metric in own for own in published.values()):
            columns.append((metric, True))
            header.append(f"{metric}, paper")
    lines = [header, ["---"] * len(header)]
    for name in names:
        if not scores[name]:
            continue
        cells = [f"{name} (baseline)" if name == baseline else name]
        for metric, from_paper in columns:
            if from_paper:
                cells.append(
                    f"{published[name][metric]:g}" if metric in published.get(name, {}) else ""
                )
                continue
            own = scores[name].get(metric)
            cell = "" if own is None else f"{own.value:.3f}"
            if own is not None and name not in (ORIGINAL, baseline) and metric in scores[baseline]:
                compared = difference(metric, scores[baseline][metric], own)
                cell += f" ({compared})" if compared else ""
            cells.append(cell)
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the plan")
    parser.add_argument("--plan", required=True, help="file of recipes/configs/ablations")
    parser.add_argument("--out", help="folder (default: the plan's)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows (default: all)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Runs a plan, and prints its table.

    Raises:
        ValueError: the plan is invalid, or a step failed.
    """
    args = _parse(argv)
    plan = load_config(AblationPlan, ["--config", args.plan, *args.settings])
    plan = plan if args.out is None else replace(plan, out=args.out)
    names = [row.name for row in plan.rows]
    for name in args.rows or []:
        if name not in names:
            raise ValueError(f"--rows: no row is called {name!r}{did_you_mean(name, names)}")
    rows = [row for row in plan.rows if args.rows is None or row.name in args.rows]
    Path(plan.out).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(plan.out)):
        run_steps(plan, rows)
        table = table_of(plan, read_rows(scores_of(plan) / "rows.jsonl"))
        path = Path(plan.out) / "table.md"
        with atomic_file(path) as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
    print(table)
    finished(
        f"{counted(len(rows), 'row')} of {args.plan}", path,
        f"python recipes/benchmark.py report {scores_of(plan)}",
    )  # fmt: skip


if __name__ == "__main__":
    run_recipe(main)
