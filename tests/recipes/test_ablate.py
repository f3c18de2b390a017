"""Plans of ablations: what the papers' rows change, what is run again, and the table."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from eval.benchmark import Provenance, Row, ScoredUtterance, rows_of, score_asr
from eval.stats import Sums, almost_stochastic_order, paired_difference
from recipes.ablate import (
    AblationPlan,
    AblationRow,
    folder_of,
    main,
    run_steps,
    scores_of,
    steps_of,
    table_of,
)
from recipes.benchmark import parse_arguments
from recipes.lib.codec_training import TrainCodecConfig
from recipes.lib.commands import Command
from recipes.lib.config import help_text, load_config
from recipes.scoring.rows import append_rows

PLANS = ROOT / "recipes" / "configs" / "ablations"
KEYS = {line.split(":")[0].strip() for line in help_text(TrainCodecConfig, "").splitlines()}


def plan_of(name: str) -> AblationPlan:
    return load_config(AblationPlan, ["--config", str(PLANS / f"{name}.yaml")])


@pytest.fixture
def plan(tmp_path: Path) -> AblationPlan:
    """Two rows of a sweep."""
    cuts = [tmp_path / name for name in ("train.jsonl.gz", "dev.jsonl.gz")]
    for path in cuts:
        path.write_bytes(b"a list")
    return AblationPlan(
        out=str(tmp_path / "out"), configs=(str(PLANS.parent / "codec" / "tiny.yaml"),),
        settings=("losses.weights.distill=1", "distill.speech.model=hubert"), sample=3,
        rows=(
            AblationRow(name="none", settings=("distill.speech.weight=0",)),
            AblationRow(
                name="0.5", settings=("distill.speech.weight=0.5",), published={"wer": 4.2}
            ),
        ),
        train=cuts[0], dev=cuts[1],
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in PLANS.glob("*.yaml")))
def test_every_row_of_a_plan_names_keys_and_files_that_exist(name: str) -> None:
    plan = plan_of(name)
    for row in plan.rows:
        assert all((ROOT / file).is_file() for file in (*plan.configs, *row.configs))
        for setting in (*plan.settings, *row.settings):
            assert setting.partition("=")[0] in KEYS
        different = {(each.configs, each.settings, each.codec) for each in plan.rows}
        assert len(different) == len(plan.rows)
        assert row.published.keys() <= set(plan.metrics)


def test_rows_of_dm_codec_are_those_of_its_tables() -> None:
    one, three = plan_of("dmcodec_table1"), plan_of("dmcodec_table3")
    assert (one.sample, one.seed, one.train.name) == (300, 42, "train-clean-100.jsonl.gz")
    assert [row.published["wer"] for row in one.rows] == [4.53, 4.49, 4.36, 4.05]
    weights = [[float(each.partition("=")[2]) for each in row.settings] for row in three.rows]
    assert weights == [
        [pytest.approx(i / 10), pytest.approx(1 - i / 10)] for i in range(10, -1, -1)
    ]
    best = min(three.rows, key=lambda row: row.published["wer"])
    assert (best.name, best.published) == ("SM 0.2 LM 0.8", {"wer": 4.07})
    assert [len(plan_of(f"dmcodec_table{i}").rows) for i in (4, 5, 6)] == [8, 6, 6]


def test_one_row_in_full() -> None:
    """Table 4, language model on the last codebook, speech model on the first."""
    plan = plan_of("dmcodec_table4")
    (row,) = [row for row in plan.rows if row.name == "LM RVQ-8 SM RVQ-1"]
    files = [f"--config={ROOT / file}" for file in row.configs]
    distill = load_config(TrainCodecConfig, [*files, *plan.settings, *row.settings]).distill
    assert (distill.text.codebooks, distill.speech.codebooks) == ("last", "first")
    assert (distill.text.model, distill.speech.model) == (
        "google-bert/bert-base-uncased", "facebook/hubert-base-ls960",
    )  # fmt: skip
    assert row.published == {"wer": 4.49, "wil": 7.24, "visqol": 3.30, "stoi": 0.938}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that are run, in name alone; "killed" fails the next one of its name."""
    names: list[str] = []

    def run(command: Command, number: int, total: int, *, quiet: bool) -> None:
        assert (1 <= number <= total, quiet) == (True, True)
        names.append(command.what)
        if command.what in names[:-1] and names[0] == "killed":
            raise ValueError("killed")

    monkeypatch.setattr("recipes.ablate.run", run)
    return names


