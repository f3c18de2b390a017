"""The loop: metrics of step N are those of N updates, whoever trains; an interrupt saves a step; a
step that is not finite is skipped."""

import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT
from forking import ForkedRun

from codec.training.config import OptimConfig
from codec.training.loop import Interrupted, Meter, Phases, train_loop
from codec.training.optim import GuardedSteps, adamw, nan_unless_finite
from codec.training.run import start_run

LAUNCHED = ROOT / "tests" / "launched" / "tiny_loop.py"


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(
    folder: Path, accelerator: Accelerator, interrupt_at: int | None = None, profile_steps: int = 0
) -> list[int]:
    """Seven steps; returns those that were trained."""
    optim = OptimConfig(steps=7, log_every=2, eval_every=3, save_every=4, warmup_steps=0)
    run = start_run(
        optim, folder, seed=0, accelerator=accelerator, profile_steps=profile_steps
    )  # fmt: skip
    model = torch.nn.Linear(1, 1)
    model = accelerator.prepare(model)
    meter, trained = Meter(), []

    def step(number: int) -> None:
        trained.append(number)
        meter.add({"number": torch.tensor(float(number)), "batches": torch.ones(())})
        if number == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    phases = Phases(
        train_step=step,
        metrics=lambda reading: {"number": float(reading.sums["number"] / reading.sums["batches"])},
        evaluate=lambda number: {"dev/x": float(number)},
        evaluate_first=True,
    )
    try:
        train_loop(run, optim, phases, meter, "test")
    finally:
        run.close()
        accelerator.free_memory()
    return trained


