"""The training loop of all models, and its measurements.

Metrics, evaluations and checkpoints of step N are those of a model that was updated N times.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from codec.program import counted
from codec.training.config import OptimConfig
from codec.training.optim import GuardedSteps
from codec.training.run import Run
from codec.training.schedule import learning_rate

logger = logging.getLogger(__name__)

NUM_SHOWN = 5
"""Values shown by the progress bar."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM was received in training, and a checkpoint of the step is saved."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped at step {step}; the same command continues")
        self.status = 128 + number
        """Exit status of the program, as shells define it."""


class Losses(NamedTuple):
    """Losses of one batch."""

    total: Float[Tensor, ""]
    """The loss that is minimized."""
    parts: dict[str, Tensor]
    """Values that the meter sums, by name: unweighted losses, or sums over targets."""


class Reading(NamedTuple):
    """Sums of a meter since its last reading."""

    sums: dict[str, Tensor]
    """Over batches and ranks."""
    seconds: float
    """Duration of training, without evaluations and checkpoints."""


class Meter:
    """Sums tensors, and the time of training, between two logged steps."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Adds the tensors of one batch; sums stay on the device, so that no step waits for it."""
        for name, part in parts.items():
            value = part.detach()
            value = value.double() if value.is_floating_point() else value.long()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self, accelerator: Any) -> Reading:
        """The sums over all ranks, which are then reset. All ranks call it."""
        sums = {name: accelerator.reduce(value) for name, value in self._sums.items()}
        reading = Reading(sums, max(1e-9, time.monotonic() - self._since))
        self._clear()
        return reading


class Stopwatch:
    """Sums the time spent inside `with stopwatch:`, on a GPU by events, without synchronization."""

    def __init__(self, device: torch.device) -> None:
        self._seconds, self._started = 0.0, 0.0
        self._events: list[tuple[Any, Any]] = []
        self._gpu = device.type == "cuda"

    def __enter__(self) -> None:
        if self._gpu:
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            self._events.append((pair[0], pair[1]))
        else:
            self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def read(self) -> float:
        """Seconds since the last reading."""
        seconds = self._seconds
        if self._events:
            torch.cuda.synchronize()
            seconds += sum(start.elapsed_time(stop) for start, stop in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Functions that the loop calls, on all ranks."""

    train_step: Callable[[int], None]
    """One optimizer step, given its number from 0; adds to the meter."""
    metrics: Callable[[Reading], dict[str, float]]
    """Values to log by name, from the sums of the meter."""
    evaluate: Callable[[int], dict[str, float]] | None = None
    """Values of the development set to log by name, given the step."""
    evaluate_first: bool = False
    """Evaluate before the first step as well."""
    guarded: GuardedSteps | None = None
    """Optimizer steps of `train_step`; None: it skips none."""


def due(step: int, every: int, last: bool) -> bool:
    """Whether an action of every `every` steps is due at `step`; at the last step all are."""
    return last or (step > 0 and step % every == 0)


def train_loop(run: Run, config: OptimConfig, phases: Phases, meter: Meter, label: str) -> None:
    """Trains to `config.steps`, from the newest checkpoint of `run` where there is one.

    Call it after `accelerator.prepare`. Each step: evaluate, save, train, log. While steps are
    skipped because loss or gradient is not finite, nothing is evaluated or saved.

    Raises:
        Interrupted: SIGINT or SIGTERM was received; a checkpoint of the step is saved.
        ValueError: more than `config.max_skipped_steps` steps in a row were skipped, or the last
            one was; earlier checkpoints stay.
    """
    first = run.resume()
    bar = run.progress(config.steps, first, label)
    meter.read(run.accelerator)
    # The bar is closed first, so that the line of an error is the last one.
    with run.interruptible() as interrupted, run.profiled() as profile_step, bar:
        for step in range(first, config.steps + 1):
            last = step == config.steps
            with meter.paused():
                stop = interrupted()
                fresh = step == first and first > 0  # What was done before this checkpoint.
                is_due = due(step, config.eval_every, last) or (step == 0 and phases.evaluate_first)
                evaluates = is_due and not fresh and phases.evaluate is not None
                saves = step > first and (due(step, config.save_every, last) or stop > 0)
                if (evaluates or saves) and _is_skipping(run, config, phases, step, last):
                    logger.warning("step %d: not evaluated, not saved", step)
                    evaluates = saves = False
                if phases.evaluate is not None and evaluates:
                    run.log(phases.evaluate(step), step)
                if saves:
                    run.save(step)
            if stop:
                raise Interrupted(step, stop)
            if last:
                break
            phases.train_step(step)
            profile_step()
            if due(step + 1, config.log_every, step + 1 == config.steps):
                values = phases.metrics(meter.read(run.accelerator))
                shown = list(values.items())[:NUM_SHOWN]
                bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in shown), refresh=False)
                rate = {"lr": learning_rate(step, config)}
                run.log({f"train/{k}": v for k, v in (values | rate).items()}, step + 1)
                _is_skipping(run, config, phases, step + 1, last=False)
            bar.update()


def _is_skipping(run: Run, config: OptimConfig, phases: Phases, step: int, last: bool) -> bool:
    """Whether the step before `step` was skipped. All ranks get the same answer, or error.

    Called where other values are read, and not every step: it waits for the device.
    """
    if phases.guarded is None:
        return False
    skipped = phases.guarded.read()
    if skipped.most_in_row > config.max_skipped_steps or (last and skipped.last_in_row):
        number = counted(max(skipped.most_in_row, skipped.last_in_row), "step")
        raise ValueError(
            f"the training diverged before step {step}: loss or gradient was not finite in "
            f"{number} in a row; {run.newest_name()}; start in a new folder with a lower lr"
        )
    if skipped.total and run.accelerator.is_main_process:
        number = counted(skipped.total, "step")
        logger.warning("%s skipped before step %d: loss or gradient not finite", number, step)
    return bool(skipped.last_in_row)
