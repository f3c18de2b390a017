"""Losses: known values, known minima, gradients where they belong."""

import pytest
import torch

from codec.discriminators import Verdict
from codec.losses import (
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    log_mel,
    magnitude_loss,
    mel_loss,
    wave_loss,
)
from codec.train_config import LossConfig, LossWeights, MelScaleConfig

SCALES = LossConfig().mel_scales


@pytest.fixture
def waves() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    real, fake = 0.1 * torch.randn(2, 2, 1, 8000, generator=generator)
    return real, fake


def test_equal_waves_cost_nothing(waves) -> None:
    real, _ = waves
    assert wave_loss(real, real) == 0
    assert mel_loss(real, real, SCALES, sample_rate=16_000, l2_weight=1.0) == 0
    assert magnitude_loss(real, real, (512, 128)) == 0


def test_log_mel_rises_by_the_log_of_the_gain(waves) -> None:
    real, _ = waves
    scale = MelScaleConfig(window=1024, hop=240, num_mels=80)
    louder = log_mel(2 * real, scale, 16_000) - log_mel(real, scale, 16_000)
    torch.testing.assert_close(louder, torch.full_like(louder, 0.6931), atol=1e-2, rtol=0)
    # ceil((8000 - 1024 + 784) / 240) frames: the released code's reflect padding.
    assert log_mel(real, scale, 16_000).shape == (2, 80, 33)


def test_mel_filters_are_kept_apart_by_resolution(waves) -> None:
    """The released code's cache ignores n_fft: a naive fix would reuse the wrong filters."""
    real, fake = waves
    scales = [MelScaleConfig(window=w, hop=w // 4, num_mels=20) for w in (512, 1024)]
    first = mel_loss(fake, real, scales[:1], sample_rate=16_000)
    mel_loss(fake, real, scales[1:], sample_rate=16_000)
    assert mel_loss(fake, real, scales[:1], sample_rate=16_000) == first


def test_weights_of_scales_and_of_the_squared_term_count(waves) -> None:
    real, fake = waves
    one = [MelScaleConfig(window=512, hop=128, num_mels=20, weight=1.0)]
    three = [MelScaleConfig(window=512, hop=128, num_mels=20, weight=3.0)]
    plain = mel_loss(fake, real, one, sample_rate=16_000)
    torch.testing.assert_close(mel_loss(fake, real, three, sample_rate=16_000), 3 * plain)
    a, b = (log_mel(wave, one[0], 16_000) for wave in (fake, real))
    squared = mel_loss(fake, real, one, sample_rate=16_000, l2_weight=1.0)
    torch.testing.assert_close(squared, plain + (a - b).square().mean())


def verdicts(score: float) -> list[Verdict]:
    return [Verdict(torch.full((2, 1, 5), score), [torch.full((2, 3), score)]) for _ in range(2)]


@pytest.mark.parametrize(
    ("form", "real", "fake", "expected", "generator"),
    [
        ("least_squares", 1.0, 0.0, 0.0, 2.0),
        ("least_squares", 0.5, 0.5, 1.0, 0.5),
        ("hinge", 1.0, -1.0, 0.0, 2.0),
        ("hinge", 0.0, 0.0, 2.0, 1.0),
        ("hinge", 0.0, 3.0, 5.0, 0.0),
    ],
)
def test_adversarial_values(form, real, fake, expected, generator) -> None:
    assert discriminator_loss(verdicts(real), verdicts(fake), form) == expected
    assert adversarial_loss(verdicts(fake), form) == generator


def test_feature_loss_forms() -> None:
    # Two sub-discriminators, one layer each, |2 - 5| = 3: released 2 * (3 + 3), papers 3 / 2.
    assert feature_loss(verdicts(2.0), verdicts(5.0), normalize=False) == 12
    assert feature_loss(verdicts(2.0), verdicts(5.0), normalize=True) == 1.5


def test_feature_loss_trains_the_fake_side_only() -> None:
    real, fake = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    score = torch.zeros(1)
    feature_loss([Verdict(score, [real])], [Verdict(score, [fake])], normalize=False).backward()
    assert real.grad is None
    assert fake.grad.abs().sum() > 0


def test_a_codec_without_reconstruction_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="wave, mel and magnitude"):
        LossWeights(mel=0.0, magnitude=0.0)
