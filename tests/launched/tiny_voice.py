"""Trains tiny speech language models under the engine that it is launched with.

usage: tiny_voice.py FOLDER OUT    FOLDER has base/ (a text LLM) and tokens.parquet

test_slm_train.py launches it on two ranks, and trains the same models on one. For each of KINDS,
OUT/KIND gets metrics.jsonl; ar/, of an AR; and seen.pt, the fields of a Seen.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from codec.tokens import TokenShard
from codec.training.config import SupervisedOptimConfig
from codec.training.data import Data
from codec.training.run import make_accelerator, start_run
from codec.training.supervised import StepFunction, fit_supervised
from recipes.lib.run import run_recipe
from recipes.lib.voice_training import unset_zero3
from slm.config import ARConfig, BatchConfig, LoRAConfig, NARConfig, TaskConfig
from slm.data.ar import ARData
from slm.data.nar import NARData
from slm.models import ar
from slm.models.ar import SpeechLM
from slm.models.nar import NAR
from slm.train import ar_step, gather, nar_step

KINDS = ("lora", "full-packed", "nar")


class Parts(NamedTuple):
    """A model, its step and its data, always the same."""

    model: Any
    step: StepFunction
    data: Data


def parts(kind: str, folder: Path, dropout: float = 0.0) -> Parts:
    """`kind` is lora, full or nar; the AR's rows are packed where it ends so."""
    shard = TokenShard.open(folder / "tokens.parquet")
    name, _, packed = kind.partition("-")
    lora = LoRAConfig(rank=2, dropout=dropout) if name == "lora" else None
    lm = SpeechLM.create(ARConfig(base=str(folder / "base"), lora=lora), shard.stamp, seed=0)
    if kind == "nar":
        config = NARConfig(
            codebook_sizes=shard.stamp.codebook_sizes,
            num_layers=1, num_heads=2, width=16, feedforward=32, dropout=dropout,
            conv_kernel=3, prompt_matching=True, text_dropout=0.5, prompt_share=(0.0, 0.3),
            stage_decay=0.7,
        )  # fmt: skip
        torch.manual_seed(0)
        batch = BatchConfig(positions=250)
        return Parts(NAR(config), nar_step, NARData.open(shard, lm.tokenizer, config, batch, 0))
    batch = BatchConfig(positions=250, packed=120 if packed else None)
    data = ARData.open(shard, lm.tokenizer, TaskConfig(), batch, 0, longest=256)
    return Parts(lm, ar_step, data)


@dataclass
class Seen:
    """What a test looks at; whole tensors, whatever pieces the engine has them in."""

    engine: str
    share_held: float
    """How much of the parameters a rank has in place between two steps."""
    before: dict[str, Tensor]
    """All parameters before the first step, tied ones once."""
    after: dict[str, Tensor]
    """And after the last one."""
    logits: Tensor | None = None
    """Of the AR, at the targets of the first batch."""


def train_seen(
    one: Parts, folder: Path, accelerator: Accelerator, optim: SupervisedOptimConfig
) -> Seen:
    """Trains; writes metrics.jsonl and, of an AR, the folder ar/. All ranks call it."""
    before: dict[str, Tensor] = {}

    def step(model: nn.Module, batch: Any, num_targets: float) -> Any:
        if not before:
            before.update(whole_parameters(accelerator, model))
        return one.step(model, batch, num_targets)

    run = start_run(optim, folder, seed=0, accelerator=accelerator)
    engine = fit_supervised(one.model, step, one.data, None, run, optim)
    run.close()
    named = list(accelerator.unwrap_model(engine).parameters())
    held = sum(parameter.numel() for parameter in named)
    after = whole_parameters(accelerator, engine)
    share = held / sum(parameter.numel() for parameter in after.values())
    seen = Seen(engine=type(engine).__name__, share_held=share, before=before, after=after)
    if isinstance(one.model, SpeechLM):
        seen.logits = first_logits(engine, one.data)
        state = gather(accelerator, engine)
        if accelerator.is_main_process:
            one.model.save(folder / "ar", state)
    accelerator.free_memory(engine)
    return seen


def whole_parameters(accelerator: Accelerator, engine: nn.Module) -> dict[str, Tensor]:
    named = dict(accelerator.unwrap_model(engine).named_parameters())
    gathered: Any = nullcontext()
    if any(hasattr(parameter, "ds_id") for parameter in named.values()):
        from deepspeed.runtime.zero import GatheredParameters

        gathered = GatheredParameters(list(named.values()), modifier_rank=None)
    with gathered:
        return {name: parameter.detach().clone() for name, parameter in named.items()}


@torch.no_grad()
def first_logits(engine: nn.Module, data: Data) -> Tensor:
    """Logits at the targets of the first batch, through what is around the model."""
    found: list[Tensor] = []
    plain = ar.group_logits

    def group_logits(*args: Any, **options: Any) -> list[Tensor]:
        logits = plain(*args, **options)
        found.extend(logits)
        return logits

    engine.eval()
    with patch.object(ar, "group_logits", group_logits):
        engine(data.share(0, 0, 0, 1, 1).batch)
    return torch.cat([logits.flatten() for logits in found])


def optim_of(kind: str, ranks: int) -> SupervisedOptimConfig:
    """One rank has the same batches in a step as two. The clip norm cuts some steps."""
    micros = 4 if kind == "full-packed" else 2
    return SupervisedOptimConfig(
        steps=8, warmup_steps=2, lr=1e-2, clip_norm=1.0, accumulate=micros // ranks, log_every=1,
        eval_every=1000, save_every=1000,
    )  # fmt: skip


def main(argv: list[str]) -> None:
    folder, out = Path(argv[0]), Path(argv[1])
    # The shipped files say bf16, whose rounding would hide what is looked for.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    # peft asks for a GPU once there is an Accelerator under ZeRO-3.
    made = {kind: parts(kind, folder) for kind in KINDS}
    accelerator = make_accelerator(out)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        # ZeRO-3 leaves what is small whole on every rank, and here all is small.
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        unset_zero3()
        later = parts("full", folder).model
        assert all(parameter.numel() for parameter in later.parameters()), "built in pieces"
    for kind in KINDS:
        seen = train_seen(made[kind], out / kind, accelerator, optim_of(kind, ranks=2))
        if accelerator.is_main_process:
            torch.save(vars(seen), out / kind / "seen.pt")


if __name__ == "__main__":
    run_recipe(main)
