"""Speed of the AR's training with plain padding, bucketing and packing, or of the NAR's, which is
bucketed alone.

`accelerate launch recipes/tools/profile_slm.py --config FILE key=value`

The step is the trainer's own, at the launch's precision; batches are made beforehand, as the
trainer makes them beside the step, and nothing is saved. The AR's three ways take turns, so that
all see the same machine, and have the same budget of positions. Markdown goes to standard output.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from codec.tokens import TokenShard
from codec.training.validate import Stopwatch
from eval.benchmark import machine
from recipes.lib.run import git_revision, load_config, make_accelerator, run_program
from slm.config import ARConfig, BatchConfig, NARConfig, OptimConfig
from slm.data.ar import IGNORE, ARBatch, ARData, Share
from slm.data.batching import Batch, bucketed, packed
from slm.data.corpus import read_texts
from slm.data.nar import NARBatch, NARData
from slm.models.ar import SpeechLM
from slm.models.nar import NAR
from slm.tokenization.tokenizer import SpeechTextTokenizer

# The trainer's own step, not one like it.
from slm.train import Meter, _train_step, ar_step, make_optimizer, nar_step


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileSLMConfig:
    """What is trained on what, and for how long."""

    train: str = "out/smoke/tokens/train"
    """Token shards to train on (recipes/export_tokens.py makes them)."""
    limit: int | None = None
    """Use only so many items."""
    texts: str | None = None
    """Plain texts (.txt or .jsonl) that ar.tasks.text mixes in; needed if that is not 0."""
    part: Literal["ar", "nar"] = "ar"
    """Which of the two models is trained."""
    ar: ARConfig = field(default_factory=ARConfig)
    """The model of codebook 1."""
    nar: NARConfig = field(default_factory=NARConfig)
    """The model of the other codebooks."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Budget of a micro-batch; packed: length of the AR's packed rows (null: the whole budget, but
    no more than the LLM can hold). The NAR has none."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The part's optimiser; of its steps only the warm-up's learning rate is used."""
    seed: int = 0
    """Of new weights and batches."""
    steps: int = 10
    """Timed steps of each way."""
    warmup: int = 2
    """Steps of each way before them."""
    peak_tflops: float | None = None
    """What the device can do at most at this precision, for the share of it; null: not told."""

    def __post_init__(self) -> None:
        if self.part == "ar" and self.ar.tasks.text and self.texts is None:
            raise ValueError("ar.tasks.text needs texts: name a .txt or .jsonl file of them")
        if self.steps < 1 or self.warmup < 0:
            raise ValueError("steps must be at least 1, warmup at least 0")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops must be positive, got {self.peak_tflops}")


class Way(NamedTuple):
    """One way to make the AR's batches."""

    data: ARData
    batches: list[Batch]
    """Of a whole epoch, in random order."""

    @property
    def padding_share(self) -> float:
        """Of the positions of the epoch's batches."""
        held = positions = 0
        for batch in self.batches:
            rows = [int(self.data.lengths[row].sum()) for row in batch]
            held += sum(rows)
            positions += max(rows) * len(rows)
        return 1 - held / positions

    def shares(self, accumulate: int) -> Iterator[list[Share]]:
        """Micro-batches of each step, over and over."""
        place = 0
        while True:
            chosen = [self.batches[(place + i) % len(self.batches)] for i in range(accumulate)]
            place += accumulate
            made = [self.data.collate(batch) for batch in chosen]
            targets = sum(int((batch.labels != IGNORE).sum()) for batch in made)
            yield [Share(batch, targets / accumulate, 1.0) for batch in made]


class NARWay(NamedTuple):
    """The NAR's batches, as training has them."""

    data: NARData

    @property
    def padding_share(self) -> float:
        """Of the positions of the first epoch's batches."""
        return self.data.padding_share

    def shares(self, accumulate: int) -> Iterator[list[Share]]:
        """Micro-batches of each step, epoch after epoch."""
        for step in itertools.count():
            yield [self.data.share(step, micro, 0, 1, accumulate) for micro in range(accumulate)]


def nar_ways(config: ProfileSLMConfig, tokenizer: SpeechTextTokenizer) -> dict[str, NARWay]:
    """By name; there is but one."""
    data = NARData.open(
        TokenShard.open(config.train), tokenizer, config.nar, config.batch, config.seed,
        limit=config.limit,
    )  # fmt: skip
    return {"bucketing": NARWay(data)}


def ways(config: ProfileSLMConfig, lm: SpeechLM) -> dict[str, Way]:
    """By name. All have the same items and the same budget."""
    shard = TokenShard.open(config.train)
    texts = read_texts(config.texts) if config.texts and config.ar.tasks.text else ()
    row = config.batch.packed or min(lm.max_positions, config.batch.positions)
    longest = min(row, lm.max_positions)  # Of an item; what a row holds begins anew with each.

    def data(batch: BatchConfig) -> ARData:
        return ARData.open(
            shard, lm.tokenizer, config.ar.tasks, batch, config.seed,
            longest=longest, limit=config.limit, texts=texts,
        )  # fmt: skip

    padded, together = (data(replace(config.batch, packed=length)) for length in (None, row))
    items = np.arange(len(padded.lengths))

    def batches(make: Callable[..., list[Batch]], batch: BatchConfig, **how: Any) -> list[Batch]:
        random = np.random.default_rng(config.seed)
        made = make(items, padded.lengths, batch, random, **how)
        return [made[index] for index in random.permutation(len(made))]

    rows = replace(config.batch, packed=row)
    return {
        "plain padding": Way(padded, batches(bucketed, config.batch, growth=math.inf)),
        "bucketing": Way(padded, batches(bucketed, config.batch)),
        f"packing, rows of {row}": Way(together, batches(packed, rows)),
    }


