"""One training step of a codec against discriminators and teachers: functions of models and batch.

SpeechTokenizer (arXiv 2308.16692), DM-Codec (2410.15017) and LM-SPT (2506.16738) differ in the
losses that have a weight.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from codec.distillation.objectives import Student, StudentOutput, Target, distill_losses
from codec.distillation.resynthesis import OriginalFeatures, Resynthesis
from codec.distillation.targets import Teachers
from codec.models.codec import CodecOutput
from codec.modules.discriminators import Discriminators
from codec.modules.quantize import count_codes
from codec.training.config import CodecOptimConfig, DistillConfig, LossConfig
from codec.training.data import Crops
from codec.training.loop import Losses, Meter, Stopwatch
from codec.training.losses import (
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    magnitude_loss,
    mel_loss,
    stoi_loss,
    wave_loss,
)
from codec.training.optim import GuardedSteps, nan_unless_finite


@dataclass
class TrainingModels:
    """Trained modules and their supervision; None where its losses have no weight."""

    student: Student
    discriminators: Discriminators | None = None
    teachers: Teachers | None = None
    resynthesis: Resynthesis | None = None
    codes: Mapping[str, Integer[np.ndarray, " T"]] | None = None
    """Codebook 1 of the training cuts by their ids, where it is frozen and encoded beforehand."""


class TeacherTargets(NamedTuple):
    """Targets of distillation for one batch, and the weights of their losses."""

    targets: dict[str, Target]
    config: DistillConfig
    original: OriginalFeatures | None = None
    """Whisper's features of the original, for the resynthesis loss."""


@dataclass
class Trainer:
    """Models, optimizers and settings of a training."""

    models: TrainingModels
    """As prepared by accelerate."""
    optimizers: list[Any]
    """The codec's, and the discriminators' if there are any."""
    accelerator: Any
    losses: LossConfig
    optim: CodecOptimConfig
    meter: Meter = field(default_factory=Meter)
    guarded: GuardedSteps = field(default_factory=GuardedSteps)
    teacher_time: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self.teacher_time = Stopwatch(self.accelerator.device)


def generator_step(
    out: CodecOutput | StudentOutput,
    wave: Float[Tensor, "B 1 S"],
    discriminators: nn.Module | None,
    config: LossConfig,
    sample_rate: int,
    targets: TeacherTargets | None = None,
) -> Losses:
    """Losses of one forward pass of the codec; their weighted sum is the total.

    Args:
        out: output of the forward pass.
        wave: its input.
        discriminators: None: no adversarial losses.
        targets: None: no distillation.
    """
    parts, details, weights = {}, {}, config.weights
    if weights.wave:
        parts["wave"] = wave_loss(out.wave, wave)
    if weights.mel:
        parts["mel"] = mel_loss(
            out.wave, wave, config.mel_scales,
            sample_rate=sample_rate, l2_weight=config.mel_l2_weight,
            linear_weight=config.mel_linear_weight, form=config.mel_form,
        )  # fmt: skip
    if weights.magnitude:
        parts["magnitude"] = magnitude_loss(out.wave, wave, config.magnitude_windows)
    if weights.stoi:
        parts["stoi"] = stoi_loss(out.wave, wave, sample_rate)
    if weights.commitment:
        parts["commitment"] = out.quantized.commitment
    if weights.codebook:
        parts["codebook"] = out.quantized.codebook_loss
    if discriminators is not None:
        with torch.no_grad():
            real = discriminators(wave)
        fake = discriminators(out.wave)
        parts["adversarial"] = adversarial_loss(fake, config.adversarial_form)
        parts["feature"] = feature_loss(
            real, fake, normalize=config.normalize_features, logits=config.match_scores
        )
    if targets is not None and targets.targets:
        assert isinstance(out, StudentOutput)
        details = distill_losses(out.projections, targets.targets, targets.config)
        parts["distill"] = details.pop("distill")
    if targets is not None and targets.original is not None:
        assert isinstance(out, StudentOutput)
        assert out.resynthesis is not None
        parts["resynthesis"] = targets.original.distance(out.resynthesis)
    total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
    return Losses(total, parts | details)


