"""Trains a tiny network by codec/training/loop.py; test_loop.py interrupts it.

usage: tiny_loop.py FOLDER [INTERRUPT_AT [STEPS [BAD_AT]]]    the last rank sends SIGINT to itself

At step BAD_AT the last rank's loss is infinite, with a finite gradient. At the end FOLDER/equal.txt
says whether all ranks have the same weights, and FOLDER/hours.txt
how long the process groups wait for a rank.
"""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from codec.training.config import OptimConfig
from codec.training.loop import Meter, Phases, train_loop
from codec.training.optim import GuardedSteps, adamw, nan_unless_finite
from codec.training.run import make_accelerator, start_run
from codec.training.supervised import configure_engine
from recipes.lib.run import run_recipe


def main(argv: list[str]) -> None:
    interrupt_at, bad_at = (int(argv[i]) if len(argv) > i else -1 for i in (1, 3))
    # How long it trains is no part of what a resumed run must have in common.
    optim = OptimConfig(
        steps=int(argv[2]) if len(argv) > 2 else 10_000, log_every=1, save_every=10**9
    )
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    accelerator = make_accelerator(Path(argv[0]))
    run = start_run(optim, Path(argv[0]), seed=0, free=("steps",), accelerator=accelerator)
    meter, guarded = Meter(), GuardedSteps()
    is_last_rank = accelerator.process_index == accelerator.num_processes - 1
    model: Any = torch.nn.Linear(2, 2)
    configure_engine(accelerator, optim)
    model, optimizer = accelerator.prepare(model, adamw(model, optim))

    def step(number: int) -> None:
        time.sleep(0.01)
        if number == interrupt_at and is_last_rank:
            os.kill(os.getpid(), signal.SIGINT)
        loss = model(torch.ones(1, 2)).square().sum()
        loss = loss + (math.inf if number == bad_at and is_last_rank else 0.0)
        accelerator.backward(nan_unless_finite(loss))
        guarded.step(optimizer, accelerator.clip_grad_norm_(model.parameters(), optim.clip_norm))
        optimizer.zero_grad()
        meter.add({"loss": loss})

    phases = Phases(
        train_step=step,
        metrics=lambda reading: {"loss": float(reading.sums["loss"])},
        guarded=guarded,
    )
    train_loop(run, optim, phases, meter, "tiny")
    outputs = accelerator.gather(model(torch.ones(1, 2)).detach())
    if accelerator.is_main_process:
        groups: Any = torch.distributed.distributed_c10d
        timeouts = [
            group._get_backend(accelerator.device).options._timeout.total_seconds()
            for group in groups._world.pg_map
            if group is not groups.GroupMember.NON_GROUP_MEMBER
        ]
        (Path(argv[0]) / "hours.txt").write_text(" ".join(str(each / 3600) for each in timeouts))
        equal = bool((outputs == outputs[0]).all())
        (Path(argv[0]) / "equal.txt").write_text(str(equal and bool(outputs.isfinite().all())))


if __name__ == "__main__":
    run_recipe(main)
