"""Metrics of a degraded wave against its reference: STOI, PESQ, ViSQOL, SI-SDR, mel distances, F0.

All raise ValueError for waves that are silent, empty, not finite, too short or of different length.
eval/metrics.py lists them with direction and range.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

LIBRARIES = {
    "stoi": ("pystoi",),
    "estoi": ("pystoi",),
    "pesq": ("pesq",),
    "pesq_nb": ("pesq",),
    "si_sdr": ("numpy",),
    "mel_distance": ("torch", "torchaudio"),
    "multi_scale_mel_distance": ("torch", "torchaudio"),
    "visqol": ("visqol-python", "ai-edge-litert"),
    "visqol_polynomial": ("visqol-python",),
    "f0_correlation": ("pyworld",),
    "f0_gross_error": ("pyworld",),
    "voicing_error": ("pyworld",),
}

MAX_TRIM_SECONDS = 0.16
"""Maximum difference in length, one frame at 6.25 Hz; the longer wave is truncated."""

PESQ_WB_SAMPLE_RATE = 16000
PESQ_NB_SAMPLE_RATE = 8000
PESQ_PIECE_SECONDS = 20.0  # The reference code has room for 50 utterances.

MEL_SAMPLE_RATE = 16000
MEL_SCALES = ((2048, 320), (1024, 160), (512, 80), (256, 40), (128, 20), (64, 10), (32, 5))
"""Window lengths in samples and numbers of mel bands of the multi-scale mel distance."""
MEL_FLOOR = 1e-5

VISQOL_SAMPLE_RATE = 16000

SI_SDR_LIMIT = 100.0
"""In dB; a copy has no residual, and its ratio is infinite."""

F0_SAMPLE_RATE = 16000
F0_HOP_SECONDS = 0.01
F0_MIN = 60.0
F0_MAX = 500.0
F0_GROSS_RATIO = 0.2
"""Relative deviation from which an F0 is a gross error."""


def resample_for_scoring(
    wave: Float[np.ndarray, " S"], source_rate: int, target_rate: int
) -> Float[np.ndarray, " R"]:
    """Returns the wave at another sample rate (soxr)."""
    if source_rate == target_rate:
        return wave
    import soxr

    return soxr.resample(wave, source_rate, target_rate).astype(wave.dtype)


def check_scorable(wave: np.ndarray, name: str) -> None:
    """Raises ValueError for a wave that is not mono, empty, not finite or silent."""
    if wave.ndim != 1:
        raise ValueError(f"the {name} wave must have one dimension, got shape {wave.shape}")
    if not wave.size:
        raise ValueError(f"the {name} wave is empty")
    if not np.isfinite(wave).all():
        raise ValueError(f"the {name} wave holds NaN or infinite samples")
    if not wave.any():
        raise ValueError(f"the {name} wave is silent")


def check_and_trim(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Returns both waves, checked, at the shorter one's length."""
    check_scorable(reference, "reference")
    check_scorable(degraded, "degraded")
    return trim(reference, degraded, sample_rate)


