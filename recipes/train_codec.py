"""Trains a codec on a list of cuts.

`accelerate launch recipes/train_codec.py --config FILE key=value`

The run folder ends with `codec/`, which `load_codec` and the command `codec` take.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import DistributedDataParallelKwargs

from codec import Codec
from codec.config import CodecConfig
from codec.data import read_cuts
from codec.discriminators import Discriminators
from codec.distill import Student
from codec.targets import Teachers
from codec.train import Models, fit
from codec.train_config import (
    CropConfig,
    DiscriminatorConfig,
    DistillConfig,
    LossConfig,
    OptimConfig,
)
from recipes.common import load_config, make_accelerator, run_program, start_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCodecConfig:
    """One codec run."""

    out: str = "out/smoke/codec"
    """Run folder: goes on where an earlier start with the same configuration stopped."""
    train: str = "out/smoke/cuts/train.jsonl.gz"
    """Cuts to train on (recipes/prepare_data.py makes them)."""
    dev: str = "out/smoke/cuts/dev.jsonl.gz"
    """Cuts to validate on: speakers that are not in `train`."""
    seed: int = 0
    """Of initial weights and crops."""
    start_from: str = ""
    """Codec folder or hub id to train further (`codec import` makes one of a published
    checkpoint); its architecture takes the place of `codec`. Empty: random weights."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """Architecture."""
    discriminators: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Used where the adversarial or the feature loss has a weight."""
    losses: LossConfig = field(default_factory=LossConfig)
    """Objectives."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Teachers, used where losses.weights.distill has a weight."""
    data: CropConfig = field(default_factory=CropConfig)
    """Crops and batches."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""

    def __post_init__(self) -> None:
        if self.losses.weights.distill and not self.distill.any:
            raise ValueError(
                "losses.weights.distill needs a teacher: name distill.speech.model or "
                "distill.text.model, or set it to 0"
            )
        if self.start_from and self.codec != CodecConfig():
            raise ValueError("start_from brings its own architecture: leave the keys of codec out")


def main(argv: list[str]) -> None:
    config = load_config(TrainCodecConfig, argv, "Train a speech codec.")
    accelerator = make_accelerator(
        Path(config.out),
        gradient_accumulation_steps=config.optim.accumulate,
        # The codebooks are buffers that all ranks compute alike; nothing needs to be copied.
        handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    train, dev = read_cuts(config.train), read_cuts(config.dev)
    run = start_run(config, config.out, seed=config.seed, accelerator=accelerator)
    codec = Codec.from_pretrained(config.start_from) if config.start_from else Codec(config.codec)
    adversarial = config.losses.needs_discriminators
    discriminators = Discriminators(config.discriminators) if adversarial else None
    teachers = None
    if config.losses.weights.distill:
        teachers = Teachers(config.distill, codec.config, accelerator.device)
        train, dev = teachers.known(list(train)), teachers.known(list(dev))
    # Last, so that one seed gives the codec the same initial weights with any teacher and none.
    student = Student(codec, config.distill, teachers.widths if teachers else None)
    logger.info(
        "%.1f M parameters, %g Hz, %d codebooks of %d; %d cuts to train on, %d to validate on",
        sum(each.numel() for each in codec.parameters()) / 1e6, codec.frame_rate,
        codec.num_codebooks, codec.codebook_sizes[0], len(train), len(dev),
    )  # fmt: skip
    fit(
        Models(student, discriminators, teachers), list(train), list(dev), run,
        crops=config.data, losses=config.losses, optim=config.optim,
    )  # fmt: skip


if __name__ == "__main__":
    run_program(main)
