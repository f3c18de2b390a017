import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT
from launched.tiny_training import TinyConfig

from codec.training import run as provenance
from codec.training.run import Run, git_revision, make_accelerator, start_run
from recipes.lib.run import finished, run_recipe

TRAINING = ROOT / "tests" / "launched" / "tiny_training.py"
CHECKPOINTS = "checkpoints/step-0000000"


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """One process on the CPU; accelerate's global state is put back afterwards."""
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def run(tmp_path: Path, accelerator: Accelerator) -> Run:
    return start_run(TinyConfig(), tmp_path / "run", seed=0, accelerator=accelerator)


def prepare(accelerator: Accelerator) -> tuple[torch.nn.Module, Any, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return accelerator.prepare(model, optimizer, schedule)


def step(model: torch.nn.Module, optimizer: Any, schedule: Any) -> None:
    model(torch.rand(4, 3)).square().mean().backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


# Run folders


def test_the_run_folder_says_what_ran(run: Run) -> None:
    assert yaml.safe_load((run.folder / "config.yaml").read_text()) == {"width": 8}
    noted = json.loads((run.folder / "run.json").read_text())
    assert noted["seed"] == 0
    (start,) = noted["starts"]
    assert start["git"] == git_revision()
    assert start["packages"]["torch"] == torch.__version__.split("+")[0]
    assert start["num_processes"] == 1
    assert start["machine"]["cores"] == os.cpu_count()


def test_a_launch_with_fewer_processes_than_asked_for_is_refused(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARLANCE_NUM_PROCESSES", "1")
    assert make_accelerator().num_processes == 1
    monkeypatch.setenv("PARLANCE_NUM_PROCESSES", "4")
    with pytest.raises(ValueError, match=r"^4 process\(es\) were asked for, and.* has 1:"):
        make_accelerator()


def test_two_runs_in_one_folder_are_refused_until_the_first_ends(
    run: Run, accelerator: Accelerator
) -> None:
    with pytest.raises(ValueError, match=rf"in this folder \(pid {os.getpid()}\)"):
        start_run(TinyConfig(), run.folder, seed=0, accelerator=accelerator)
    folder = run.folder
    run.close()
    start_run(TinyConfig(), folder, seed=0, accelerator=accelerator).close()
    assert len(json.loads((folder / "run.json").read_text())["starts"]) == 2


def test_a_forked_child_does_not_keep_the_lock(run: Run, accelerator: Accelerator) -> None:
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    run.close()
    start_run(TinyConfig(), run.folder, seed=0, accelerator=accelerator).close()
    os.write(go[1], b"x")
    os.waitpid(child, 0)


def test_another_configuration_is_refused_by_key(run: Run, accelerator: Accelerator) -> None:
    run.close()
    with pytest.raises(ValueError, match=r"another configuration: width \(8 -> 9\)"):
        start_run(TinyConfig(width=9), run.folder, seed=0, accelerator=accelerator)


@pytest.mark.parametrize("content", ["[", "{a: b", "&a [*a]", "\0", "[" * 1000])
@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_damaged_file_of_a_run_is_named(
    run: Run, accelerator: Accelerator, name: str, content: str
) -> None:
    run.close()
    (run.folder / name).write_text(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        start_run(TinyConfig(), run.folder, seed=0, accelerator=accelerator)


def test_keys_that_are_free_may_change(tmp_path: Path, accelerator: Accelerator) -> None:
    @dataclass
    class Told:
        widths: dict[str, int]
        width_of: int = 1

    def start(*args: Any, free: tuple[str, ...] = ("widths",)) -> None:
        start_run(Told(*args), tmp_path, seed=0, accelerator=accelerator, free=free).close()

    start({"a": 1})
    start({"a": 2})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["widths"] == {"a": 2}
    with pytest.raises(ValueError, match=r"another configuration: width_of \(1 -> 2\); choose"):
        start({"a": 3}, 2, free=("widths", "width"))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["widths"] == {"a": 2}


def test_a_run_folder_may_move(tmp_path: Path, accelerator: Accelerator) -> None:
    @dataclass
    class Placed:
        out: str
        max_skipped_steps: int = 10

    start_run(Placed(str(tmp_path / "a")), tmp_path / "a", seed=0, accelerator=accelerator).close()
    moved = (tmp_path / "a").rename(tmp_path / "b")
    start_run(Placed(str(moved), 3), moved, seed=0, accelerator=accelerator).close()
    assert yaml.safe_load((moved / "config.yaml").read_text())["out"] == str(moved)


def test_git_revision_outside_a_checkout_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    assert git_revision() == "unknown"


# Checkpoints


def test_resuming_restores_weights_schedule_and_generators(
    run: Run, accelerator: Accelerator
) -> None:
    objects = prepare(accelerator)
    assert run.resume() == 0
    step(*objects)
    run.save(1)
    step(*objects)
    expected = objects[0].weight.detach().clone(), objects[2].get_last_lr(), torch.rand(3)
    step(*objects)
    torch.rand(5)
    assert run.resume() == 1
    step(*objects)
    assert torch.equal(objects[0].weight, expected[0])
    assert objects[2].get_last_lr() == expected[1]
    assert torch.equal(torch.rand(3), expected[2])


def test_only_the_newest_checkpoints_stay(run: Run, accelerator: Accelerator) -> None:
    prepare(accelerator)
    for number in (2, 4, 6, 6, 8):
        run.save(number)
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize(
    "harm",
    [
        *("missing file", "short file", "cut in half", "flipped bit"),
        *("no seal", "half a seal", "other seal"),
    ],
)
def test_a_damaged_checkpoint_is_removed_and_the_one_before_used(
    run: Run, accelerator: Accelerator, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(accelerator)
    run.save(1)
    run.save(2)
    newest = run.folder / f"{CHECKPOINTS}2"
    weights, seal = newest / "model.safetensors", newest / "whole.json"
    if harm == "missing file":
        weights.unlink()
    elif harm == "short file":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif harm == "cut in half":
        content = (newest / "optimizer.bin").read_bytes()
        (newest / "optimizer.bin").write_bytes(content[: len(content) // 2])
    elif harm == "flipped bit":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif harm == "no seal":
        seal.unlink()
    else:
        seal.write_text(seal.read_text()[:20] if harm == "half a seal" else "[]")
    assert run.resume() == 1
    kind = "corrupted (model.safetensors)" if harm == "flipped bit" else "incomplete ("
    assert f"{newest}: {kind}" in caplog.text
    assert "removed; the newest complete checkpoint is used" in caplog.text
    # It must not stand in for the one that is saved at its step, nor count as one that is kept.
    assert not newest.exists()
    run.save(2)
    run.save(3)
    assert run.resume() == 3
    assert newest.is_dir()


def test_if_no_checkpoint_is_complete_none_is_removed(run: Run, accelerator: Accelerator) -> None:
    """A training of weeks must not begin again unasked."""
    prepare(accelerator)
    for number in (1, 2):
        run.save(number)
        (run.folder / f"{CHECKPOINTS}{number}" / "optimizer.bin").write_bytes(b"half")
    run.log({"loss": 1.0}, 1)
    with pytest.raises(ValueError, match=r"no checkpoint is complete \(step-00000002: incomplete"):
        run.resume()
    assert len(list((run.folder / "checkpoints").iterdir())) == 2
    assert (run.folder / "metrics.jsonl").read_text()
    (run.folder / f"{CHECKPOINTS}2" / "whole.json").write_text('{"sizes": {"\\n": 1}}')
    with pytest.raises(ValueError, match=r"step-00000002: incomplete \( ?\); step"):
        run.resume()
    for outside in ("/", "../x"):
        content = json.dumps({"sizes": {}, "crc32": {outside: 1}})
        (run.folder / f"{CHECKPOINTS}2" / "whole.json").write_text(content)
        with pytest.raises(ValueError, match=r"step-00000002: corrupted \(whole\.json\); step"):
            run.resume()


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(
    run: Run, accelerator: Accelerator
) -> None:
    prepare(accelerator)
    run.save(1)
    seal = run.folder / f"{CHECKPOINTS}1" / "whole.json"
    content = json.loads(seal.read_text())
    assert content.pop("crc32").keys() == content["sizes"].keys()
    seal.write_text(json.dumps(content))
    assert run.resume() == 1


def test_a_kill_before_the_oldest_checkpoint_went_leaves_none_too_many(
    run: Run, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(accelerator)
    with monkeypatch.context() as patched:
        patched.setattr(run, "_keep", 3)
        for number in (1, 2, 3):
            run.save(number)
    assert run.resume() == 3
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003"]


def test_temporary_folders_of_a_killed_run_go(run: Run, accelerator: Accelerator) -> None:
    prepare(accelerator)
    run.save(1)
    leftover = run.folder / "checkpoints" / ".step-00000002.tmp"
    leftover.mkdir()
    assert run.resume() == 1
    assert not leftover.exists()


def test_a_launch_of_another_size_is_refused(run: Run, accelerator: Accelerator) -> None:
    prepare(accelerator)
    run.save(1)
    seal = run.folder / f"{CHECKPOINTS}1" / "whole.json"
    before = seal.read_text()
    for written, found in (('"num_processes": 4', "4"), ('"other": 1', "None")):
        seal.write_text(before.replace('"num_processes": 1', written))
        with pytest.raises(ValueError, match=f"num_processes {found}, but this launch has 1"):
            run.resume()


@pytest.mark.parametrize("part", ["weight", "buffer", "optimizer"])
def test_a_checkpoint_with_nan_is_not_written(
    run: Run, accelerator: Accelerator, part: str
) -> None:
    model, optimizer, schedule = prepare(accelerator)
    model.register_buffer("average", torch.zeros(2))
    model.register_buffer("mask", torch.tensor([-torch.inf]), persistent=False)
    step(model, optimizer, schedule)
    run.save(1)
    state = next(iter(optimizer.state.values()))
    spoilt = {"weight": model.weight, "buffer": model.average, "optimizer": state["exp_avg"]}
    with torch.no_grad():
        spoilt[part].view(-1)[1] = torch.nan
    with pytest.raises(ValueError, match=r"before step 2: .*; step-00000001 is the newest"):
        run.save(2)
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_diverged_run_names_the_checkpoint_to_remove(run: Run, accelerator: Accelerator) -> None:
    """Finite weights may have diverged all the same, and the same command would fail again."""
    prepare(accelerator)
    assert run.newest_name() == "there is no checkpoint"
    run.save(1)
    assert run.newest_name() == "step-00000001 is the newest checkpoint"
    run.save(2)
    newest = run.folder / f"{CHECKPOINTS}2"
    assert run.newest_name().endswith(f" (remove {newest} to resume from step-00000001)")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from codec.training.run import start_run
from launched.tiny_training import TinyConfig
run = start_run(TinyConfig(), Path(sys.argv[1]), seed=0, accelerator=Accelerator(cpu=True))
model = torch.nn.Linear(300, 300)
model, optimizer = run.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
run.save(1)
model(torch.rand(1, 300)).sum().backward()
optimizer.step()  # Its state makes the next checkpoint larger.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (400_000, 100_000):  # Too small for the optimiser's state; for the weights, too.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run.save(2)
    except OSError as error:
        print(type(error).__name__, error)
print(run.resume())
"""


def test_a_full_disk_leaves_earlier_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    *said, step_loaded = done.stdout.splitlines()
    assert len(said) == 2
    for line in said:
        assert line.startswith(f"WriteError {tmp_path / (CHECKPOINTS + '2')}: could not be written")
    assert step_loaded == "1"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


# Metrics


def test_metrics_are_lines_and_resuming_drops_what_will_be_repeated(
    run: Run, accelerator: Accelerator
) -> None:
    prepare(accelerator)
    for number in range(4):
        run.log({"loss": number / 2}, step=number)
        if number == 2:
            run.save(2)
    metrics = run.folder / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write('{"step": {}}\n[]\n{"loss": 1}\n{"step": "1"}\n')  # Of another program.
        file.write('{"step": 4, "lo')  # Killed here.
    run.resume()

    def lines() -> list[dict[str, float]]:
        return [json.loads(line) for line in metrics.read_text().splitlines()]

    assert [line["step"] for line in lines()] == [0, 1, 2]


def test_what_is_not_finite_is_null_in_the_metrics(run: Run) -> None:
    values = {"loss": float("nan"), "norm": float("inf"), "lr": 0.5}
    run.log(values, step=1)
    line = (run.folder / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "loss": null, "norm": null, "lr": 0.5}\n'


def test_a_stage_has_its_own_metrics_and_checkpoints(run: Run, accelerator: Accelerator) -> None:
    prepare(accelerator)
    stage = run.stage("ar")
    stage.log({"loss": 1.0}, step=0)
    stage.save(3)
    assert (run.folder / "ar" / "metrics.jsonl").is_file()
    assert run.resume() == 0
    assert run.stage("ar").resume() == 3


# Programs


def test_mistakes_end_with_status_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", "a=1"])

    def mistake(argv: list[str]) -> None:
        raise ValueError(f"{argv[0]}: no such key")

    with pytest.raises(SystemExit) as stopped:
        run_recipe(mistake)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: a=1: no such key\n"

    def fault(argv: list[str]) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        run_recipe(fault)
    monkeypatch.setenv("PARLANCE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such key"):
        run_recipe(mistake)


def test_a_finished_recipe_prints_result_place_and_next_command_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, expected in (
        ("0", ["Finished: a codec", "    in out/x", "Next: codec info out/x"]),
        ("1", []),
    ):
        monkeypatch.setenv("RANK", rank)
        finished("a codec", "out/x", "codec info out/x")
        printed = capsys.readouterr()
        assert (printed.out, printed.err.splitlines()) == ("", expected)


# Launches


def test_a_mistake_under_two_ranks_is_said_once(tmp_path: Path, launch: Callable[..., Any]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("width: 7\n")
    done = launch("ddp", TRAINING, str(tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "width (7 -> 8)" in done.stderr


@pytest.mark.parametrize("gpu", [True, False])
def test_programs_keep_memory_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    kept = []
    monkeypatch.setattr("recipes.lib.run.keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(sys, "argv", ["program"])
    run_recipe(lambda argv: None)
    assert bool(kept) != gpu
