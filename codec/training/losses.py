"""Loss functions of waves and of the discriminators' outputs. Each is a mean over the batch."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from codec.audio import magnitude_spectrogram, mel_filterbank
from codec.modules.discriminators import DiscriminatorOutput
from codec.training.config import MelScaleConfig

MEL_FLOOR = 1e-5

_banks: dict[tuple[int, int, int, bool, torch.device], Tensor] = {}


def wave_loss(fake: Float[Tensor, "B 1 S"], real: Float[Tensor, "B 1 S"]) -> Float[Tensor, ""]:
    """Mean absolute difference of samples."""
    return functional.l1_loss(fake, real)


def mel_magnitudes(
    wave: Float[Tensor, "B 1 S"], scale: MelScaleConfig, sample_rate: int, form: str
) -> Float[Tensor, "B M T"]:
    """HTK mels (form `speechtokenizer`), or Slaney mels of centered frames (form `lmspt`)."""
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
    """Weighted sum over resolutions of norms of the log-mel difference d, and of the L1 difference
    of the mels before the logarithm.

    The norms are means over the N bins of an item, so that they do not depend on a crop's length:
    the L1 term is |d|_1 / N, the L2 term |d|_2 / sqrt(N), the root of the mean square.

    Source: SpeechTokenizer's released trainer has the L1 term alone; `l2_weight` 1 is the papers'
    form (DM-Codec, 2410.15017, equation 5; 2308.16692, appendix). LM-SPT's released trainer: form
    `lmspt` and `linear_weight` 1.
    """
    total = fake.new_zeros(())
    for scale in scales:
        fakes, reals = (mel_magnitudes(wave, scale, sample_rate, form) for wave in (fake, real))
        a, b = _log(fakes, form), _log(reals, form)
        term = functional.l1_loss(a, b)
        if l2_weight:
            # The norm's gradient is 0, not undefined, where both are silent.
            norms = torch.linalg.vector_norm(a - b, dim=(1, 2)) / a[0].numel() ** 0.5
            term = term + l2_weight * norms.mean()
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
    real: Sequence[DiscriminatorOutput], fake: Sequence[DiscriminatorOutput], form: str
) -> Float[Tensor, ""]:
    """Least squares (LSGAN) summed over sub-discriminators, or hinge averaged over them.

    The released code has the first, the papers the second (2210.13438, section 3.4).
    """
    total = real[0].logits.new_zeros(())
    for on_real, on_fake in zip(real, fake, strict=True):
        if form == "hinge":
            terms_of_both = functional.relu(1 - on_real.logits).mean()
            terms_of_both = terms_of_both + functional.relu(1 + on_fake.logits).mean()
            total = total + terms_of_both / len(real)
        else:
            total = total + (1 - on_real.logits).square().mean() + on_fake.logits.square().mean()
    return total


def adversarial_loss(fake: Sequence[DiscriminatorOutput], form: str) -> Float[Tensor, ""]:
    """The generator's loss on the discriminators' outputs, in the form of `discriminator_loss`."""
    total = fake[0].logits.new_zeros(())
    for on_fake in fake:
        if form == "hinge":
            total = total + functional.relu(1 - on_fake.logits).mean() / len(fake)
        else:
            total = total + (1 - on_fake.logits).square().mean()
    return total


def feature_loss(
    real: Sequence[DiscriminatorOutput],
    fake: Sequence[DiscriminatorOutput],
    *,
    normalize: bool,
    logits: bool = True,
) -> Float[Tensor, ""]:
    """Feature matching: absolute difference of every discriminator layer; the last layer, the
    logits, is included where `logits` is true.

    The released code sums them, twice over (HiFi-GAN's factor); the papers divide each by the real
    layer's mean magnitude and average (2210.13438, section 3.4). LM-SPT's released code sums all
    but the logits and weighs the sum 2: the factor here, at weight 1.
    """
    last = None if logits else -1
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


FRAME_SECONDS = 0.0256
BANDS, LOWEST_HZ = 15, 150.0
"""One-third octave bands, and the center of the lowest."""
SEGMENT_FRAMES = 30
"""Frames of a segment: 384 ms."""
SEGMENT_STEP = 2
"""Frames between two segments (STOI's is 1; neighbors are nearly the same)."""
CLIP = 1 + 10 ** (15 / 20)
"""No band may exceed the original by more: a signal-to-distortion ratio of -15 dB."""
QUIET = 1e-2
"""Segments below this share of the loudest one's magnitude (-40 dB) do not count."""
SILENT = 0.05
"""Nor do those below this magnitude, some -80 dB of full scale."""
TINY = 1e-8


def stoi_loss(
    fake: Float[Tensor, "B 1 S"], real: Float[Tensor, "B 1 S"], sample_rate: int
) -> Float[Tensor, ""]:
    """1 - STOI: 0 where the magnitudes of all bands correlate fully over 384 ms.

    Taal et al. 2011 (IEEE TASLP 19(7), 2125-2136), at the waves' own sample rate in place of 10 kHz
    and without removing silence first: segments far below the loudest one do not count, nor do
    items without speech and items of less than 384 ms.
    """
    with torch.autocast(fake.device.type, enabled=False):
        degraded, clean = (_segments(wave.squeeze(1).float(), sample_rate) for wave in (fake, real))
        strength = clean.norm(dim=-1, keepdim=True)
        scaled = degraded * (strength / (degraded.norm(dim=-1, keepdim=True) + TINY))
        clipped = torch.minimum(scaled, clean * CLIP)
        correlation = (_centered(clipped) * _centered(clean)).sum(-1)  # (B, K, N)
        loudness = strength[..., 0].square().sum(1).sqrt()
        loudest = loudness.amax(dim=-1, keepdim=True) if loudness.shape[-1] else loudness
        counts = (loudness > (QUIET * loudest).clamp(min=SILENT)).float()[:, None]
        total = (counts.sum() * BANDS).clamp(min=1)
        return (counts * (1 - correlation)).sum() / total


def _centered(values: Float[Tensor, "B K N L"]) -> Float[Tensor, "B K N L"]:
    """Of zero mean and unit norm over a segment."""
    values = values - values.mean(dim=-1, keepdim=True)
    return values / (values.norm(dim=-1, keepdim=True) + TINY)


def _segments(wave: Float[Tensor, "B S"], sample_rate: int) -> Float[Tensor, "B K N L"]:
    """Magnitudes of the bands in overlapping segments."""
    window = round(FRAME_SECONDS * sample_rate)
    window += window % 2
    magnitude = magnitude_spectrogram(wave, window=window, hop=window // 2)
    bands = _bands(sample_rate, window).to(wave.device)
    energy = bands @ magnitude.square()
    size = energy.shape[-1]
    if size < SEGMENT_FRAMES:
        return energy.new_zeros(len(wave), BANDS, 0, SEGMENT_FRAMES) + 0 * energy.sum()
    return (energy + TINY).sqrt().unfold(-1, SEGMENT_FRAMES, SEGMENT_STEP)


@lru_cache
def _bands(sample_rate: int, window: int) -> Float[Tensor, "K F"]:
    """1 where a bin of the spectrum belongs to a one-third octave band, else 0."""
    centers = LOWEST_HZ * 2 ** (torch.arange(BANDS) / 3)
    bins = torch.arange(window // 2 + 1) * sample_rate / window
    low, high = centers * 2 ** (-1 / 6), centers * 2 ** (1 / 6)
    return ((bins >= low[:, None]) & (bins < high[:, None])).float()
