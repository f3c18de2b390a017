"""eval/speech.py and eval/metrics.py: the libraries' own values, values by hand, invariances."""

from collections.abc import Callable

import numpy as np
import pytest

from eval import speech
from eval.metrics import HIGHER_IS_BETTER, MEASURES, PAIRED, UNPAIRED
from eval.speech import (
    SI_SDR_LIMIT,
    check_and_trim,
    estoi,
    f0_correlation,
    f0_gross_error,
    f0_track,
    mel_distance,
    multi_scale_mel_distance,
    pesq_nb,
    pesq_wb,
    resample_for_scoring,
    si_sdr,
    stoi,
    visqol,
    visqol_polynomial,
    visqol_scores,
    voicing_error,
)


def talk(seconds: float = 3.0, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Syllables of noise-excited harmonics with pauses between them."""
    generator = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * 130 * times + 3 * np.sin(2 * np.pi * 0.7 * times)
    harmonics = sum(np.sin(k * phase) / k for k in range(1, 30))
    syllables = np.clip(np.sin(2 * np.pi * 2.5 * times), 0, None)
    wave = syllables * (harmonics + 0.3 * generator.standard_normal(times.size))
    return (0.1 * wave).astype(np.float32)


def noisy(wave: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal(wave.size).astype(np.float32)
    return wave + level * noise


@pytest.mark.parametrize("measure", [stoi, estoi, pesq_wb, pesq_nb])
@pytest.mark.parametrize("rate", [16000, 24000])
def test_scores_fall_with_noise(measure: Callable[..., float], rate: int) -> None:
    clean = talk(2.0, rate=rate)
    scores = [measure(clean, noisy(clean, level), rate) for level in (0.0, 0.01, 0.2)]
    assert scores[0] > scores[1] > scores[2]
    best = {stoi: 1.0, estoi: 1.0, pesq_wb: 4.644, pesq_nb: 4.549}[measure]
    assert scores[0] == pytest.approx(best, abs=1e-3)


def test_values_are_the_libraries_own() -> None:
    from pesq import pesq
    from pystoi import stoi as own_stoi

    clean = talk(1.5)
    coded = noisy(clean, 0.01)
    assert stoi(clean, coded, 16000) == own_stoi(clean, coded, 16000)
    # Within rounding: pystoi adds noise of 1e-16 from the global generator.
    own = own_stoi(clean, coded, 16000, extended=True)
    assert estoi(clean, coded, 16000) == pytest.approx(own, abs=1e-12)
    assert pesq_wb(clean, coded, 16000) == pesq(16000, clean, coded, "wb")
    narrow = talk(1.5, 8000)
    coded = noisy(narrow, 0.01)
    assert pesq_nb(narrow, coded, 8000) == pesq(8000, narrow, coded, "nb")


def test_visqol_is_the_librarys_own() -> None:
    """By both mappers, from one comparison; a wave of another rate is resampled."""
    from visqol import VisqolApi

    clean = talk(1.0)
    coded = noisy(clean, 0.001)
    for lattice, function in ((True, visqol), (False, visqol_polynomial)):
        api = VisqolApi()
        api.create(mode="speech", use_lattice_model=lattice)
        assert function(clean, coded, 16000) == api.measure_from_arrays(clean, coded, 16000).moslqo
    assert speech._visqol_of_bytes.cache_info().hits > 0
    copy = visqol_scores(clean, clean, 16000)
    assert copy.lattice > visqol(clean, coded, 16000)
    assert copy.polynomial == pytest.approx(5, abs=1e-3)
    assert MEASURES["visqol"].setting == "speech mode, lattice mapper"


def test_si_sdr_by_hand() -> None:
    """(3, 4) is (3, 0) of the reference's direction and (0, 4) of residual: 10 log10(9 / 16)."""
    reference = np.array([1.0, 0.0])
    expected = 10 * np.log10(9 / 16)
    for gain in (1.0, -0.5, 20.0):
        coded = gain * np.array([3.0, 4.0])
        assert si_sdr(reference, coded, 16000) == pytest.approx(expected)
        assert si_sdr(gain * reference, coded, 16000) == pytest.approx(expected)
    assert si_sdr(reference, 3 * reference, 16000) == SI_SDR_LIMIT
    assert si_sdr(reference, np.array([0.0, 1.0]), 16000) == -SI_SDR_LIMIT


def test_mel_distances_are_zero_for_the_same_and_the_log_for_half() -> None:
    # Loud everywhere, so that no band falls on the floor.
    clean = np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    assert mel_distance(clean, clean, 16000) == multi_scale_mel_distance(clean, clean, 16000) == 0
    assert mel_distance(clean, clean / 2, 16000) == pytest.approx(np.log(2), rel=1e-3)
    found = multi_scale_mel_distance(clean, clean / 2, 16000)
    assert found == pytest.approx(7 * np.log10(2), rel=1e-3)


def test_multi_scale_mel_distance_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale with plain Fourier transforms: Hann windows of 64, hop 16, mirrored ends."""
    from torchaudio.functional import melscale_fbanks

    monkeypatch.setattr(speech, "MEL_SCALES", ((64, 10),))
    clean = np.random.default_rng(0).standard_normal(800)
    bands = melscale_fbanks(33, 0.0, 8000.0, 10, 16000, norm="slaney", mel_scale="slaney").numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(64) / 64)
    logs = []
    for wave in (clean, noisy(clean, 0.3)):
        padded = np.pad(wave, 32, mode="reflect")
        frames = np.stack([padded[start : start + 64] for start in range(0, 801, 16)])
        logs.append(np.log10(np.abs(np.fft.rfft(frames * window)) @ bands))
    expected = np.abs(logs[0] - logs[1]).mean()
    found = multi_scale_mel_distance(clean, noisy(clean, 0.3), 16000)
    assert found == pytest.approx(expected, rel=1e-4)


def tone(f0: float, seconds: float = 1.0) -> np.ndarray:
    times = np.arange(round(seconds * 16000)) / 16000
    return sum(0.1 * np.sin(2 * np.pi * f0 * k * times) / k for k in range(1, 12))


@pytest.mark.parametrize("f0", [80.0, 130.0, 233.0, 400.0])
def test_f0_of_tones(f0: float) -> None:
    found = f0_track(tone(f0), 16000)[5:-5]
    assert found == pytest.approx(f0, rel=0.01)


def test_f0_errors_are_counted_over_frames() -> None:
    """Tracks by hand: 20 frames, of which the coded wave loses 2 and doubles 3."""
    clean = np.linspace(100, 200, 20)
    clean[:4] = 0
    coded = clean.copy()
    coded[4:6] = 0
    coded[10:13] *= 2
    coded[19] *= 1.19
    tracks = iter([clean, coded] * 3)
    speech_like = tone(100, 0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech, "f0_track", lambda wave, rate: next(tracks))
        assert voicing_error(speech_like, speech_like, 16000) == 2 / 20
        assert f0_gross_error(speech_like, speech_like, 16000) == 3 / 14
        voiced = slice(6, 20)
        expected = np.corrcoef(np.log(clean[voiced]), np.log(coded[voiced]))[0, 1]
        assert f0_correlation(speech_like, speech_like, 16000) == pytest.approx(expected)


def test_f0_follows_a_contour_and_not_its_mirror() -> None:
    times = np.arange(16000) / 16000
    waves = []
    for sign in (1, -1):
        f0 = 150 * 2 ** (sign * 0.4 * np.sin(2 * np.pi * times))
        phase = 2 * np.pi * np.cumsum(f0) / 16000
        waves.append(sum(0.1 * np.sin(k * phase) / k for k in range(1, 12)))
    rising, falling = waves
    assert f0_correlation(rising, 0.3 * rising, 16000) == pytest.approx(1, abs=1e-3)
    assert f0_correlation(rising, falling, 16000) < -0.9
    assert voicing_error(rising, rising, 16000) == f0_gross_error(rising, rising, 16000) == 0


def test_f0_that_is_not_defined() -> None:
    hiss = np.random.default_rng(0).standard_normal(1000)
    with pytest.raises(ValueError, match="no voiced frame"):
        voicing_error(hiss, hiss, 16000)
    with pytest.raises(ValueError, match="no frame is voiced in both"):
        f0_gross_error(tone(130.0)[:1000], hiss, 16000)
    with pytest.raises(ValueError, match="10 frames"):
        f0_correlation(tone(130.0)[:1000], hiss, 16000)


@pytest.mark.parametrize("metric", PAIRED)
@pytest.mark.parametrize(
    ("degraded", "message"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.zeros(48000, np.float32), "silent"),
        (np.full(48000, np.nan, np.float32), "NaN"),
        (talk(2.0), "differ by 1.00 s"),
    ],
)
def test_invalid_waves_are_refused(metric: str, degraded: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PAIRED[metric](talk(), degraded, 16000)


@pytest.mark.parametrize("metric", sorted(PAIRED.keys() - {"si_sdr"}))
@pytest.mark.parametrize("size", [1, 500])
def test_too_short_waves_are_refused(metric: str, size: int) -> None:
    short = talk()[100 : 100 + size]
    with pytest.raises(ValueError, match=r"needs|voiced"):
        PAIRED[metric](short, short, 16000)


def test_every_measure_of_waves_has_a_direction_and_libraries() -> None:
    assert PAIRED.keys() | UNPAIRED.keys() <= HIGHER_IS_BETTER.keys()
    assert PAIRED.keys() == speech.LIBRARIES.keys()
    assert all(MEASURES[metric].libraries == speech.LIBRARIES[metric] for metric in PAIRED)
    assert HIGHER_IS_BETTER["asr_wer"] is False
    assert "seconds" not in HIGHER_IS_BETTER


@pytest.mark.parametrize("name", PAIRED)
def test_a_measure_is_the_same_at_every_call(name: str) -> None:
    clean, coded = talk(1.0), talk(1.0) + np.float32(0.01) * talk(1.0, seed=3)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    first = PAIRED[name](clean, coded, 16_000)
    PAIRED[name](coded, clean, 16_000)  # Results of the last waves are kept.
    assert PAIRED[name](clean, coded, 16_000) == first
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_a_copy_has_the_best_value_within_the_range() -> None:
    clean = talk(1.0)
    coded = noisy(clean, 0.02)
    for metric, function in PAIRED.items():
        same, worse = (function(clean, other, 16000) for other in (clean, coded))
        one = MEASURES[metric]
        assert one.low <= worse <= one.high, metric
        if one.higher_is_better:
            assert one.low <= worse <= same <= one.high + 1e-6, metric
        else:
            assert same == one.low <= worse, metric


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


def test_pesq_skips_a_silent_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "PESQ_PIECE_SECONDS", 1.0)
    wave = talk(3.0)
    wave[16000:32000] = 0
    assert pesq_wb(wave, wave, 16000) == pytest.approx(4.64, abs=0.01)


def test_pesq_of_a_long_recording_is_a_mean_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "PESQ_PIECE_SECONDS", 1.0)
    wave = talk(2.0)
    coded = np.concatenate([noisy(wave[:16000], 0.001), noisy(wave[16000:], 0.1)])
    halves = [
        pesq_wb(wave[half], coded[half], 16000) for half in (slice(16000), slice(16000, None))
    ]
    assert halves[0] > halves[1]
    assert pesq_wb(wave, coded, 16000) == pytest.approx(np.mean(halves))


def test_resample_changes_length_only() -> None:
    assert resample_for_scoring(talk(1.0), 16000, 24000).size == 24000
