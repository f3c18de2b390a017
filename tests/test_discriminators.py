"""Discriminators: shapes, sizes of the published ones, and that they can tell."""

import pytest
import torch

from codec.discriminators import Discriminators, PeriodDiscriminator, STFTDiscriminator
from codec.train_config import DiscriminatorConfig

TINY = DiscriminatorConfig(
    periods=(2, 3), num_scales=2, stft_windows=(128,), stft_filters=4, width_divisor=32
)


def test_published_sizes() -> None:
    """HiFi-GAN's period discriminator has 8.22 M parameters (counted in its released code)."""
    count = sum(each.numel() for each in PeriodDiscriminator(2).parameters())
    assert count == 8_221_154
    features = STFTDiscriminator(1024, 32)(torch.randn(1, 1, 16_000)).features
    assert [each.shape[1] for each in features] == [32, 32, 32, 32, 32, 1]
    # Strides of 2 along frequency only: 513, 513, 257, 129, 65 bins.
    assert [each.shape[3] for each in features] == [513, 257, 129, 65, 65, 65]


def test_every_sub_discriminator_speaks_and_keeps_items_apart() -> None:
    torch.manual_seed(0)
    discriminators = Discriminators(TINY).eval()
    wave = torch.randn(2, 1, 4001)
    both = discriminators(wave)
    assert len(both) == 5
    for alone, together in zip(discriminators(wave[1:]), both, strict=True):
        torch.testing.assert_close(alone.score[0], together.score[1], atol=1e-5, rtol=1e-4)
        assert len(together.features) >= 6


def test_they_learn_to_tell_noise_from_a_tone() -> None:
    torch.manual_seed(0)
    discriminators = Discriminators(TINY)
    optimizer = torch.optim.Adam(discriminators.parameters(), 1e-3)
    tone = 0.3 * torch.sin(torch.arange(4000) * 0.1).expand(2, 1, -1)
    for _ in range(60):
        noise = 0.3 * torch.randn(2, 1, 4000)
        loss = sum(
            (1 - real.score).square().mean() + fake.score.square().mean()
            for real, fake in zip(discriminators(tone), discriminators(noise), strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.6 * 5


def test_none_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="leave none"):
        Discriminators(DiscriminatorConfig(periods=(), num_scales=0, stft_windows=()))
