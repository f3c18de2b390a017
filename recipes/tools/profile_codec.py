"""How one training step's time divides; it takes the configuration of recipes/train_codec.py.

`accelerate launch recipes/tools/profile_codec.py --config FILE key=value [--steps 10] [--warmup 2]`

The step is the trainer's own, on crops of the training list, at the launch's precision; nothing is
saved. Between the parts the graph is cut: each part's inputs become leaves, so that its backward
pass can be timed alone, and their gradients are handed on to the parts before it. The sum is the
step's real gradient. Ordinary and divided steps take turns, so that both see the same machine.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

import codec.training.loop as training
from codec.distillation.resynthesis import OriginalFeatures, Resynthesis
from codec.distillation.targets import Teachers
from codec.models.codec import Codec
from codec.training.data import CropDataset, crop_batches, read_cuts

# The trainer's own step, not one like it.
from codec.training.loop import Models, _Loop, _prepare, _set_rates, _train_step
from codec.training.validate import Stopwatch, Window
from eval.benchmark import machine
from recipes.lib.run import git_revision, load_config, make_accelerator, run_program
from recipes.train_codec import TrainCodecConfig, build_models, check_codec, starting_architecture


class _Cut(NamedTuple):
    """One call of a part: tensors outside and inside of it, of which a gradient may be asked."""

    name: str
    inputs: list[tuple[Tensor, Tensor]]
    outputs: list[tuple[Tensor, Tensor]]


class Parts:
    """Times the parts of a step, forward and backward."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._watches: dict[tuple[str, str], Stopwatch] = {}
        self._cuts: list[_Cut] = []
        self._inside = False

    def timed(self, name: str, function: Callable[..., Any], *, cut: bool = True):
        """`function` as a part; inside another part it belongs to that. `cut` False: it has no
        backward pass."""

        def part(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            inputs: list[tuple[Tensor, Tensor]] = []
            outputs: list[tuple[Tensor, Tensor]] = []
            if cut:
                arguments, options = _apart((arguments, options), inputs)
            self._inside = True
            try:
                with self._watch(name, "forward"):
                    made = function(*arguments, **options)
            finally:
                self._inside = False
            if not cut:
                return made
            made = _apart(made, outputs)
            if outputs:
                self._cuts.append(_Cut(name, inputs, outputs))
            return made

        return part

    def backward(self) -> None:
        """The gradients that parts' outputs have, handed on through the parts, the last first.

        Parts whose outputs have none wait for another loss.
        """
        waiting = []
        for cut in reversed(self._cuts):
            asked = [(inner, outer) for inner, outer in cut.outputs if outer.grad is not None]
            if not asked:
                waiting.append(cut)
                continue
            with self._watch(cut.name, "backward"):
                torch.autograd.backward(
                    [inner for inner, _ in asked], [outer.grad for _, outer in asked]
                )
            for outer, inner in cut.inputs:
                if inner.grad is not None:
                    # Several parts may share what lies between them and the part before.
                    torch.autograd.backward(outer, inner.grad, retain_graph=True)
        self._cuts = waiting[::-1]

    def read(self) -> dict[tuple[str, str], float]:
        """Seconds by part and direction since the last reading."""
        self._cuts = []
        return {key: watch.read() for key, watch in self._watches.items()}

    def _watch(self, name: str, direction: str) -> Stopwatch:
        return self._watches.setdefault((name, direction), Stopwatch(self._device))


def _apart(value: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """`value` with its tensors cut off; (tensor, leaf) of those with a gradient go to `pairs`."""
    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value
        pairs.append((value, value.detach().requires_grad_()))
        return pairs[-1][1]
    if isinstance(value, dict):
        return {key: _apart(each, pairs) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_apart(each, pairs) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(_apart(each, pairs) for each in value)
    return value


@contextmanager
def divided(loop: _Loop, parts: Parts) -> Iterator[None]:
    """Makes the trainer's step one of parts."""
    models, accelerator = loop.models, loop.accelerator
    backward = accelerator.backward

    def backward_by_parts(loss: Tensor, **options: Any) -> None:
        backward(loss, **options)
        parts.backward()

    with ExitStack() as stack:
        for name, owner, attribute, cut in _places(models):
            function = parts.timed(name, getattr(owner, attribute), cut=cut)
            stack.enter_context(patch.object(owner, attribute, function))
        for optimizer in loop.optimizers:
            for verb in ("step", "zero_grad"):
                function = parts.timed("optimisers", getattr(optimizer, verb), cut=False)
                stack.enter_context(patch.object(optimizer, verb, function))
        stack.enter_context(patch.object(accelerator, "backward", backward_by_parts))
        yield


def _places(models: Models) -> Iterator[tuple[str, Any, str, bool]]:
    """Each part's name, the object and the attribute that it is called by, and whether to cut."""
    student = models.student
    for name, module in _networks(student.codec):
        yield name, module, "forward", True
    heads = [*student.heads.values(), getattr(student.codec, "semantic_head", None)]
    for head in heads:
        if head is not None:
            yield "projections to teachers", head, "forward", True
    yield "teachers, targets", Teachers, "__call__", False
    yield "Whisper, original", Resynthesis, "listen", False
    yield "Whisper, resynthesis", OriginalFeatures, "distance", True
    yield "teachers, losses", training, "distill_losses", True
    for name in ("mel", "magnitude", "wave"):
        yield f"{name} loss", training, f"{name}_loss", True
    if models.discriminators is not None:
        yield "discriminators, their own step", training, "discriminator_step", True
        yield "discriminators, for the generator", models.discriminators, "forward", True
    for name in ("adversarial_loss", "feature_loss"):
        yield "adversarial and feature loss", training, name, True
    yield "clipping", nn.utils, "clip_grad_norm_", False


def _networks(codec: Codec) -> Iterator[tuple[str, nn.Module]]:
    acoustic = getattr(codec.encoder, "acoustic", None)
    if isinstance(acoustic, nn.Module):
        assert isinstance(codec.encoder.semantic, nn.Module)
        yield "semantic encoder", codec.encoder.semantic
        yield "acoustic encoder", acoustic
    else:
        yield "encoder", codec.encoder
    yield "quantiser", codec.quantizer
    yield "decoder", codec.decoder
    if codec.auxiliary is not None:
        yield "auxiliary decoder", codec.auxiliary


class Step(NamedTuple):
    """Seconds of a step."""

    whole: float
    parts: dict[tuple[str, str], float]
    """By part and direction; none of an ordinary step."""


def measure(
    loop: _Loop, load: Callable[[], Any], *, steps: int, warmup: int
) -> tuple[list[Step], list[Step]]:
    """Ordinary and divided steps, by turns; `warmup` of each come before and do not count."""
    device = loop.accelerator.device
    parts, whole = Parts(device), Stopwatch(device)
    load_as_part = parts.timed("loading of crops", load, cut=False)
    ordinary, by_parts = [], []
    for number in tqdm(range(warmup + steps), "steps", unit="pair"):
        for steps_so_far, loader in ((ordinary, load), (by_parts, load_as_part)):
            _set_rates(loop.optimizers, number, loop.optim)
            with ExitStack() as stack:
                if steps_so_far is by_parts:
                    stack.enter_context(divided(loop, parts))
                with whole:
                    for _ in range(loop.optim.accumulate):
                        _train_step(loop, loader(), adversarial=True)
            steps_so_far.append(Step(whole.read(), parts.read()))
    return ordinary[warmup:], by_parts[warmup:]


def table(ordinary: Sequence[Step], by_parts: Sequence[Step]) -> str:
    """Medians over steps, in Markdown; shares are of the divided step."""
    keys = list(dict.fromkeys(key for step in by_parts for key in step.parts))
    medians = {
        key: statistics.median(step.parts.get(key, 0.0) for step in by_parts) for key in keys
    }
    whole = statistics.median(step.whole for step in by_parts)
    plain = statistics.median(step.whole for step in ordinary)
    between = statistics.median(step.whole - sum(step.parts.values()) for step in by_parts)
    lines = ["| part | forward ms | backward ms | share |", "|---|---|---|---|"]
    for name in dict.fromkeys(name for name, _ in keys):
        both = [medians.get((name, direction), 0.0) for direction in ("forward", "backward")]
        cells = [f"{1000 * each:.1f}" if each else "" for each in both]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(both) / whole:.1%} |")
    lines += [
        f"| between the parts | {1000 * between:.1f} | | {between / whole:.1%} |",
        f"| sum of the parts | {1000 * sum(medians.values()):.1f} | | "
        f"{sum(medians.values()) / whole:.1%} |",
        f"| the divided step | {1000 * whole:.1f} | | 100.0% |",
        f"| an ordinary step | {1000 * plain:.1f} | | {plain / whole:.1%} |",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    about = "How a training step's time divides. --steps N and --warmup N: steps (10, 2)."
    config = load_config(TrainCodecConfig, rest, about)
    if options.steps < 1 or options.warmup < 0:
        raise ValueError("--steps must be at least 1, --warmup at least 0")
    codec_config = starting_architecture(config.codec, config.start_from)
    check_codec(codec_config, config.losses, config.resynthesis, config.start_from)
    optim, crops = config.optim, config.data
    accelerator = make_accelerator(gradient_accumulation_steps=optim.accumulate)
    if accelerator.num_processes > 1:
        raise ValueError("a profile is of one process: launch it with --num_processes 1")
    cuts = list(read_cuts(config.train))
    set_seed(config.seed)
    models = build_models(config, accelerator.device)
    if models.teachers is not None:
        cuts = models.teachers.known(cuts)
    codec = models.student.codec
    wrapped, optimizers = _prepare(models, accelerator, optim)
    dataset = CropDataset(
        cuts, sample_rate=codec.sample_rate, seconds=crops.seconds, seed=config.seed
    )
    batches = crop_batches(
        dataset, batch_size=crops.batch_size, first=0, rank=0, world=1,
        last=2 * (options.steps + options.warmup) * optim.accumulate,
        num_workers=crops.num_workers,
    )  # fmt: skip
    loop = _Loop(wrapped, optimizers, accelerator, config.losses, optim, Window(codec))
    steps = measure(loop, iter(batches).__next__, steps=options.steps, warmup=options.warmup)
    print(table(*steps))
    print(
        f"\nMedians of n = {options.steps} steps after {options.warmup}; {optim.accumulate} x "
        f"{crops.batch_size} crops of {crops.seconds:g} s a step; {torch.get_num_threads()} "
        f"thread(s), precision {accelerator.mixed_precision}; {machine()}; torch "
        f"{torch.__version__}; git {git_revision()}."
    )


if __name__ == "__main__":
    run_program(main)
