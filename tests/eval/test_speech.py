from collections.abc import Callable

import numpy as np
import pytest

from eval.speech import check_and_trim, mel_distance, pesq_wb, resample_for_scoring, stoi


def talk(seconds: float = 3.0, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Syllables of noise-excited harmonics with pauses between them."""
    generator = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    harmonics = sum(np.sin(2 * np.pi * 130 * k * times) / k for k in range(1, 30))
    syllables = np.clip(np.sin(2 * np.pi * 2.5 * times), 0, None)
    wave = syllables * (harmonics + 0.3 * generator.standard_normal(times.size))
    return (0.1 * wave).astype(np.float32)


def noisy(wave: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal(wave.size).astype(np.float32)
    return wave + level * noise


@pytest.mark.parametrize("measure", [stoi, pesq_wb])
@pytest.mark.parametrize("rate", [16000, 24000])
def test_scores_fall_with_noise(measure: Callable[..., float], rate: int) -> None:
    clean = talk(rate=rate)
    scores = [measure(clean, noisy(clean, level), rate) for level in (0.0, 0.01, 0.2)]
    assert scores[0] > scores[1] > scores[2]
    assert scores[0] == pytest.approx({stoi: 1.0, pesq_wb: 4.64}[measure], abs=0.01)


def test_mel_distance_is_zero_for_the_same_and_ln2_for_half() -> None:
    # Loud everywhere, so that no band falls on the floor.
    clean = np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    assert mel_distance(clean, clean, 16000) == 0
    assert mel_distance(clean, clean / 2, 16000) == pytest.approx(np.log(2), rel=1e-3)


@pytest.mark.parametrize("measure", [stoi, pesq_wb, mel_distance])
@pytest.mark.parametrize(
    ("degraded", "message"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.zeros(48000, np.float32), "silent"),
        (np.full(48000, np.nan, np.float32), "NaN"),
        (talk(2.0), "differ by 1.00 s"),
    ],
)
def test_invalid_waves_are_refused(
    measure: Callable[..., float], degraded: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(talk(), degraded, 16000)


@pytest.mark.parametrize("measure", [stoi, pesq_wb, mel_distance])
def test_too_short_waves_are_refused(measure: Callable[..., float]) -> None:
    short = talk(3.0)[:500]
    with pytest.raises(ValueError, match="needs"):
        measure(short, short, 16000)


def test_waves_are_trimmed_within_a_frame() -> None:
    wave = talk()
    assert check_and_trim(wave, wave[:-640], 16000)[0].size == wave.size - 640
    assert stoi(wave, np.append(wave, wave[:640]), 16000) == pytest.approx(1.0)


def test_pesq_without_utterance(monkeypatch: pytest.MonkeyPatch) -> None:
    import pesq

    def find_none(*_: object) -> float:
        raise pesq.NoUtterancesError("none")

    monkeypatch.setattr(pesq, "pesq", find_none)
    with pytest.raises(ValueError, match="no utterance"):
        pesq_wb(talk(), talk(), 16000)


def test_pesq_skips_a_silent_piece() -> None:
    wave = talk(60.0)
    wave[20 * 16000 : 40 * 16000] = 0
    assert pesq_wb(wave, wave, 16000) == pytest.approx(4.64, abs=0.01)


def test_pesq_of_a_long_recording_is_a_mean_of_pieces() -> None:
    long = talk(45.0)
    assert pesq_wb(long, long, 16000) == pytest.approx(4.64, abs=0.01)


def test_resample_changes_length_only() -> None:
    assert resample_for_scoring(talk(1.0), 16000, 24000).size == 24000