def test_metrics_of_step_n_are_of_the_updates_before_it(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    assert train(tmp_path, accelerator) == list(range(7))
    found = lines(tmp_path)
    assert [(line["step"], line["train/number"]) for line in found if "train/number" in line] == [
        (2, 0.5), (4, 2.5), (6, 4.5), (7, 6.0),
    ]  # fmt: skip
    assert [line["step"] for line in found if "dev/x" in line] == [0, 3, 6, 7]
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000004", "step-00000007"]


def test_an_interrupt_saves_the_step_and_the_same_command_continues(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped at step 3; the same"):
        train(tmp_path / "a", accelerator, interrupt_at=2)
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "a" / "checkpoints" / "step-00000003" / "whole.json").is_file()
    assert train(tmp_path / "a", accelerator) == [3, 4, 5, 6]
    train(tmp_path / "b", accelerator)

    def steps(folder: Path) -> list[int]:
        return [line["step"] for line in lines(folder)]

    assert steps(tmp_path / "a") == steps(tmp_path / "b")


def test_an_interrupt_of_the_last_step_is_not_lost(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    """What follows the training in a program would take its time."""
    with pytest.raises(Interrupted, match="stopped at step 7; the same"):
        train(tmp_path, accelerator, interrupt_at=6)
    assert train(tmp_path, accelerator) == []


def test_a_profile_is_a_trace_and_a_table(tmp_path: Path, accelerator: Accelerator) -> None:
    train(tmp_path, accelerator, profile_steps=2)
    assert json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert "Self CPU" in (tmp_path / "profile" / "operators.txt").read_text()
    train(tmp_path, accelerator)  # It is no part of the configuration.


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_program_ends_with_one_line_and_its_status(
    number: int, status: int, tmp_path: Path, start: Callable[..., ForkedRun]
) -> None:
    """Ctrl-C, and what schedulers send."""
    program = start(None, LAUNCHED, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    program.run_until(lambda: metrics.is_file() and len(lines(tmp_path)) >= 3)
    program.interrupt(number)
    done = program.wait()
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    (saved,) = (tmp_path / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert done.stderr.count(f"stopped at step {step}; the same command continues") == 1


def test_two_ranks_stop_at_the_same_step(tmp_path: Path, launch: Callable[..., Any]) -> None:
    """One of them gets the signal."""
    done = launch("ddp", LAUNCHED, str(tmp_path), "4")
    assert done.stderr.count("; the same command continues") == 1, done.stderr
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert f"stopped at step {int(saved.name.removeprefix('step-'))};" in done.stderr
    again = launch("ddp", LAUNCHED, str(tmp_path), "-1", "8")
    assert again.returncode == 0, again.stderr
    assert f"resuming from {saved}" in again.stderr


def test_a_rank_whose_peer_was_killed_ends_with_one_line(
    tmp_path: Path, start: Callable[..., ForkedRun]
) -> None:
    program = start("ddp", LAUNCHED, tmp_path)
    program.run_until(lambda: (tmp_path / "metrics.jsonl").is_file() and len(lines(tmp_path)) >= 3)
    os.kill(program.pids[1], signal.SIGKILL)
    printed, deadline = program.stderr, time.monotonic() + 60
    while "another process of this launch has ended" not in printed.read_text():
        assert time.monotonic() < deadline, printed.read_text()
        time.sleep(0.05)
    assert program.wait().returncode
    assert printed.read_text().count("error: ") == 1
    assert "Traceback" not in printed.read_text()


# What is not finite


def train_with(
    losses: dict[int, float], folder: Path, accelerator: Accelerator, save_every: int = 2,
    **settings: Any,
) -> torch.Tensor:  # fmt: skip
    """Eight steps, of which some have another loss; returns the weights."""
    optim = OptimConfig(steps=8, log_every=1, save_every=save_every, eval_every=4, **settings)
    run = start_run(optim, folder, seed=0, accelerator=accelerator)
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, adamw(model, optim))
    meter, guarded = Meter(), GuardedSteps()

    def step(number: int) -> None:
        loss = model(torch.ones(1, 2)).square().sum() * losses.get(number, 1.0)
        accelerator.backward(nan_unless_finite(loss))
        guarded.step(optimizer, accelerator.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.zero_grad()
        meter.add({"loss": loss})

    phases = Phases(
        train_step=step,
        metrics=lambda reading: {"loss": float(reading.sums["loss"])},
        evaluate=lambda number: {"dev/norm": float(model.weight.detach().norm())},
        guarded=guarded,
    )
    try:
        train_loop(run, optim, phases, meter, "test")
    finally:
        run.close()
        accelerator.free_memory()
    return model.weight.detach()


def saved(folder: Path) -> list[int]:
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return [int(name.removeprefix("step-")) for name in names]


def strict_lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_step_that_is_not_finite_is_skipped(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    weights = train_with({3: math.nan, 6: math.inf}, tmp_path, accelerator)
    assert bool(weights.isfinite().all())
    logged = {line["step"]: line["train/loss"] for line in strict_lines(tmp_path) if len(line) > 2}
    assert [step for step, loss in logged.items() if loss is None] == [4, 7]
    assert "1 step skipped before step 4: loss or gradient not finite" in caplog.text
    # Step 4 comes right after a skipped one.
    assert "step 4: not evaluated, not saved" in caplog.text
    assert saved(tmp_path) == [6, 8]
    assert [line["step"] for line in lines(tmp_path) if "dev/norm" in line] == [8]


def test_too_many_in_a_row_end_the_training_and_good_checkpoints_stay(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    bad = dict.fromkeys(range(4, 8), math.nan)
    message = (
        "the training diverged before step 7: loss or gradient was not finite in 3 steps in a row; "
        "step-00000004 is the newest checkpoint (remove "
        f"{tmp_path / 'checkpoints' / 'step-00000004'} to resume from step-00000002); "
        "start in a new folder with a lower lr"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_with(bad, tmp_path, accelerator, max_skipped_steps=2)
    assert saved(tmp_path) == [2, 4]
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2, 3, 4, 4, 5, 6, 7]
    # Where the cause is gone, the same command continues, with another limit as well.
    train_with({}, tmp_path, accelerator, max_skipped_steps=0)
    assert saved(tmp_path) == [6, 8]


def test_a_training_that_ends_with_a_skipped_step_has_failed(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    with pytest.raises(ValueError, match=r"before step 8: .* in 1 step in a row; step-0"):
        train_with({7: math.nan}, tmp_path, accelerator)
    assert saved(tmp_path) == [4, 6]


def test_weights_that_become_infinite_are_not_saved(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    """By a finite gradient and an absurd learning rate."""
    with pytest.raises(ValueError, match="diverged before step 1: its weights or optimizers hold"):
        train_with({}, tmp_path, accelerator, save_every=1, lr=1e39, warmup_steps=2)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("config", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_a_loss_of_one_rank_that_is_not_finite_skips_the_step_of_all(
    config: str, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    done = launch(config, LAUNCHED, str(tmp_path), "-1", "6", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("1 step skipped before step 3") == 1
    assert (tmp_path / "equal.txt").read_text() == "True"
    # A rank may wait for hours in any group: that of the launch, of signals and of DeepSpeed.
    hours = [float(each) for each in (tmp_path / "hours.txt").read_text().split()]
    assert len(hours) >= (3 if config.startswith("zero") else 2)
    assert min(hours) == 6.0
    assert [line["step"] for line in strict_lines(tmp_path) if line["train/loss"] is None] == [3]
