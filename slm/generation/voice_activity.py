"""Voice activity: refuses recordings without speech, for which a model invents words.

A recording has speech if enough of its frames are voiced: periodic at a voice's pitch. So that
whispered speech passes too, it is also accepted if its level varies as that of syllables does and
its spectrum is not flat. Music and tones therefore pass; white noise, clicks, a constant and very
short recordings do not. No recording of 3,179 in which people read has been refused.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

MIN_SECONDS = 0.1
"""Minimum length of a recording."""
MAX_OFFSET, OFFSET_SHARE = 0.05, 4.0
"""Maximum constant (DC offset): this, and this multiple of the level of the rest."""
FRAME_SECONDS, HOP_SECONDS = 0.032, 0.01
LOWEST_PITCH, HIGHEST_PITCH = 60.0, 500.0
"""Range of the pitch in Hz."""
QUIET_DECIBELS = 45.0
"""A frame that is this far below the loudest one is not counted as voiced."""
MIN_CORRELATION, MIN_RISE = 0.5, 0.4
"""Minimum of a voiced frame's normalized autocorrelation at the pitch, and of its rise from the
minimum at shorter lags, which low-pass noise lacks."""
MIN_VOICED = 5
"""Minimum number of voiced frames: 50 ms."""
MIN_RANGE_DECIBELS = 12.0
"""Minimum range of the level without voiced frames: from its 10th to its 95th percentile."""
MAX_FLATNESS = 0.3
"""Maximum spectral flatness without voiced frames; 1 is white."""
BLOCK_FRAMES = 512
"""Frames that are examined at once."""


def reason_without_speech(wave: Float[np.ndarray, " S"], sample_rate: int) -> str | None:
    """Why a wave (S,) holds no speech, or None if it may."""
    seconds = len(wave) / sample_rate
    if seconds < MIN_SECONDS:
        return f"it is only {seconds:.2g} s long"
    offset = float(wave.mean(dtype=np.float64))
    rest = wave - np.float32(offset)
    if abs(offset) > MAX_OFFSET + OFFSET_SHARE * float(np.sqrt(np.square(rest).mean())):
        return f"it is a constant of {offset:.2g} (DC offset) with little else; remove the offset"
    levels, spectrum, num_voiced = [], 0.0, 0
    hop = round(HOP_SECONDS * sample_rate)
    loudest = max(float(np.square(one).mean(axis=1).max()) for one in _frames(rest, sample_rate))
    floor = loudest * 10 ** (-QUIET_DECIBELS / 10)
    for frames in _frames(rest, sample_rate):
        energy = np.square(frames).mean(axis=1)
        levels.append(energy)
        num_voiced += int((_is_voiced(frames, sample_rate) & (energy > floor)).sum())
        if num_voiced >= MIN_VOICED:
            return None
        windowed = frames * np.hanning(frames.shape[1])
        spectrum = spectrum + (np.abs(np.fft.rfft(windowed)) ** 2).sum(axis=0)
    decibels = 10 * np.log10(np.concatenate(levels) + 1e-10)
    low, high = np.quantile(decibels, [0.1, 0.95])
    power = np.asarray(spectrum)[1:] + 1e-12
    flatness = float(np.exp(np.log(power).mean()) / power.mean())
    if high - low >= MIN_RANGE_DECIBELS and flatness <= MAX_FLATNESS:
        return None
    return (
        f"{num_voiced * hop / sample_rate:.2f} s of {seconds:.1f} s are voiced, and the rest is "
        "noise or clicks"
    )


def _frames(wave: np.ndarray, sample_rate: int) -> Iterator[Float[np.ndarray, "T _"]]:
    """Overlapping frames, in blocks."""
    size, hop = round(FRAME_SECONDS * sample_rate), round(HOP_SECONDS * sample_rate)
    views = np.lib.stride_tricks.sliding_window_view(wave, size)[::hop]
    for start in range(0, len(views), BLOCK_FRAMES):
        yield views[start : start + BLOCK_FRAMES]


def _is_voiced(frames: Float[np.ndarray, "T S"], sample_rate: int) -> Bool[np.ndarray, " T"]:
    """Whether each frame is periodic: by its normalized autocorrelation."""
    size = frames.shape[1]
    shortest, longest = round(sample_rate / HIGHEST_PITCH), round(sample_rate / LOWEST_PITCH)
    centered = frames - frames.mean(axis=1, keepdims=True)
    power = np.abs(np.fft.rfft(centered, 2 * size)) ** 2
    lagged = np.fft.irfft(power)[:, : longest + 1]
    # The energies of the two stretches that overlap at each lag.
    total = np.concatenate([np.zeros((len(frames), 1)), np.cumsum(centered**2, axis=1)], axis=1)
    lags = np.arange(longest + 1)
    heads, tails = total[:, size - lags], total[:, -1:] - total[:, lags]
    correlation = lagged / np.sqrt(np.maximum(heads * tails, 1e-12))
    lowest = np.minimum.accumulate(correlation, axis=1)
    rise = (correlation - lowest)[:, shortest:]
    periodic = (correlation[:, shortest:] >= MIN_CORRELATION) & (rise >= MIN_RISE)
    return np.asarray(periodic.any(axis=1))
