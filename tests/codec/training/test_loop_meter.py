"""The meter and the stopwatch."""

import pytest
import torch
from tiny_codec_training import SingleProcess

from codec import Codec, CodecConfig
from codec.config import QuantizerConfig, SpectralConfig
from codec.distillation.objectives import Student
from codec.modules.quantize import count_codes
from codec.training.codec_fit import metrics
from codec.training.codec_step import Trainer, TrainingModels
from codec.training.config import CodecOptimConfig, LossConfig
from codec.training.loop import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time is what the list holds."""
    now = [100.0]
    monkeypatch.setattr("codec.training.loop.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("codec.training.loop.time.monotonic", lambda: now[0])
    return now


def test_a_stopwatch_sums_what_it_is_held_over(clock: list[float]) -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    for seconds in (2.0, 3.0):
        with stopwatch:
            clock[0] += seconds
        clock[0] += 10.0
    assert stopwatch.read() == 5.0
    assert stopwatch.read() == 0.0


def test_means_between_two_logged_steps(clock: list[float]) -> None:
    networks = SpectralConfig(
        num_mels=20, encoder_width=8, encoder_depths=(1, 1, 1), dimension=8, decoder_width=8,
        decoder_depths=(1, 1, 1),
    )  # fmt: skip
    quantizer = QuantizerConfig(num_codebooks=2, codebook_sizes=(4, 8))
    codec = Codec(CodecConfig(spectral=networks, quantizer=quantizer))
    trainer = Trainer(
        TrainingModels(Student(codec)), [], SingleProcess(), LossConfig(), CodecOptimConfig()
    )  # fmt: skip

    def add(codes: list[list[int]], loss: float) -> None:
        counts = count_codes(torch.tensor([codes]), 8)
        parts = {"mel": torch.tensor(loss), "code_counts": counts, "batches": torch.ones(())}
        trainer.meter.add(parts)

    def values() -> dict[str, float]:
        reading = trainer.meter.read(SingleProcess())
        return metrics(trainer, reading, codec.codebook_sizes, seconds=6.0)

    trainer.meter.read(SingleProcess())
    for loss in (1.0, 3.0):
        with trainer.teacher_time:
            clock[0] += 1.0
        clock[0] += 3.0
        with trainer.meter.paused():
            clock[0] += 16.0  # A validation.
        add([[0, 1], [2, 2]], loss)
    first = values()
    assert first["mel"] == 2.0
    assert first["teacher_share"] == 0.25
    assert first["audio_seconds_per_second"] == 2 * 6.0 / 8.0
    assert first["use"] == pytest.approx((2 / 4 + 1 / 8) / 2)
    assert first["perplexity"] == pytest.approx((2 + 1) / 2)
    clock[0] += 1.0
    add([[3, 3], [3, 3]], 7.0)
    second = values()
    assert (second["mel"], second["use"]) == (7.0, (1 / 4 + 1 / 8) / 2)
    assert "teacher_share" not in second
