"""GAN training of a codec: steps are functions of models and batch, the loop owns the rest."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from codec.distillation.objectives import Student, StudentOutput, Target, distill_losses
from codec.distillation.resynthesis import OriginalFeatures, Resynthesis
from codec.distillation.targets import Teachers
from codec.io import atomic_folder
from codec.models.codec import Codec, CodecOutput
from codec.modules.discriminators import BandDiscriminator, Discriminators, STFTDiscriminator
from codec.training.config import CropConfig, DistillConfig, LossConfig, OptimConfig
from codec.training.data import CropDataset, Crops, crop_batches
from codec.training.losses import (
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    magnitude_loss,
    mel_loss,
    stoi_loss,
    wave_loss,
)
from codec.training.validate import Window, line, validate

if TYPE_CHECKING:
    from accelerate import Accelerator
    from lhotse.cut import Cut

logger = logging.getLogger(__name__)


@runtime_checkable
class Run(Protocol):
    """A run folder: what the loop needs of it (recipes/lib/run.py has one)."""

    folder: Path
    accelerator: "Accelerator"
    seed: int

    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def save(self, step: int) -> None: ...
    def resume(self) -> int: ...
    def progress(self, total: int, initial: int, label: str) -> Any: ...


class Losses(NamedTuple):
    """The weighted sum that is minimised, and each part before its weight."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]


@dataclass
class Models:
    """What is trained, and by whom: None where no adversarial loss, or no teacher, has a weight."""

    student: Student
    discriminators: Discriminators | None = None
    teachers: Teachers | None = None
    resynthesis: Resynthesis | None = None
    codes: Mapping[str, Integer[np.ndarray, " T"]] | None = None
    """Codebook 1 of the training cuts, by their ids, where it is frozen and known already."""


class Lesson(NamedTuple):
    """What the teachers say of a batch, and how it counts."""

    targets: dict[str, Target]
    config: DistillConfig
    original: OriginalFeatures | None = None
    """What the speech made of the semantic codes is compared with."""


def generator_step(
    out: CodecOutput | StudentOutput,
    wave: Float[Tensor, "B 1 S"],
    discriminators: nn.Module | None,
    config: LossConfig,
    sample_rate: int,
    lesson: Lesson | None = None,
) -> Losses:
    """Losses of one codec pass. `discriminators` None leaves the adversarial terms out, `lesson`
    None the distillation."""
    parts, told, weights = {}, {}, config.weights
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
            real, fake, normalize=config.normalize_features, scores=config.match_scores
        )
    if lesson is not None and lesson.targets:
        assert isinstance(out, StudentOutput)
        told = distill_losses(out.projections, lesson.targets, lesson.config)
        parts["distill"] = told.pop("distill")
    if lesson is not None and lesson.original is not None:
        assert isinstance(out, StudentOutput)
        assert out.resynthesis is not None
        parts["resynthesis"] = lesson.original.distance(out.resynthesis)
    total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
    return Losses(total, parts | told)


def discriminator_step(
    out: CodecOutput | StudentOutput,
    wave: Float[Tensor, "B 1 S"],
    discriminators: nn.Module,
    config: LossConfig,
) -> Losses:
    """The discriminators' loss on the real wave and the detached output.

    One pass over both: DDP allows one forward per backward.
    """
    both = discriminators(torch.cat([wave, out.wave.detach().to(wave.dtype)]))
    real = [each._replace(logits=each.logits[: len(wave)]) for each in both]
    fake = [each._replace(logits=each.logits[len(wave) :]) for each in both]
    loss = discriminator_loss(real, fake, config.adversarial_form)
    return Losses(loss, {"discriminator": loss})


