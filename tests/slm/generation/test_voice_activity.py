"""slm/generation/voice_activity.py: what holds no speech, and what may."""

import numpy as np
import pytest
from conftest import voiced

from slm.generation.voice_activity import reason_without_speech

RATE = 16_000


def noise(seconds: float, level: float = 0.1, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (level * samples).astype(np.float32)


def impulse() -> np.ndarray:
    wave = np.zeros(2 * RATE, np.float32)
    wave[RATE] = 0.9
    return wave


@pytest.mark.parametrize(
    ("wave", "reason"),
    [
        (voiced(0.01), "only 0.01 s long"),
        (0.6 + 0.2 * voiced(2.0), "constant of 0.6"),
        (np.full(RATE, 0.5, np.float32), "constant of 0.5"),
        (impulse(), "0.00 s of 2.0 s are voiced"),
        (noise(20.0), "0.00 s of 20.0 s are voiced"),
        (noise(2.0) * np.repeat([1e-3, 1.0], RATE).astype(np.float32), "noise or clicks"),
        (np.zeros(RATE, np.float32), "noise or clicks"),
    ],
)
def test_what_holds_no_speech_is_refused(wave: np.ndarray, reason: str) -> None:
    assert reason in reason_without_speech(wave, RATE)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("level", [1.0, 0.003])
def test_a_voice_passes(seed: int, level: float) -> None:
    for rate in (8000, 16_000, 24_000):
        assert reason_without_speech(level * voiced(0.3, rate, seed), rate) is None
    # In noise, behind a pause, with the offset of a sound card.
    buried = np.concatenate([noise(5.0, 0.02 * level), level * voiced(0.3)])
    assert reason_without_speech(buried + noise(5.3, 0.02 * level, 1), RATE) is None
    assert reason_without_speech(level * voiced(1.0) + np.float32(0.02), RATE) is None


def test_a_whisper_passes() -> None:
    """Coloured noise whose level varies as that of syllables."""
    spectrum = np.fft.rfft(noise(3.0))
    bins = np.linspace(0, RATE / 2, len(spectrum))
    peaks = sum(np.exp(-(((bins - center) / 200) ** 2)) for center in (700, 1800, 2600))
    whisper = np.fft.irfft(spectrum * (peaks + 0.01))
    times = np.arange(len(whisper)) / RATE
    whisper *= 0.5 + 0.5 * np.sin(2 * np.pi * 3 * times) + 1e-3
    assert reason_without_speech(whisper.astype(np.float32), RATE) is None
