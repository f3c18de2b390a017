"""Pure loss functions of waves and of what discriminators say. Each is a mean over the batch."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from codec.audio import magnitude_spectrogram, mel_filterbank
from codec.discriminators import Verdict
from codec.train_config import MelScaleConfig

MEL_FLOOR = 1e-5

_banks: dict[tuple[int, int, int, torch.device], Tensor] = {}


def wave_loss(fake: Float[Tensor, "B 1 S"], real: Float[Tensor, "B 1 S"]) -> Float[Tensor, ""]:
    """Mean absolute difference of samples."""
    return functional.l1_loss(fake, real)


def log_mel(
    wave: Float[Tensor, "B 1 S"], scale: MelScaleConfig, sample_rate: int
) -> Float[Tensor, "B M T"]:
    """Natural-log mel magnitudes as SpeechTokenizer computes them."""
    key = (sample_rate, scale.window, scale.num_mels, wave.device)
    if key not in _banks:
        # Cached by everything that the filters depend on: building them costs more than using them.
        _banks[key] = mel_filterbank(
            sample_rate=sample_rate, num_mels=scale.num_mels, window=scale.window
        ).to(wave.device)
    # Under autocast the product would be rounded to bfloat16, and quiet bands would be lost.
    with torch.autocast(wave.device.type, enabled=False):
        wave = wave.squeeze(1).float()
        magnitude = magnitude_spectrogram(wave, window=scale.window, hop=scale.hop)
        return (_banks[key].T @ magnitude).clamp(min=MEL_FLOOR).log()


def mel_loss(
    fake: Float[Tensor, "B 1 S"],
    real: Float[Tensor, "B 1 S"],
    scales: Sequence[MelScaleConfig],
    *,
    sample_rate: int,
    l2_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Weighted sum over resolutions of the L1 (and squared) difference of log-mel spectrograms.

    Source: SpeechTokenizer's released trainer; `l2_weight` 1 is the papers' form (2308.16692, A).
    """
    total = fake.new_zeros(())
    for scale in scales:
        a, b = log_mel(fake, scale, sample_rate), log_mel(real, scale, sample_rate)
        term = functional.l1_loss(a, b)
        if l2_weight:
            term = term + l2_weight * functional.mse_loss(a, b)
        total = total + scale.weight * term
    return total


def magnitude_loss(
    fake: Float[Tensor, "B 1 S"], real: Float[Tensor, "B 1 S"], windows: Sequence[int]
) -> Float[Tensor, ""]:
    """Spectral convergence, |A - B| / |B| in Frobenius norm per item, summed over STFT windows.

    Source: Parallel WaveGAN (arXiv 1910.11480), equation 4.
    """
    total = fake.new_zeros(())
    for window in windows:
        a, b = (
            magnitude_spectrogram(wave.squeeze(1).float(), window=window, hop=window // 4)
            for wave in (fake, real)
        )
        total = total + ((a - b).norm(dim=(1, 2)) / b.norm(dim=(1, 2)).clamp(min=1e-2)).mean()
    return total


def discriminator_loss(
    real: Sequence[Verdict], fake: Sequence[Verdict], form: str
) -> Float[Tensor, ""]:
    """Least squares (LSGAN) summed over sub-discriminators, or hinge averaged over them.

    The released code has the first, the papers the second (2210.13438, section 3.4).
    """
    total = real[0].score.new_zeros(())
    for on_real, on_fake in zip(real, fake, strict=True):
        if form == "hinge":
            on_both = functional.relu(1 - on_real.score).mean()
            on_both = on_both + functional.relu(1 + on_fake.score).mean()
            total = total + on_both / len(real)
        else:
            total = total + (1 - on_real.score).square().mean() + on_fake.score.square().mean()
    return total


def adversarial_loss(fake: Sequence[Verdict], form: str) -> Float[Tensor, ""]:
    """The generator's side of `discriminator_loss`."""
    total = fake[0].score.new_zeros(())
    for on_fake in fake:
        if form == "hinge":
            total = total + functional.relu(1 - on_fake.score).mean() / len(fake)
        else:
            total = total + (1 - on_fake.score).square().mean()
    return total


def feature_loss(
    real: Sequence[Verdict], fake: Sequence[Verdict], *, normalize: bool
) -> Float[Tensor, ""]:
    """Feature matching: absolute difference of every discriminator layer.

    The released code sums them, twice over (HiFi-GAN's factor); the papers divide each by the real
    layer's mean magnitude and average (2210.13438, section 3.4).
    """
    terms = []
    for on_real, on_fake in zip(real, fake, strict=True):
        for a, b in zip(on_real.features, on_fake.features, strict=True):
            # The real side is a target: a gradient there would train nothing.
            distance = functional.l1_loss(b, a.detach())
            terms.append(
                distance / a.detach().abs().mean().clamp(min=1e-6) if normalize else distance
            )
    stacked = torch.stack(terms)
    return stacked.mean() if normalize else 2 * stacked.sum()