def learning_rate(step: int, peak: float, config: OptimConfig) -> float:
    """Linear warm-up, then the schedule: a function of the step, nothing else."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "decay":
        return peak * config.decay ** ((step - config.warmup_steps) // config.decay_steps)
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = config.final_lr_share
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def fit(
    models: Models,
    train: Sequence["Cut"],
    dev: Sequence["Cut"],
    run: Run,
    *,
    crops: CropConfig,
    losses: LossConfig,
    optim: OptimConfig,
) -> None:
    """Train to `optim.steps`, from the newest checkpoint of `run` where there is one.

    The trained codec ends in `run.folder / "codec"`.
    """
    accelerator, codec = run.accelerator, models.student.codec
    _check(models, crops, losses, accelerator)
    wrapped, optimizers = _prepare(models, accelerator, optim)
    first = run.resume()
    dataset = CropDataset(
        train,
        sample_rate=codec.sample_rate,
        seconds=crops.seconds,
        seed=run.seed,
        bad_file=run.folder / "skipped.jsonl",
        codes=models.codes,
        hop_length=codec.hop_length,
    )
    span = (first * optim.accumulate, optim.steps * optim.accumulate)
    batches = iter(_batches(dataset, crops, span, accelerator))
    window = Window(codec)
    bar = run.progress(optim.steps, first, "codec")
    for step in range(first, optim.steps + 1):
        last = step == optim.steps
        if last or step % optim.eval_every == 0:
            teachers = (models.teachers, models.resynthesis)
            values = validate(models.student, *teachers, dev, accelerator, crops, losses, step)
            run.log(values, step)
        if last or (step > 0 and step % optim.save_every == 0):
            _check_finite(codec, step)
            run.save(step)
        if last:
            break
        _set_rates(optimizers, step, optim)
        loop = _Loop(wrapped, optimizers, accelerator, losses, optim, window)
        for _ in range(optim.accumulate):
            with window.steps:
                _train_step(loop, next(batches), adversarial=step >= optim.discriminator_start)
        bar.update()
        if (step + 1) % optim.log_every == 0:
            seconds = crops.seconds * crops.batch_size * accelerator.num_processes
            values = window.means(accelerator, seconds)
            bar.set_postfix_str(line(values))
            run.log({f"train/{name}": value for name, value in values.items()}, step)
    bar.close()
    if accelerator.is_main_process:
        list_bad(run.folder / "skipped.jsonl")
        save_codec(codec, run.folder / "codec")
    accelerator.wait_for_everyone()


def _check(models: Models, crops: CropConfig, losses: LossConfig, accelerator) -> None:
    if accelerator.distributed_type.value == "DEEPSPEED":
        raise ValueError(
            "the codec's two optimisers do not train under DeepSpeed; launch with "
            "recipes/accelerate/ddp.yaml (or cpu.yaml)"
        )
    samples = crops.seconds * models.student.codec.sample_rate
    if samples < max(each.window for each in losses.mel_scales):
        raise ValueError(f"data.seconds {crops.seconds:g} is shorter than a window of the mel loss")
    critics = models.discriminators.others if models.discriminators is not None else ()
    for each in critics:
        if not isinstance(each, STFTDiscriminator | BandDiscriminator):
            continue
        if samples < each.min_samples:
            name = "stft" if isinstance(each, STFTDiscriminator) else "band"
            raise ValueError(
                f"data.seconds {crops.seconds:g} is too short for a window of discriminators."
                f"{name}_windows; lengthen the crops or leave the longest windows out"
            )


def _batches(dataset: CropDataset, crops: CropConfig, span: tuple[int, int], accelerator):
    """This rank's batches number span[0] to span[1] - 1."""
    return crop_batches(
        dataset,
        batch_size=crops.batch_size,
        first=span[0],
        last=span[1],
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        num_workers=crops.num_workers,
    )


def _prepare(models: Models, accelerator, optim: OptimConfig) -> tuple[Models, list[Any]]:
    """Wrap what is trained, and its optimisers."""
    models.student.train()
    generator = _adamw(models.student, optim.lr, optim)
    student, generator = accelerator.prepare(models.student, generator)
    if models.discriminators is None:
        return replace(models, student=student), [generator]
    critic = _adamw(models.discriminators, optim.discriminator_lr, optim)
    discriminators, critic = accelerator.prepare(models.discriminators, critic)
    return replace(models, student=student, discriminators=discriminators), [generator, critic]


