"""Trains a tiny network in a run folder; test_run.py launches it, kills it and starts it again.

usage: tiny_training.py FOLDER STEPS [DIE_AT]
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from codec.training.run import start_run
from recipes.lib.run import run_program


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyConfig:
    width: int = 8


def main(argv: list[str]) -> None:
    folder, steps = Path(argv[0]), int(argv[1])
    die_at = int(argv[2]) if len(argv) > 2 else -1
    run = start_run(TinyConfig(), folder, seed=3)
    accelerator = run.accelerator
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    start = run.resume()
    for step in range(start, steps + 1):
        if step % 2 == 0:
            run.save(step)
        if step == steps:
            break
        if step == die_at and accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        draw = torch.Generator().manual_seed(1000 * step + accelerator.process_index)
        # DeepSpeed keeps bf16 weights and leaves casting the input to us.
        wave = torch.randn(2, 4, generator=draw).to(next(model.parameters()).dtype)
        with accelerator.autocast():
            loss = model(wave).float().pow(2).mean()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.log({"loss": loss.item(), "lr": schedule.get_last_lr()[0]}, step=step + 1)
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        facts = {"engine": type(model).__name__, "world": accelerator.num_processes}
        torch.save({"weights": weights, **facts}, folder / "final.pt")


if __name__ == "__main__":
    run_program(main)