class Step(NamedTuple):
    """One step of one way."""

    seconds: float
    tokens: int
    """Positions that hold a token."""
    targets: int
    memory: int | None
    """Most bytes that torch held on the device; None where it cannot tell."""
    flops: int | None
    """Of all matrix products and attention, those of the padding too; None: not counted."""


def measure(
    lm: SpeechLM | NAR, ways: Mapping[str, Way | NARWay], config: ProfileSLMConfig,
    accelerator: Accelerator,
) -> dict[str, list[Step]]:  # fmt: skip
    """Steps of all ways, by turns; the `warmup` first of each do not count."""
    losses = ar_step if isinstance(lm, SpeechLM) else nar_step
    accelerator.gradient_accumulation_steps = config.optim.accumulate
    optimizer = make_optimizer(lm, config.optim)
    model, optimizer = accelerator.prepare(lm, optimizer)
    meter, watch = Meter(lm.groups), Stopwatch(accelerator.device)
    shares = {name: way.shares(config.optim.accumulate) for name, way in ways.items()}
    steps: dict[str, list[Step]] = {name: [] for name in ways}

    def step(chosen: Sequence[Share]) -> None:
        _train_step(
            model, optimizer, losses, chosen, accelerator, config.optim, config.optim.lr, meter
        )

    cuda = accelerator.device.type == "cuda"
    for number in tqdm(range(config.warmup + config.steps), "steps", unit="round"):
        for name, source in shares.items():
            chosen = next(source)
            if cuda:
                torch.cuda.reset_peak_memory_stats(accelerator.device)
            with watch:
                step(chosen)
            seconds, flops = watch.read(), None
            memory = torch.cuda.max_memory_allocated(accelerator.device) if cuda else None
            if number < config.warmup:
                continue
            if config.peak_tflops is not None:  # Again: counting takes time.
                with FlopCounterMode(display=False) as counter:
                    step(chosen)
                flops = counter.get_total_flops()
            tokens = sum(num_tokens(share.batch) for share in chosen)
            targets = round(sum(share.num_targets for share in chosen))
            steps[name].append(Step(seconds, tokens, targets, memory, flops))
    return steps


def num_tokens(batch: ARBatch | NARBatch) -> int:
    """Positions of a batch that are no padding; the NAR goes over them once for each codebook that
    it predicts."""
    if isinstance(batch, NARBatch):
        return int(batch.text_mask.sum() + batch.lengths.sum()) * len(batch.stages)
    if batch.documents is not None:
        return int((batch.documents > 0).sum())
    # A row's last target stands right behind the position of its label, and ends it.
    last = (batch.labels != IGNORE).int().cumsum(1).argmax(1)
    return int((last + 2).sum())


def table(
    ways: Mapping[str, Way | NARWay], steps: Mapping[str, list[Step]], peak: float | None
) -> str:
    """Medians over steps, in Markdown; padding is the whole epoch's."""
    lines = [
        "| batches | padding | tokens/s | targets/s | ms a step | peak memory | share of peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, made in steps.items():
        tokens = statistics.median(step.tokens / step.seconds for step in made)
        targets = statistics.median(step.targets / step.seconds for step in made)
        seconds = statistics.median(step.seconds for step in made)
        memory = max((step.memory for step in made if step.memory is not None), default=None)
        shares = [step.flops / step.seconds for step in made if step.flops is not None]
        cells = [
            name,
            f"{ways[name].padding_share:.1%}",
            f"{tokens:.0f}",
            f"{targets:.0f}",
            f"{1000 * seconds:.0f}",
            f"{memory / 2**30:.2f} GiB" if memory is not None else "",
            f"{statistics.median(shares) / (1e12 * peak):.1%}" if peak and shares else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    config = load_config(ProfileSLMConfig, argv, "Speed of a part's training by kind of batch.")
    stamp = TokenShard.open(config.train).stamp
    config = replace(config, nar=replace(config.nar, codebook_sizes=stamp.codebook_sizes))
    lm = SpeechLM.create(config.ar, stamp, config.seed)
    accelerator = make_accelerator(gradient_accumulation_steps=config.optim.accumulate)
    if accelerator.num_processes > 1:
        raise ValueError("a profile is of one process: launch it with --num_processes 1")
    set_seed(config.seed)
    if config.part == "ar":
        model, compared = lm, ways(config, lm)
        items = len(compared["bucketing"].data.lengths)
    else:
        model, compared = NAR(config.nar), nar_ways(config, lm.tokenizer)
        items = len(compared["bucketing"].data.corpus.items)
    steps = measure(model, compared, config, accelerator)
    print(table(compared, steps, config.peak_tflops))
    print(
        f"\nMedians of n = {config.steps} steps after {config.warmup}, by turns; {items} items, "
        f"{config.optim.accumulate} x {config.batch.positions} positions a step, seed "
        f"{config.seed}; {described(model, config)}; "
        f"{torch.get_num_threads()} thread(s), precision {accelerator.mixed_precision}, "
        f"{accelerator.device}; {machine()}; torch {torch.__version__}; git {git_revision()}."
    )


def described(model: SpeechLM | NAR, config: ProfileSLMConfig) -> str:
    """What was trained, in a few words."""
    if isinstance(model, SpeechLM):
        form = "every weight" if config.ar.lora is None else f"LoRA of rank {config.ar.lora.rank}"
        return f"{config.ar.base}, {model.config.num_hidden_layers} layers, {form}"
    nar = config.nar
    predicted = min(2, len(nar.codebook_sizes) - 1)
    return (
        f"a NAR of {nar.num_layers} layers, width {nar.width}, {predicted} of its "
        f"{len(nar.codebook_sizes) - 1} codebooks a step"
    )


if __name__ == "__main__":
    run_program(main)
