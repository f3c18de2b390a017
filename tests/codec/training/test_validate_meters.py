"""What a run measures between two logged steps."""

import pytest
import torch

from codec import Codec, CodecConfig
from codec.config import QuantizerConfig, SpectralConfig
from codec.modules.quantize import Quantized
from codec.training import validate as meters
from codec.training.validate import Stopwatch, Window


class Alone:
    """As much of an accelerator as one process needs."""

    @staticmethod
    def reduce(values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time is what the list holds."""
    now = [100.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    return now


def quantized(codes: list[list[int]]) -> Quantized:
    nothing = torch.zeros(1, 8, len(codes[0]))
    zeros = torch.zeros(2)
    return Quantized(nothing, (nothing, nothing), torch.tensor([codes]), zeros, zeros)


def test_a_stopwatch_sums_what_it_is_held_over(clock: list[float]) -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    for seconds in (2.0, 3.0):
        with stopwatch:
            clock[0] += seconds
        clock[0] += 10.0
    assert stopwatch.read() == 5.0
    assert stopwatch.read() == 0.0


def test_means_of_a_window(clock: list[float]) -> None:
    networks = SpectralConfig(
        num_mels=20, encoder_width=8, encoder_depths=(1, 1, 1), dimension=8, decoder_width=8,
        decoder_depths=(1, 1, 1),
    )  # fmt: skip
    quantizer = QuantizerConfig(num_codebooks=2, codebook_sizes=(4, 8))
    window = Window(Codec(CodecConfig(spectral=networks, quantizer=quantizer)))
    for loss in (1.0, 3.0):
        with window.steps:
            with window.teachers:
                clock[0] += 1.0
            clock[0] += 3.0
        clock[0] += 16.0  # A validation: no step's time.
        window.add(quantized([[0, 1], [2, 2]]), {"mel": torch.tensor(loss)})
    values = window.means(Alone(), audio_seconds=6.0)
    assert values["mel"] == 2.0
    assert values["teacher_share"] == 0.25
    assert values["audio_seconds_per_second"] == 2 * 6.0 / 40.0
    assert values["use"] == pytest.approx((2 / 4 + 1 / 8) / 2)
    assert values["perplexity"] == pytest.approx((2 + 1) / 2)
    with window.steps:
        clock[0] += 1.0
    window.add(quantized([[3, 3], [3, 3]]), {"mel": torch.tensor(7.0)})
    values = window.means(Alone(), audio_seconds=6.0)
    assert (values["mel"], values["use"]) == (7.0, (1 / 4 + 1 / 8) / 2)
    assert "teacher_share" not in values
