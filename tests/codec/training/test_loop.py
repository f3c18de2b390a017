"""The loop: metrics of step N are those of N updates, whoever trains; an interrupt saves a step."""

import json
import os
import signal
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


def test_a_profile_is_a_trace_and_a_table(tmp_path: Path, accelerator: Accelerator) -> None:
    train(tmp_path, accelerator, profile_steps=2)
    assert json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert "Self CPU" in (tmp_path / "profile" / "operators.txt").read_text()
    train(tmp_path, accelerator)  # It is no part of the configuration.


def test_ctrl_c_ends_a_program_with_one_line_and_status_130(
    tmp_path: Path, start: Callable[..., ForkedRun]
) -> None:
    program = start(None, LAUNCHED, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    program.run_until(lambda: metrics.is_file() and len(lines(tmp_path)) >= 3)
    program.interrupt()
    done = program.wait()
    assert done.returncode == 130, done.stderr
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
