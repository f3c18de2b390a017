"""Validation of a codec in training: distances, codebook use, sound and pictures.

What a training run measures between two logged steps.
"""

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from codec.distillation.objectives import Student, StudentOutput, distill_losses
from codec.distillation.resynthesis import Resynthesis
from codec.distillation.targets import Teachers
from codec.models.codec import Codec
from codec.modules.quantize import Quantized, codebook_usage, count_codes
from codec.training.config import CropConfig, LossConfig, MelScaleConfig
from codec.training.data import Crops, load_cut
from codec.training.losses import log_mel, mel_loss, wave_loss

if TYPE_CHECKING:
    from lhotse.cut import Cut

logger = logging.getLogger(__name__)


NUM_SHOWN = 3
PLOT_SCALE = MelScaleConfig(window=1024, hop=256, num_mels=80)


@torch.no_grad()
def validate(
    student: Student,
    teachers: Teachers | None,
    resynthesis: Resynthesis | None,
    dev: Sequence["Cut"],
    accelerator: Any,
    crops: CropConfig,
    losses: LossConfig,
    step: int,
) -> dict[str, float]:
    """Distances, distillation losses and codebook use on the dev list, over all ranks.

    It calls the codec itself, not its DDP wrapper, and meets the others in one reduction, so no
    rank can wait for another in vain.
    """
    codec = student.eval().codec
    sizes = codec.codebook_sizes
    names = ["mel", "wave"]
    if teachers is not None:
        names += [f"distill_{name}" for name in teachers.widths]
    if resynthesis is not None:
        names.append("resynthesis")
    # Of each name the sum and the number of recordings that count.
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    counts = torch.zeros(len(sizes), max(sizes), dtype=torch.long, device=accelerator.device)
    chosen = list(dev)[: crops.num_validation]
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
        sums += _distances(out, crop, teachers, resynthesis, losses, codec.sample_rate)
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


def _distances(
    out: StudentOutput,
    crop: Crops,
    teachers: Teachers | None,
    resynthesis: Resynthesis | None,
    losses: LossConfig,
    sample_rate: int,
) -> Tensor:
    """By name a recording's distance, and 1 where it counts: one without words has no text loss."""
    mel = mel_loss(
        out.wave, crop.wave, losses.mel_scales,
        sample_rate=sample_rate, l2_weight=losses.mel_l2_weight,
        linear_weight=losses.mel_linear_weight, form=losses.mel_form,
    )  # fmt: skip
    rows = [[float(mel), 1.0], [float(wave_loss(out.wave, crop.wave)), 1.0]]
    if teachers is not None:
        targets = teachers(crop)
        told = distill_losses(out.projections, targets, teachers.config)
        for name in teachers.widths:
            counts = float(targets[name].mask.sum() >= 2)
            rows.append([counts * float(told[f"distill_{name}"]), counts])
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


class Window:
    """Means of the losses and the use of codes since the last logged step."""

    def __init__(self, codec: Codec) -> None:
        self.sizes = codec.codebook_sizes
        self.steps, self.teachers = Stopwatch(codec.device), Stopwatch(codec.device)
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts = torch.zeros(len(self.sizes), max(self.sizes), dtype=torch.long)
        self.batches, self.started = 0, time.perf_counter()

    def add(self, quantized: Quantized, parts: dict[str, Tensor]) -> None:
        """Notes one batch."""
        for name, part in parts.items():
            self.sums[name] = self.sums.get(name, 0) + part.detach()
        # Entry counts stay on the device; moving them every step would wait for it.
        self.counts = self.counts.to(quantized.codes.device)
        self.counts += count_codes(quantized.codes, max(self.sizes))
        self.batches += 1

    def means(self, accelerator: Any, audio_seconds: float) -> dict[str, float]:
        """Mean losses, use and perplexity over codebooks, seconds of audio a second, and the share
        of the steps' time that teachers took; then a new window begins."""
        values = {name: float(total) / self.batches for name, total in self.sums.items()}
        use = codebook_usage(accelerator.reduce(self.counts), self.sizes)
        values |= {"use": float(use.share.mean()), "perplexity": float(use.perplexity.mean())}
        elapsed = time.perf_counter() - self.started
        values["audio_seconds_per_second"] = self.batches * audio_seconds / elapsed
        taken, whole = self.teachers.read(), self.steps.read()
        if taken:
            values["teacher_share"] = taken / whole
        self._clear()
        return values


def line(values: dict[str, float]) -> str:
    """The values in one line of a progress bar."""
    return " ".join(
        f"{name.removesuffix('_seconds_per_second')} {value:.3g}" for name, value in values.items()
    )


class Stopwatch:
    """Sums the time spent inside `with stopwatch:`; on a GPU the device's own, without waiting."""

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
