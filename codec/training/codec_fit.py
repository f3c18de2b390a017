"""GAN training of a codec: crops, two optimizers, validation, checkpoints."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codec.io import atomic_folder
from codec.json_lines import read_appended, write_json_lines
from codec.models.codec import Codec
from codec.modules.discriminators import BandDiscriminator, STFTDiscriminator
from codec.modules.quantize import codebook_usage
from codec.training.codec_step import Trainer, TrainingModels, train_step
from codec.training.config import CodecOptimConfig, CropConfig, LossConfig
from codec.training.data import CropDataset, crop_batches
from codec.training.loop import Phases, Reading, train_loop
from codec.training.optim import adamw, is_codec_matrix, set_learning_rate
from codec.training.run import Run
from codec.training.schedule import learning_rate
from codec.training.validate import Validation, validate

if TYPE_CHECKING:
    from lhotse.cut import Cut

logger = logging.getLogger(__name__)


def fit(
    models: TrainingModels,
    train: Sequence["Cut"],
    dev: Sequence["Cut"],
    run: Run,
    *,
    crops: CropConfig,
    losses: LossConfig,
    optim: CodecOptimConfig,
) -> None:
    """Trains to `optim.steps`, from the newest checkpoint of `run` where there is one.

    At the end the trained codec is written to `run.folder / "codec"`.

    Raises:
        ValueError: the launch or the crops cannot train these models, or the training diverged.
        Interrupted: SIGINT or SIGTERM was received; a checkpoint of the step is saved.
    """
    accelerator, codec = run.accelerator, models.student.codec
    check_training_setup(models, crops, losses, accelerator)
    validation = Validation(
        models.student, models.teachers, models.resynthesis, dev, crops, losses
    )  # fmt: skip
    trainer = prepare_trainer(models, accelerator, losses, optim)
    dataset = CropDataset(
        train,
        sample_rate=codec.sample_rate,
        seconds=crops.seconds,
        seed=run.seed,
        bad_file=run.folder / "skipped.jsonl",
        codes=models.codes,
        hop_length=codec.hop_length,
    )
    batches: Any = None

    def step(number: int) -> None:
        nonlocal batches
        if batches is None:
            batches = iter(
                crop_batches(
                    dataset,
                    batch_size=crops.batch_size,
                    first=number * optim.accumulate,
                    last=optim.steps * optim.accumulate,
                    rank=accelerator.process_index,
                    world=accelerator.num_processes,
                    num_workers=crops.num_workers,
                )
            )
        set_learning_rates(trainer, number)
        for _ in range(optim.accumulate):
            train_step(trainer, next(batches), adversarial=number >= optim.discriminator_start)

    seconds = crops.seconds * crops.batch_size
    phases = Phases(
        train_step=step,
        metrics=lambda reading: metrics(trainer, reading, codec.codebook_sizes, seconds),
        evaluate=lambda number: validate(validation, accelerator, number),
        evaluate_first=True,
        guarded=trainer.guarded,
    )
    train_loop(run, optim, phases, trainer.meter, "codec")
    if accelerator.is_main_process:
        list_bad(run.folder / "skipped.jsonl")
        save_codec(codec, run.folder / "codec")
    accelerator.wait_for_everyone()


def prepare_trainer(
    models: TrainingModels, accelerator: Any, losses: LossConfig, optim: CodecOptimConfig
) -> Trainer:
    """Creates the optimizers, and lets accelerate wrap the trained modules."""
    models.student.train()
    generator: Any = adamw(models.student, optim, decays=is_codec_matrix)
    student, generator = accelerator.prepare(models.student, generator)
    if models.discriminators is None:
        wrapped = replace(models, student=student)
        return Trainer(wrapped, [generator], accelerator, losses, optim)
    critic: Any = adamw(
        models.discriminators, optim, lr=optim.discriminator_lr, decays=is_codec_matrix
    )
    discriminators, critic = accelerator.prepare(models.discriminators, critic)
    wrapped = replace(models, student=student, discriminators=discriminators)
    return Trainer(wrapped, [generator, critic], accelerator, losses, optim)


def set_learning_rates(trainer: Trainer, step: int) -> None:
    """Sets the rates of the codec's and of the discriminators' optimizer for a step."""
    peaks = (trainer.optim.lr, trainer.optim.discriminator_lr)
    for optimizer, peak in zip(trainer.optimizers, peaks, strict=False):
        set_learning_rate(optimizer, learning_rate(step, trainer.optim, peak))


def metrics(
    trainer: Trainer, reading: Reading, sizes: Sequence[int], seconds: float
) -> dict[str, float]:
    """Mean losses, mean use and perplexity of the codebooks, seconds of audio per second, and the
    teachers' share of the time, by name.

    Args:
        sizes: K of every codebook.
        seconds: seconds of audio in one rank's batch.
    """
    sums = dict(reading.sums)
    batches = float(sums.pop("batches"))
    use = codebook_usage(sums.pop("code_counts"), sizes)
    values = {name: float(total) / batches for name, total in sums.items()}
    values |= {"use": float(use.share.mean()), "perplexity": float(use.perplexity.mean())}
    values["audio_seconds_per_second"] = batches * seconds / reading.seconds
    if taken := trainer.teacher_time.read():
        values["teacher_share"] = taken / reading.seconds
    return values


def check_training_setup(
    models: TrainingModels, crops: CropConfig, losses: LossConfig, accelerator: Any
) -> None:
    """Raises `ValueError` for a launch or crops that cannot train these models."""
    if accelerator.distributed_type.value == "DEEPSPEED":
        raise ValueError(
            "the codec's two optimizers do not train under DeepSpeed; launch with "
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


def list_bad(file: Path) -> None:
    """Rewrites skipped.jsonl with one line per recording: several processes may have added it."""
    if not file.is_file():
        return
    bad = {line.value["id"]: line.value for line in read_appended(file)}
    write_json_lines(file, bad.values())
    logger.warning("%d recordings could not be read; %s lists them and why", len(bad), file)


def save_codec(codec: Codec, folder: Path) -> None:
    """Writes a trained codec's folder, which replaces an earlier one.

    Raises:
        OSError: the disk is full.
    """
    with atomic_folder(folder) as partial:
        codec.save_pretrained(partial)
