"""A loss that counts what an ear understands: STOI between two waves, with a gradient.

Taal et al. 2011 (IEEE TASLP 19(7), 2125-2136), at the waves' own sample rate in place of 10 kHz and
without cutting out silence first: stretches whose speech is far below the loudest do not count.
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from codec.audio import magnitude_spectrogram

FRAME_SECONDS = 0.0256
BANDS, LOWEST_HZ = 15, 150.0
"""One-third octave bands, and the centre of the lowest."""
STRETCH = 30
"""Frames that are compared at once: 384 ms."""
STEP = 2
"""Frames between two stretches (STOI's is 1; neighbours say nearly the same)."""
CLIP = 1 + 10 ** (15 / 20)
"""No band may exceed the original by more: a signal-to-distortion ratio of -15 dB."""
QUIET = 1e-2
"""Stretches below this share of the loudest one's magnitude (-40 dB) do not count."""
SILENT = 0.05
"""Nor do those below this magnitude, some -80 dB of full scale."""
TINY = 1e-8


def stoi_loss(
    fake: Float[Tensor, "B 1 S"], real: Float[Tensor, "B 1 S"], sample_rate: int
) -> Float[Tensor, ""]:
    """1 less the mean correlation of band magnitudes over 384 ms, 0 for what is fully understood.

    Items without speech, and of less than 384 ms, count nothing.
    """
    with torch.autocast(fake.device.type, enabled=False):
        said, meant = (_stretches(wave.squeeze(1).float(), sample_rate) for wave in (fake, real))
        strength = meant.norm(dim=-1, keepdim=True)
        scaled = said * (strength / (said.norm(dim=-1, keepdim=True) + TINY))
        clipped = torch.minimum(scaled, meant * CLIP)
        likeness = (_centred(clipped) * _centred(meant)).sum(-1)  # (B, K, N)
        loudness = strength[..., 0].square().sum(1).sqrt()
        loudest = loudness.amax(dim=-1, keepdim=True) if loudness.shape[-1] else loudness
        counts = (loudness > (QUIET * loudest).clamp(min=SILENT)).float()[:, None]
        total = (counts.sum() * BANDS).clamp(min=1)
        return (counts * (1 - likeness)).sum() / total


def _centred(values: Float[Tensor, "B K N L"]) -> Float[Tensor, "B K N L"]:
    """Of zero mean and unit length over a stretch."""
    values = values - values.mean(dim=-1, keepdim=True)
    return values / (values.norm(dim=-1, keepdim=True) + TINY)


def _stretches(wave: Float[Tensor, "B S"], sample_rate: int) -> Float[Tensor, "B K N L"]:
    """Magnitudes of the bands in overlapping stretches."""
    window = round(FRAME_SECONDS * sample_rate)
    window += window % 2
    magnitude = magnitude_spectrogram(wave, window=window, hop=window // 2)
    bands = _bands(sample_rate, window).to(wave.device)
    energy = bands @ magnitude.square()
    size = energy.shape[-1]
    if size < STRETCH:
        return energy.new_zeros(len(wave), BANDS, 0, STRETCH) + 0 * energy.sum()
    return (energy + TINY).sqrt().unfold(-1, STRETCH, STEP)


@lru_cache
def _bands(sample_rate: int, window: int) -> Float[Tensor, "K F"]:
    """Which bins of a spectrum belong to a band: 1 or 0."""
    centres = LOWEST_HZ * 2 ** (torch.arange(BANDS) / 3)
    bins = torch.arange(window // 2 + 1) * sample_rate / window
    low, high = centres * 2 ** (-1 / 6), centres * 2 ** (1 / 6)
    return ((bins >= low[:, None]) & (bins < high[:, None])).float()
