"""Trains a tiny network by codec/training/loop.py; test_loop.py interrupts it.

usage: tiny_loop.py FOLDER [INTERRUPT_AT [STEPS]]    the last rank sends SIGINT to itself
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from codec.training.config import OptimConfig
from codec.training.loop import Meter, Phases, train_loop
from codec.training.run import start_run
from recipes.lib.run import run_recipe


def main(argv: list[str]) -> None:
    interrupt_at = int(argv[1]) if len(argv) > 1 else -1
    # How long it trains is no part of what a resumed run must have in common.
    optim = OptimConfig(
        steps=int(argv[2]) if len(argv) > 2 else 10_000, log_every=1, save_every=10**9
    )
    run = start_run(optim, Path(argv[0]), seed=0, free=("steps",))
    accelerator, meter = run.accelerator, Meter()
    model: Any = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))

    def step(number: int) -> None:
        time.sleep(0.01)
        if number == interrupt_at and accelerator.process_index == accelerator.num_processes - 1:
            os.kill(os.getpid(), signal.SIGINT)
        loss = model(torch.ones(1, 2)).square().sum()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        meter.add({"loss": loss})

    phases = Phases(train_step=step, metrics=lambda reading: {"loss": float(reading.sums["loss"])})
    train_loop(run, optim, phases, meter, "tiny")


if __name__ == "__main__":
    run_recipe(main)
