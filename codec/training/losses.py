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

_banks: dict[tuple[int, int, int, bool, torch.device], Tensor] = {}


def wave_loss(fake: Float[Tensor, "B 1 S"], real: Float[Tensor, "B 1 S"]) -> Float[Tensor, ""]:
    """Mean absolute difference of samples."""
    return functional.l1_loss(fake, real)


def mel_magnitudes(
    wave: Float[Tensor, "B 1 S"], scale: MelScaleConfig, sample_rate: int, form: str
) -> Float[Tensor, "B M T"]:
    """HTK mels (form `speechtokenizer`), or Slaney mels of centred frames (form `lmspt`)."""
    slaney = form == "lmspt"
    key = (sample_rate, scale.window, scale.num_mels, slaney, wave.device)
    if key not in _banks:
        # Cached by everything that the filters depend on: building them costs more than using them.
        _banks[key] = mel_filterbank(
            sample_rate=sample_rate, num_mels=scale.num_mels, window=scale.window,
            slaney_scale=slaney,
        ).to(wave.device)  # fmt: skip
    # Under autocast the product would be rounded to bfloat16, and quiet bands would be lost.
    with torch.autocast(wave.device.type, enabled=False):
        magnitude = magnitude_spectrogram(
            wave.squeeze(1).float(), window=scale.window, hop=scale.hop, centered=slaney
        )
        return _banks[key].T @ magnitude


def log_mel(
    wave: Float[Tensor, "B 1 S"], scale: MelScaleConfig, sample_rate: int
) -> Float[Tensor, "B M T"]:
    """Natural-log mel magnitudes as SpeechTokenizer computes them."""
    return _log(mel_magnitudes(wave, scale, sample_rate, "speechtokenizer"), "speechtokenizer")


def _log(mel: Tensor, form: str) -> Tensor:
    mel = mel.clamp(min=MEL_FLOOR)
    return mel.square().log10() if form == "lmspt" else mel.log()


def mel_loss(
    fake: Float[Tensor, "B 1 S"],
    real: Float[Tensor, "B 1 S"],
    scales: Sequence[MelScaleConfig],
    *,
    sample_rate: int,
    l2_weight: float = 0.0,
    linear_weight: float = 0.0,
    form: str = "speechtokenizer",
) -> Float[Tensor, ""]:
    """Weighted sum over resolutions of the L1 (and squared) difference of log-mel spectrograms,
    and of the L1 difference of the mels before the logarithm.

    Source: SpeechTokenizer's released trainer; `l2_weight` 1 is the papers' form (2308.16692, A).
    LM-SPT's released trainer: form `lmspt` and `linear_weight` 1.
    """
    total = fake.new_zeros(())
    for scale in scales:
        fakes, reals = (mel_magnitudes(wave, scale, sample_rate, form) for wave in (fake, real))
        a, b = _log(fakes, form), _log(reals, form)
        term = functional.l1_loss(a, b)
        if l2_weight:
            term = term + l2_weight * functional.mse_loss(a, b)
        if linear_weight:
            term = term + linear_weight * functional.l1_loss(fakes, reals)
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
    real: Sequence[Verdict], fake: Sequence[Verdict], *, normalize: bool, scores: bool = True
) -> Float[Tensor, ""]:
    """Feature matching: absolute difference of every discriminator layer, the last one, the score,
    among them where `scores` says so.

    The released code sums them, twice over (HiFi-GAN's factor); the papers divide each by the real
    layer's mean magnitude and average (2210.13438, section 3.4). LM-SPT's released code sums all
    but the scores and weighs the sum 2: the factor here, at weight 1.
    """
    last = None if scores else -1
    terms = []
    for on_real, on_fake in zip(real, fake, strict=True):
        for a, b in zip(on_real.features[:last], on_fake.features[:last], strict=True):
            # The real side is a target: a gradient there would train nothing.
            distance = functional.l1_loss(b, a.detach())
            terms.append(
                distance / a.detach().abs().mean().clamp(min=1e-6) if normalize else distance
            )
    stacked = torch.stack(terms)
    return stacked.mean() if normalize else 2 * stacked.sum()
