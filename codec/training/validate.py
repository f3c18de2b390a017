"""Validation of a codec in training: distances, codebook use, sound and spectrograms."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from codec.distillation.objectives import Student, StudentOutput, distill_losses
from codec.distillation.resynthesis import Resynthesis
from codec.distillation.targets import Teachers
from codec.modules.quantize import codebook_usage, count_codes
from codec.training.config import CropConfig, LossConfig, MelScaleConfig
from codec.training.data import Crops, load_cut
from codec.training.losses import log_mel, mel_loss, wave_loss

if TYPE_CHECKING:
    from lhotse.cut import Cut

logger = logging.getLogger(__name__)


NUM_SHOWN = 3
PLOT_SCALE = MelScaleConfig(window=1024, hop=256, num_mels=80)


@dataclass(frozen=True)
class Validation:
    """Models, data and losses of a validation."""

    student: Student
    """Not wrapped by DDP."""
    teachers: Teachers | None
    resynthesis: Resynthesis | None
    dev: Sequence["Cut"]
    crops: CropConfig
    losses: LossConfig


@torch.no_grad()
def validate(validation: Validation, accelerator: Any, step: int) -> dict[str, float]:
    """Distances, distillation losses and codebook use on the dev list, over all ranks, by name.

    All ranks call it. They may have different numbers of recordings: the only collective is the
    reduction at the end, and the codec is not wrapped by DDP.
    """
    student, teachers = validation.student, validation.teachers
    resynthesis, crops, losses = validation.resynthesis, validation.crops, validation.losses
    codec = student.eval().codec
    sizes = codec.codebook_sizes
    names = ["mel", "wave"]
    if teachers is not None:
        names += [f"distill_{name}" for name in teachers.widths]
    if resynthesis is not None:
        names.append("resynthesis")
    # For each name the sum, and the number of recordings in it.
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    counts = torch.zeros(len(sizes), max(sizes), dtype=torch.long, device=accelerator.device)
    chosen = list(validation.dev)[: crops.num_validation]
    for index in range(accelerator.process_index, len(chosen), accelerator.num_processes):
        try:
            samples = load_cut(
                chosen[index], codec.sample_rate, duration=crops.max_validation_seconds
            )
        except ValueError as error:
            logger.warning("skipped in validation: %s", error)
            continue
        wave = torch.from_numpy(samples)[None, None].to(accelerator.device)
        if wave.shape[-1] < max(scale.window for scale in losses.mel_scales):
            continue
        out = student(wave)
        crop = Crops(wave, torch.tensor([wave.shape[-1]]), (chosen[index].id,), (0.0,))
        sums += _distances(out, crop, validation)
        counts += count_codes(out.quantized.codes, max(sizes))
        if index < NUM_SHOWN and accelerator.is_main_process:
            _show(accelerator, f"dev/{index}", wave, out.wave, codec.sample_rate, step)
            if resynthesis is not None:
                name = f"dev/{index}/resynthesis"
                _sound(accelerator, name, out.resynthesis, resynthesis.sample_rate, step)
    student.train()
    sums, counts = accelerator.reduce((sums.to(accelerator.device), counts))
    use = codebook_usage(counts, sizes)
    means = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
    values = {"n": float(sums[0, 1]), **dict(zip(names, means, strict=True))}
    for index in range(codec.num_codebooks):
        values[f"use_{index + 1}"] = float(use.share[index])
        values[f"perplexity_{index + 1}"] = float(use.perplexity[index])
    return {f"dev/{name}": value for name, value in values.items()}


def _distances(out: StudentOutput, crop: Crops, validation: Validation) -> Tensor:
    """(N, 2): distances of a recording, and 1 for each that is defined (text losses need words)."""
    teachers, resynthesis, losses = validation.teachers, validation.resynthesis, validation.losses
    sample_rate = validation.student.codec.sample_rate
    mel = mel_loss(
        out.wave, crop.wave, losses.mel_scales,
        sample_rate=sample_rate, l2_weight=losses.mel_l2_weight,
        linear_weight=losses.mel_linear_weight, form=losses.mel_form,
    )  # fmt: skip
    rows = [[float(mel), 1.0], [float(wave_loss(out.wave, crop.wave)), 1.0]]
    if teachers is not None:
        targets = teachers(crop)
        distilled = distill_losses(out.projections, targets, teachers.config)
        for name in teachers.widths:
            counts = float(targets[name].mask.sum() >= 2)
            rows.append([counts * float(distilled[f"distill_{name}"]), counts])
    if resynthesis is not None:
        assert out.resynthesis is not None
        rows.append([float(resynthesis.encode_originals(crop).distance(out.resynthesis)), 1.0])
    return torch.tensor(rows, dtype=torch.float64)


def _show(accelerator, name: str, real: Tensor, fake: Tensor, sample_rate: int, step: int) -> None:
    """Sound and log-mel picture (original above, reconstruction below) for TensorBoard."""
    _sound(accelerator, f"{name}/reconstruction", fake, sample_rate, step)
    if step == 0:
        _sound(accelerator, f"{name}/original", real, sample_rate, step)
    for writer in _writers(accelerator):
        pictures = [log_mel(wave, PLOT_SCALE, sample_rate)[0].flip(0) for wave in (real, fake)]
        picture = torch.cat(pictures)
        low, high = picture.min(), picture.max()
        writer.add_image(f"{name}/mel", ((picture - low) / (high - low)).unsqueeze(0), step)


def _sound(accelerator, name: str, wave: Tensor, sample_rate: int, step: int) -> None:
    for writer in _writers(accelerator):
        writer.add_audio(name, wave[0], step, sample_rate=sample_rate)


def _writers(accelerator) -> list[Any]:
    return [tracker.writer for tracker in accelerator.trackers if tracker.name == "tensorboard"]
