"""Training of one model on batches of targets: the AR, the NAR, the semantic codebook.

A step's gradient is the mean over its targets, independent of their distribution over ranks and
micro-batches.
"""

import logging
import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from codec.training.config import OptimConfig, SupervisedOptimConfig
from codec.training.data import Data, Share
from codec.training.loop import Losses, Meter, Phases, Reading, train_loop
from codec.training.optim import (
    GuardedSteps,
    adamw,
    nan_unless_finite,
    set_learning_rate,
)
from codec.training.run import Run
from codec.training.schedule import learning_rate

logger = logging.getLogger(__name__)


StepFunction = Callable[[nn.Module, Any, float], Losses]
"""(model, batch, num_targets) -> losses, whose parts are `nll`, `correct` and `targets`: sums over
the targets of each of the model's `groups`."""


def fit_supervised(
    model: nn.Module,
    step_function: StepFunction,
    train: Data,
    dev: Data | None,
    run: Run,
    config: SupervisedOptimConfig,
    *,
    hours_per_step: float = 0.0,
) -> nn.Module:
    """Trains `model` to `config.steps`, from the newest checkpoint if there is one.

    Returns the model as accelerate prepared it.

    Args:
        model: `model.groups` names the groups of targets.
        hours_per_step: hours of speech in a step's batches, for the metric `train/hours`.

    Raises:
        ValueError: the training diverged.
        Interrupted: SIGINT or SIGTERM was received; a checkpoint of the step is saved.
    """
    accelerator = run.accelerator
    groups: tuple[str, ...] = model.groups  # type: ignore[assignment]
    optimizer: Any = adamw(model, config)
    configure_engine(accelerator, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    logger.info(
        "%s; padding %.1f %% of positions",
        describe_model(accelerator, model),
        100 * train.padding_share,
    )
    meter, guarded, norm, updates = Meter(), GuardedSteps(), 0.0, 0
    batches = _prefetched(train, run, config)

    def train_step(step: int) -> None:
        nonlocal norm, updates
        model.train()
        set_learning_rate(optimizer, learning_rate(step, config))
        for share in batches.send(step):
            with accelerator.accumulate(model):
                batch = to_device(share.batch, accelerator.device)
                losses = step_function(model, batch, share.num_targets)
                accelerator.backward(nan_unless_finite(losses.total))
                if accelerator.sync_gradients:
                    # DeepSpeed has clipped and stepped inside backward; here it returns the norm.
                    limit = config.clip_norm or math.inf
                    norm = accelerator.clip_grad_norm_(model.parameters(), limit)
                    guarded.step(optimizer, norm)
                optimizer.zero_grad()
            meter.add(losses.parts)
        updates = step + 1

    def metrics(reading: Reading) -> dict[str, float]:
        values = group_means(reading, groups)
        targets = float(reading.sums["targets"].sum())
        rest = {"tokens_per_s": targets / reading.seconds, "grad_norm": float(norm or 0.0)}
        if hours_per_step:
            rest["hours"] = updates * hours_per_step
        head = {name: values.pop(name) for name in ("loss", "accuracy")}
        return head | rest | values

    def evaluate_dev(step: int) -> dict[str, float]:
        assert dev is not None
        return dev_metrics(model, step_function, dev, accelerator, config.eval_batches, groups)

    phases = Phases(
        train_step=train_step, metrics=metrics, guarded=guarded,
        evaluate=None if dev is None else evaluate_dev,
    )  # fmt: skip
    next(batches)
    with closing(batches):
        train_loop(run, config, phases, meter, "/".join(groups[:2]))
    return model


def _prefetched(data: Data, run: Run, config: OptimConfig) -> Generator[list[Share], int, None]:
    """A generator that is sent a step and yields this rank's micro-batches of it; a thread prepares
    those of the next step."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes

    def shares(step: int) -> list[Share]:
        micros = range(config.accumulate)
        return [data.share(step, micro, rank, world, config.accumulate) for micro in micros]

    with ThreadPoolExecutor(1) as pool:
        step = yield []
        following = pool.submit(shares, step)
        while True:
            made = following.result()
            if step + 1 < config.steps:
                following = pool.submit(shares, step + 1)
            step = yield made


@torch.no_grad()
def dev_metrics(
    model: nn.Module,
    step_function: StepFunction,
    dev: Data,
    accelerator: Any,
    eval_batches: int,
    groups: Sequence[str],
) -> dict[str, float]:
    """Mean losses and accuracies over the development set, by name (`dev/...`).

    All ranks call it and have the same number of batches. The model stays in evaluation mode.

    Args:
        eval_batches: maximum number of batches of each rank.
        groups: names of the groups of targets.
    """
    model.eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    meter = Meter()
    for index in range(min(dev.num_steps(world, 1), eval_batches)):
        share = dev.share(index, 0, rank, world, 1)
        batch = to_device(share.batch, accelerator.device)
        losses = step_function(model, batch, share.num_targets)
        meter.add({name: sums * share.weight for name, sums in losses.parts.items()})
    values = group_means(meter.read(accelerator), groups)
    return {f"dev/{name}": value for name, value in values.items()}


def group_means(reading: Reading, groups: Sequence[str]) -> dict[str, float]:
    """Mean negative log-likelihood in nats and accuracy: of all targets, of each nonempty group."""
    nll, correct, targets = (reading.sums[name].tolist() for name in ("nll", "correct", "targets"))
    total = max(1.0, sum(targets))
    values = {"loss": sum(nll) / total, "accuracy": sum(correct) / total}
    for index, name in enumerate(groups):
        if targets[index]:
            values[f"{name}_loss"] = nll[index] / targets[index]
            values[f"{name}_accuracy"] = correct[index] / targets[index]
    return values


def configure_engine(accelerator: Any, config: OptimConfig) -> None:
    """Sets gradient accumulation and clipping in the Accelerator and, if used, in DeepSpeed."""
    accelerator.gradient_accumulation_steps = config.accumulate
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return
    plugin.deepspeed_config.update(
        gradient_accumulation_steps=config.accumulate,
        gradient_clipping=config.clip_norm,
        # Batches have their own sizes; DeepSpeed only multiplies this number.
        train_micro_batch_size_per_gpu=1,
        train_batch_size=config.accumulate * accelerator.num_processes,
    )


def describe_model(accelerator: Any, model: nn.Module) -> str:
    """Text for the log: engine class, ZeRO stage, ranks, precision and parameters of a model."""

    def size(parameter: Any) -> int:
        # Under ZeRO-3 a parameter's own size is its part on this rank.
        return getattr(parameter, "ds_numel", parameter.numel())

    trained = sum(size(each) for each in model.parameters() if each.requires_grad)
    total = sum(size(each) for each in model.parameters())
    stage = getattr(model, "zero_optimization_stage", None)
    zero = f", ZeRO stage {stage()}" if stage is not None else ""
    return (
        f"{type(model).__name__}{zero}, world size {accelerator.num_processes}, "
        f"precision {accelerator.mixed_precision}, {accelerator.device}, "
        f"{trained / 1e6:.2f} of {total / 1e6:.2f} M parameters trained"
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """A NamedTuple of tensors (or None) on `device`."""
    moved: list[Tensor | None] = [
        part if part is None else part.to(device, non_blocking=True) for part in batch
    ]
    return type(batch)(*moved)