def test_what_is_complete_is_not_run_again(plan: AblationPlan, ran: list[str]) -> None:
    def again(plan: AblationPlan) -> list[str]:
        ran.clear()
        run_steps(plan, plan.rows)
        return list(ran)

    published = AblationRow(name="published", codec="hub/id")
    plan = replace(plan, rows=(published, plan.rows[1]))
    first, second = (
        [f"{what} {name}" for what in (
            "train", "export the train tokens of", "export the dev tokens of",
            "probe the tokens of", "score the reconstructions of",
        )] for name in ("published", "0.5")
    )  # fmt: skip
    ran += ["killed", second[3]]
    with pytest.raises(ValueError, match="killed"):
        run_steps(plan, plan.rows)
    assert ran[2:] == [*first[1:], *second[:4]]
    assert again(plan) == second[3:]
    assert again(plan) == []
    # Another number of clips changes the scores alone, another list everything.
    assert again(replace(plan, sample=2)) == [first[4], second[4]]
    plan.dev.write_bytes(b"another")
    assert again(plan) == [*first[1:], *second]


def test_a_row_that_cannot_be_trained_stops_the_plan_before_anything_is_run(
    plan: AblationPlan, ran: list[str]
) -> None:
    wrong = AblationRow(name="bad", settings=("distill.speech.wieght=1",))
    message = r"^row bad: distill\.speech\.wieght: no such key; did you mean distill"
    with pytest.raises(ValueError, match=message):
        run_steps(plan, (AblationRow(name="published", codec="hub/id"), wrong))
    assert not ran
    plan.dev.unlink()
    with pytest.raises(ValueError, match=r"dev\.jsonl\.gz: no such list of cuts"):
        steps_of(plan, plan.rows[0])


def test_commands_are_those_of_our_programs(plan: AblationPlan) -> None:
    """A published codec is not trained; the benchmark parses the arguments of its parts."""
    row = AblationRow(name="EnCodec", codec="facebook/encodec_24khz", codebooks=8)
    steps = steps_of(replace(plan, speaker="speaker", probe_epochs=2), row)
    assert [step.name for step in steps] == ["export train", "export dev", "probe", "score"]
    probe, score = (parse_arguments(step.command.arguments[2:]) for step in steps[2:])
    tokens = folder_of(plan, row) / "tokens"
    assert (probe.kind, probe.codec, probe.epochs) == ("tokens", ["EnCodec=" + row.codec], 2)
    assert (probe.train, probe.dev) == (tokens / "train", [f"dev={tokens / 'dev'}"])
    assert (score.kind, score.codec, score.name) == ("reconstruction", [row.codec], "EnCodec")
    assert (score.codebooks, score.sample, score.seed, score.speaker) == ([8], 3, 42, "speaker")
    assert probe.out == score.out == scores_of(plan)
    trained = steps_of(plan, plan.rows[0])
    assert "distill.speech.weight=0" in trained[0].command.arguments
    assert f"codec={folder_of(plan, plan.rows[0])}/codec/codec" in trained[1].command.arguments


WORDS = "red green blue black white brown pink grey gold violet"


def scored(errors: list[int], stoi: list[float]) -> list[ScoredUtterance]:
    """Utterances of ten words, of which `errors` are missing."""
    return [
        replace(
            score_asr(f"u{i}", WORDS, " ".join(WORDS.split()[missing:])), values={"stoi": value}
        )
        for i, (missing, value) in enumerate(zip(errors, stoi, strict=True))
    ]