def discriminator_step(
    out: CodecOutput | StudentOutput,
    wave: Float[Tensor, "B 1 S"],
    discriminators: nn.Module,
    config: LossConfig,
) -> Losses:
    """The discriminators' loss on the real wave and the detached output of the codec.

    One pass over both: DDP allows one forward per backward.
    """
    both = discriminators(torch.cat([wave, out.wave.detach().to(wave.dtype)]))
    real = [each._replace(logits=each.logits[: len(wave)]) for each in both]
    fake = [each._replace(logits=each.logits[len(wave) :]) for each in both]
    loss = discriminator_loss(real, fake, config.adversarial_form)
    return Losses(loss, {"discriminator": loss})


def train_step(trainer: Trainer, crops: Crops, *, adversarial: bool) -> None:
    """Trains on one batch: the discriminators on the detached output, then the codec.

    Args:
        adversarial: train the discriminators, and the codec against them.
    """
    models, accelerator = trainer.models, trainer.accelerator
    discriminators = models.discriminators if adversarial else None
    wave, targets, parts = crops.wave.to(accelerator.device), None, {}
    if models.teachers is not None or models.resynthesis is not None:
        with trainer.teacher_time:
            targets = teacher_targets(models, crops)
    trained = [models.student] if discriminators is None else [models.student, discriminators]
    with accelerator.accumulate(*trained):
        codes = crops.codes
        out: StudentOutput = models.student(wave, codes if codes is None else codes.to(wave.device))
        if discriminators is not None:
            with accelerator.autocast():
                judged = discriminator_step(out, wave, discriminators, trainer.losses)
            accelerator.backward(nan_unless_finite(judged.total))
            parts |= judged.parts
            update(trainer, trainer.optimizers[1], discriminators)
        # The codec's loss must not reach the discriminators' gradients, nor their DDP reducer.
        raw = None
        if discriminators is not None:
            raw = accelerator.unwrap_model(discriminators).requires_grad_(False)
        sample_rate = accelerator.unwrap_model(models.student).codec.sample_rate
        with accelerator.autocast():
            losses = generator_step(out, wave, raw, trainer.losses, sample_rate, targets)
        accelerator.backward(nan_unless_finite(losses.total))
        if raw is not None:
            raw.requires_grad_(True)
        parts |= losses.parts
        update(trainer, trainer.optimizers[0], models.student)
    sizes = accelerator.unwrap_model(models.student).codec.codebook_sizes
    # Counts stay on the device; moving them every step would wait for it.
    parts["code_counts"] = count_codes(out.quantized.codes, max(sizes))
    trainer.meter.add(parts | {"batches": torch.ones((), device=wave.device)})


def teacher_targets(models: TrainingModels, crops: Crops) -> TeacherTargets:
    """Computes the teachers' targets for a batch of crops."""
    targets = TeacherTargets({}, DistillConfig())
    if models.teachers is not None:
        targets = TeacherTargets(models.teachers(crops), models.teachers.config)
    if models.resynthesis is not None:
        targets = targets._replace(original=models.resynthesis.encode_originals(crops))
    return targets


def update(trainer: Trainer, optimizer: Any, model: nn.Module) -> None:
    """Clips the gradients after the last micro-batch, and steps the optimizer if their norm is
    finite."""
    if trainer.accelerator.sync_gradients:
        limit = trainer.optim.clip_norm or math.inf
        # The auxiliary decoder apart: it must not change a codec that gets no gradient from it.
        named = list(model.named_parameters())
        auxiliary = [each for name, each in named if "codec.auxiliary." in name]
        others = [each for name, each in named if "codec.auxiliary." not in name]
        norm = trainer.accelerator.clip_grad_norm_(others, limit)
        if auxiliary:
            norm = norm + nn.utils.clip_grad_norm_(auxiliary, limit)
        trainer.guarded.step(optimizer, norm)
    optimizer.zero_grad()