def _adamw(model: nn.Module, lr: float, optim: OptimConfig) -> torch.optim.AdamW:
    decayed, others = [], []
    for name, each in model.named_parameters():
        if each.requires_grad:
            # Snake's slopes and weight norm's gains are vectors with axes of length 1.
            matrix = sum(size > 1 for size in each.shape) >= 2
            entries = name.rpartition(".")[2] == "entries"
            (decayed if matrix and not entries else others).append(each)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, fused=True)


def _set_rates(optimizers: Sequence[Any], step: int, optim: OptimConfig) -> None:
    for optimizer, peak in zip(optimizers, (optim.lr, optim.discriminator_lr), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak, optim)


@dataclass
class _Loop:
    """What stays the same from batch to batch."""

    models: Models
    optimizers: Sequence[Any]
    accelerator: Any
    losses: LossConfig
    optim: OptimConfig
    window: Window


def _train_step(loop: _Loop, crops: Crops, *, adversarial: bool) -> None:
    """One batch: discriminators on the detached output, then the codec against them."""
    models, accelerator = loop.models, loop.accelerator
    discriminators = models.discriminators if adversarial else None
    wave, lesson, parts = crops.wave.to(accelerator.device), None, {}
    if models.teachers is not None or models.resynthesis is not None:
        with loop.window.teachers:
            lesson = _lesson(models, crops)
    trained = [models.student] if discriminators is None else [models.student, discriminators]
    with accelerator.accumulate(*trained):
        codes = crops.codes
        out: StudentOutput = models.student(wave, codes if codes is None else codes.to(wave.device))
        if discriminators is not None:
            with accelerator.autocast():
                told = discriminator_step(out, wave, discriminators, loop.losses)
            accelerator.backward(told.total)
            parts |= told.parts
            _update(loop.optimizers[1], discriminators, accelerator, loop.optim)
        # The codec's loss must not reach the discriminators' gradients, nor their DDP reducer.
        raw = None
        if discriminators is not None:
            raw = accelerator.unwrap_model(discriminators).requires_grad_(False)
        sample_rate = accelerator.unwrap_model(models.student).codec.sample_rate
        with accelerator.autocast():
            made = generator_step(out, wave, raw, loop.losses, sample_rate, lesson)
        accelerator.backward(made.total)
        if raw is not None:
            raw.requires_grad_(True)
        parts |= made.parts
        _update(loop.optimizers[0], models.student, accelerator, loop.optim)
    loop.window.add(out.quantized, parts)


def _lesson(models: Models, crops: Crops) -> Lesson:
    lesson = Lesson({}, DistillConfig())
    if models.teachers is not None:
        lesson = Lesson(models.teachers(crops), models.teachers.config)
    if models.resynthesis is not None:
        lesson = lesson._replace(original=models.resynthesis.encode_originals(crops))
    return lesson


def _update(optimizer: Any, model: nn.Module, accelerator, optim: OptimConfig) -> None:
    if accelerator.sync_gradients and optim.clip_norm:
        # The auxiliary decoder apart: a codec that learns nothing of it must not notice it.
        named = list(model.named_parameters())
        auxiliary = [each for name, each in named if "codec.auxiliary." in name]
        others = [each for name, each in named if "codec.auxiliary." not in name]
        accelerator.clip_grad_norm_(others, optim.clip_norm)
        nn.utils.clip_grad_norm_(auxiliary, optim.clip_norm)
    optimizer.step()
    optimizer.zero_grad()


def _check_finite(codec: Codec, step: int) -> None:
    """Before a checkpoint of NaN takes the place of a good one."""
    for name, tensor in codec.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"the training diverged before step {step} ({name} is not finite); start in a new "
                "folder with a lower optim.lr"
            )


def list_bad(file: Path) -> None:
    """One line for each recording that some loader process could not read."""
    if not file.is_file():
        return
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    bad = {line["id"]: line["why"] for line in lines}
    file.write_text("".join(json.dumps({"id": i, "why": w}) + "\n" for i, w in bad.items()))
    logger.warning("%d recordings could not be read; %s lists them and why", len(bad), file)


def save_codec(codec: Codec, folder: Path) -> None:
    """Writes a trained codec's folder in place of an earlier one. `OSError` on a full disk."""
    with atomic_folder(folder) as partial:
        codec.save_pretrained(partial)