def test_the_table_compares_rows_with_the_baseline(plan: AblationPlan) -> None:
    few, many = [0, 1, 0, 0, 1, 0], [3, 4, 2, 3, 5, 3]
    same, better = [0.9, 0.8] * 3, [0.95, 0.85] * 3
    rows: list[Row] = []
    for system, errors, stoi, model in (
        ("original", [0] * 6, same, ""),
        ("none", [9] * 6, same, "an older training"),
        ("none", many, same, "a"),
        ("0.5", few, better, "b"),
    ):
        origin = Provenance(part="reconstruction", system=system, model=model)
        rows += rows_of("test", scored(errors, stoi), origin)
        origin = replace(origin, part="tokens", system=f"{system}-1")
        rows += rows_of("dev", [replace(one, values={}) for one in scored(errors, stoi)], origin)
    rows = [replace(row, metric=f"probe_{row.metric}") if row.part == "tokens" else row
            for row in rows]  # fmt: skip
    head, _, original, none, half = table_of(plan, rows).splitlines()
    assert head == "| row | wer (%) | wer, paper | wil (%) | stoi | probe_wer (%) | probe_cer (%) |"
    assert original.startswith("| original | 0.000 |  | 0.000 | 0.850 |")
    assert none.startswith("| none (baseline) | 33.333 |  |")
    sums = (Sums(100 * np.array(each, float), np.full(6, 10.0)) for each in (many, few))
    order = almost_stochastic_order(np.array(better), np.array(same))
    assert order < 0.5
    low, high = (f"{each:+.3f}" for each in paired_difference(*sums)[1:])
    assert half.split(" | ")[1:3] == [f"3.333 (-30.000 [{low}, {high}]*, eps 0.00)", "4.2"]
    assert half.split(" | ")[4] == f"0.900 (+0.050 [+0.050, +0.050]*, eps {order:.2f})"
    epsilon = almost_stochastic_order(np.array(few, float), np.array(few, float))
    assert epsilon > 0.5
    # Equal scores are no difference, and a row without scores is left out.
    equal = [replace(row, system=row.system.replace("0.5", "none")) for row in rows]
    equal += [replace(row, system=row.system.replace("none", "0.5")) for row in equal]
    *_, half = table_of(plan, [row for row in equal if row.model in ("", "b")]).splitlines()
    assert half.split(" | ")[1] == f"3.333 (+0.000 [+0.000, +0.000], eps {epsilon:.2f})"
    assert len(table_of(plan, rows[: len(rows) // 2]).splitlines()) == 4


def test_the_program(
    plan: AblationPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """--rows and --out, the printed table and its file."""

    def run(command: Command, *_: int, quiet: bool) -> None:
        if command.what.startswith("score"):
            origin = Provenance(part="reconstruction", system=command.what.split()[-1])
            out = Path(command.arguments[command.arguments.index("--out") + 1])
            out.mkdir(parents=True, exist_ok=True)
            append_rows(out / "rows.jsonl", rows_of("dev", scored([1, 2], [0.5, 0.5]), origin))

    monkeypatch.setattr("recipes.ablate.run", run)
    file = tmp_path / "plan.yaml"
    settings = {
        "configs": list(plan.configs), "settings": list(plan.settings),
        "train": str(plan.train), "dev": str(plan.dev), "metrics": ["stoi"],
        "rows": [{"name": row.name, "codec": "hub/id"} for row in plan.rows],
    }  # fmt: skip
    file.write_text(json.dumps(settings))
    out = tmp_path / "here"
    main(["seed=7", "--plan", str(file), "--out", str(out), "--rows", "0.5"])
    printed = capsys.readouterr()
    assert printed.out == (out / "table.md").read_text()
    assert printed.out.splitlines()[-1] == "| 0.5 | 0.500 |"
    main(["seed=7", "--plan", str(file), "--out", str(out)])
    assert "| none (baseline) | 0.500 |" in capsys.readouterr().out
    for given, message in (
        (["--rows", "0.55"], r"^--rows: no row is called '0\.55'; did you mean 0\.5\?"),
        (["baseline=x"], r"^baseline: no row is called 'x'"),
        (["accelerate=none"], r"^accelerate: no file recipes/accelerate/none\.yaml"),
        (["rows=[]"], r"^rows: the plan has none"),
        (["rows=[{name: a}, {name: a}]"], r"^rows: two are called a"),
        (["rows=[{name: a=b}]"], r"^rows: 'a=b' is no name"),
        (["rows=[{name: a, codec: b, settings: [c=d]}]"], "leave its settings out"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*given, "--plan", str(file), "--out", str(out)])