def trim(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Returns both waves at the shorter one's length.

    Raises:
        ValueError: they differ by more than MAX_TRIM_SECONDS.
    """
    excess = abs(reference.size - degraded.size) / sample_rate
    if excess > MAX_TRIM_SECONDS:
        raise ValueError(
            f"the waves differ by {excess:.2f} s in length ({reference.size} and {degraded.size} "
            f"samples); at most {MAX_TRIM_SECONDS} s are allowed"
        )
    size = min(reference.size, degraded.size)
    return reference[:size], degraded[:size]


def stoi(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns the short-time objective intelligibility, at most 1 (Taal et al. 2011; pystoi)."""
    return _stoi(reference, degraded, sample_rate, extended=False)


def estoi(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns the extended STOI, at most 1 (Jensen and Taal 2016; pystoi)."""
    return _stoi(reference, degraded, sample_rate, extended=True)


@contextmanager
def _numpy_seed() -> Iterator[None]:
    """pystoi adds noise of numpy's global generator to ESTOI; it must be the same in every run."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _stoi(reference: np.ndarray, degraded: np.ndarray, sample_rate: int, extended: bool) -> float:
    from pystoi import stoi as measure

    reference, degraded = check_and_trim(reference, degraded, sample_rate)
    too_short = "STOI needs about 0.4 s of speech after silence is removed"
    if reference.size < 0.1 * sample_rate:
        raise ValueError(too_short)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _numpy_seed():
            value = float(measure(reference, degraded, sample_rate, extended=extended))
    if any("Not enough STFT frames" in str(warning.message) for warning in caught):
        raise ValueError(too_short)
    return value


def pesq_wb(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns the wide-band PESQ at 16 kHz, 1.04 to 4.64 (ITU-T P.862.2; library pesq).

    Of more than 20 s it is the mean of pieces.
    """
    return _pesq(reference, degraded, sample_rate, PESQ_WB_SAMPLE_RATE, "wb")


def pesq_nb(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns the narrow-band PESQ at 8 kHz, 1.02 to 4.55 (ITU-T P.862 and P.862.1; library pesq).

    Of more than 20 s it is the mean of pieces.
    """
    return _pesq(reference, degraded, sample_rate, PESQ_NB_SAMPLE_RATE, "nb")


def _pesq(
    reference: np.ndarray, degraded: np.ndarray, sample_rate: int, pesq_rate: int, mode: str
) -> float:
    import pesq

    reference, degraded = check_and_trim(reference, degraded, sample_rate)
    reference = resample_for_scoring(reference, sample_rate, pesq_rate)
    degraded = resample_for_scoring(degraded, sample_rate, pesq_rate)
    num_pieces = int(np.ceil(reference.size / (PESQ_PIECE_SECONDS * pesq_rate)))
    values: list[float] = []
    for clean, coded in zip(
        np.array_split(reference, num_pieces), np.array_split(degraded, num_pieces), strict=True
    ):
        if not clean.any():
            continue
        try:
            values.append(float(pesq.pesq(pesq_rate, clean, coded, mode)))
        except pesq.NoUtterancesError:
            continue  # A piece of silence.
        except pesq.BufferTooShortError as error:
            raise ValueError("PESQ needs at least 0.25 s") from error
    if not values or not np.isfinite(values).all():
        raise ValueError("PESQ found no utterance: the wave is too quiet or holds no speech")
    return float(np.mean(values))


def si_sdr(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns the scale-invariant signal-to-distortion ratio in dB, within +-SI_SDR_LIMIT
    (Le Roux et al. 2019, arXiv 1811.02508, eq. 3 and 5). The waves' means are not removed."""
    reference, degraded = check_and_trim(reference, degraded, sample_rate)
    clean, coded = reference.astype(np.float64), degraded.astype(np.float64)
    target = (coded @ clean) / (clean @ clean) * clean
    residual = coded - target
    with np.errstate(divide="ignore"):
        ratio = 10 * (np.log10(target @ target) - np.log10(residual @ residual))
    return float(np.clip(ratio, -SI_SDR_LIMIT, SI_SDR_LIMIT))


class VisqolScores(NamedTuple):
    """MOS-LQO of the two mappers of ViSQOL's speech mode, 1 to 5."""

    lattice: float
    polynomial: float


def visqol(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns ViSQOL's MOS-LQO in speech mode at 16 kHz, 1 to 5 (Chinen et al. 2020, arXiv
    2004.09584; visqol-python), by the lattice mapper, the default since version 3.3.

    A copy scores about 4.4, not 5: the value depends on the reference.
    """
    return visqol_scores(reference, degraded, sample_rate).lattice


def visqol_polynomial(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns ViSQOL's MOS-LQO in speech mode, 1 to 5, by the polynomial mapper of older
    versions, under which a copy scores 5."""
    return visqol_scores(reference, degraded, sample_rate).polynomial


def visqol_scores(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> VisqolScores:
    """Returns ViSQOL's MOS-LQO by both mappers, from one comparison of the spectrograms."""
    reference, degraded = check_and_trim(reference, degraded, sample_rate)
    waves = (
        resample_for_scoring(wave, sample_rate, VISQOL_SAMPLE_RATE).astype(np.float64)
        for wave in (reference, degraded)
    )
    return _visqol_of_bytes(*(wave.tobytes() for wave in waves))


@lru_cache(maxsize=1)
def _visqol_of_bytes(reference: bytes, degraded: bytes) -> VisqolScores:
    """Keeps the last result: both mappers are asked for in turn."""
    lattice, polynomial = _visqol_mappers()
    waves = np.frombuffer(reference), np.frombuffer(degraded)
    try:
        found = lattice.measure_from_arrays(*waves, VISQOL_SAMPLE_RATE)
    except (ValueError, IndexError) as error:
        raise ValueError("ViSQOL needs about 0.5 s with speech in it") from error
    if not np.isfinite([*found.fvnsim, found.moslqo]).all():
        raise ValueError("ViSQOL found no speech in the reference")
    return VisqolScores(float(found.moslqo), float(polynomial.predict_quality(found.fvnsim)))


@lru_cache(maxsize=1)
def _visqol_mappers() -> tuple[Any, Any]:
    from visqol import VisqolApi
    from visqol.quality_mapper import SpeechSimilarityToQualityMapper

    if "numba" in sys.modules:  # Otherwise it uses all cores.
        sys.modules["numba"].set_num_threads(1)
    api = VisqolApi()
    # Without `use_lattice_model` a missing library would silently change the mapper.
    api.create(mode="speech", use_lattice_model=True)
    return api, SpeechSimilarityToQualityMapper()


def mel_distance(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns the mean absolute difference of natural log mel magnitudes, the
    measure of HiFi-GAN's mel loss (arXiv 2010.05646).

    16 kHz, 80 Slaney bands up to 8 kHz, Hann window 1024, hop 256, floor 1e-5.
    """
    waves = check_and_trim(reference, degraded, sample_rate)
    logs = (
        _log_mel(resample_for_scoring(wave, sample_rate, MEL_SAMPLE_RATE), 1024, 80, 256)
        for wave in waves
    )
    return float(np.abs(np.subtract(*logs)).mean())


def multi_scale_mel_distance(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns the sum over MEL_SCALES of mean absolute differences of log10 mel magnitudes, the
    measure of the Descript codec's mel loss (arXiv 2306.06546, section 3.4).

    16 kHz, windows of 32 to 2048 samples (Hann) with hops of a quarter, 5 to 320 Slaney bands up
    to 8 kHz, floor 1e-5. The paper's own figures are at 44.1 kHz.
    """
    waves = check_and_trim(reference, degraded, sample_rate)
    clean, coded = (resample_for_scoring(wave, sample_rate, MEL_SAMPLE_RATE) for wave in waves)
    total = 0.0
    for window_length, num_bands in MEL_SCALES:
        logs = (_log_mel(wave, window_length, num_bands, window_length // 4)
                for wave in (clean, coded))  # fmt: skip
        total += float(np.abs(np.subtract(*logs)).mean()) / np.log(10)
    return float(total)


def f0_correlation(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns Pearson's correlation of log F0 over the frames that are voiced in both waves, gross
    errors included."""
    clean, coded = _voiced_in_both(reference, degraded, sample_rate)
    if clean.size < 10 or np.ptp(clean) == 0 or np.ptp(coded) == 0:
        raise ValueError(
            f"the correlation of F0 needs 10 frames that are voiced in both waves, with an F0 that "
            f"varies, got {clean.size}"
        )
    return float(np.corrcoef(np.log(clean), np.log(coded))[0, 1])


def f0_gross_error(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns the share of the frames voiced in both waves whose F0 deviates by more than 20 % of
    the reference's (gross pitch error; Rabiner et al. 1976)."""
    clean, coded = _voiced_in_both(reference, degraded, sample_rate)
    if not clean.size:
        raise ValueError("no frame is voiced in both waves")
    return float((np.abs(coded - clean) > F0_GROSS_RATIO * clean).mean())


def voicing_error(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns the share of all frames that are voiced in one wave only (voicing decision error;
    Nakatani et al. 2008)."""
    clean, coded = _f0_tracks(reference, degraded, sample_rate)
    if not clean.any():
        raise ValueError("the reference wave has no voiced frame")
    return float(((clean > 0) != (coded > 0)).mean())


def f0_track(wave: Float[np.ndarray, " S"], sample_rate: int) -> Float[np.ndarray, " T"]:
    """Returns F0 in Hz every 10 ms, 0 where unvoiced: WORLD's DIO with StoneMask (Morise et al.
    2009; pyworld), 60 to 500 Hz, at 16 kHz."""
    wave = resample_for_scoring(wave, sample_rate, F0_SAMPLE_RATE).astype(np.float64)
    return _f0_of_bytes(wave.tobytes())


@lru_cache(maxsize=4)
def _f0_of_bytes(wave_bytes: bytes) -> Float[np.ndarray, " T"]:
    """Keeps the last tracks: three metrics read the same two."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        import pyworld

    wave = np.frombuffer(wave_bytes)
    world: Any = pyworld  # A compiled module.
    coarse, times = world.dio(
        wave, F0_SAMPLE_RATE, f0_floor=F0_MIN, f0_ceil=F0_MAX, frame_period=1000 * F0_HOP_SECONDS
    )
    return world.stonemask(wave, coarse, times, F0_SAMPLE_RATE)


def _f0_tracks(
    reference: np.ndarray, degraded: np.ndarray, sample_rate: int
) -> tuple[np.ndarray, np.ndarray]:
    clean, coded = check_and_trim(reference, degraded, sample_rate)
    return f0_track(clean, sample_rate), f0_track(coded, sample_rate)


def _voiced_in_both(
    reference: np.ndarray, degraded: np.ndarray, sample_rate: int
) -> tuple[np.ndarray, np.ndarray]:
    clean, coded = _f0_tracks(reference, degraded, sample_rate)
    voiced = (clean > 0) & (coded > 0)
    return clean[voiced], coded[voiced]


def _log_mel(
    wave: Float[np.ndarray, " S"], window_length: int, num_bands: int, hop_length: int
) -> Float[np.ndarray, "D T"]:
    """Returns natural log mel magnitudes of a wave of MEL_SAMPLE_RATE."""
    import torch

    if wave.size <= window_length // 2:
        raise ValueError(
            f"the mel distance needs more than {window_length // 2} samples at 16 kHz, "
            f"got {wave.size}"
        )
    spectrum = torch.stft(
        torch.from_numpy(np.ascontiguousarray(wave, np.float32)),
        n_fft=window_length,
        hop_length=hop_length,
        window=torch.hann_window(window_length),
        return_complex=True,
    ).abs()  # (window_length // 2 + 1, T)
    bands = torch.from_numpy(_mel_bands(window_length, num_bands))
    return (bands.T @ spectrum).clamp(min=MEL_FLOOR).log().numpy()


@lru_cache(maxsize=len(MEL_SCALES) + 1)
def _mel_bands(window_length: int, num_bands: int) -> Float[np.ndarray, "F D"]:
    from torchaudio.functional import melscale_fbanks

    return melscale_fbanks(
        window_length // 2 + 1, 0.0, 8000.0, num_bands, MEL_SAMPLE_RATE,
        norm="slaney", mel_scale="slaney",
    ).numpy()  # fmt: skip
