"""Metrics of a degraded wave against its reference: STOI, wide-band PESQ, mel distance.

All raise ValueError for waves that are silent, empty, not finite, too short or of different length.
"""

import warnings

import numpy as np
from jaxtyping import Float

LIBRARIES = {"stoi": ("pystoi",), "pesq": ("pesq",), "mel_distance": ("torch", "torchaudio")}

MAX_TRIM_SECONDS = 0.16
"""Maximum difference in length, one frame at 6.25 Hz; the longer wave is truncated."""

PESQ_SAMPLE_RATE = 16000
PESQ_PIECE_SECONDS = 20.0  # The reference code has room for 50 utterances.

MEL_SAMPLE_RATE = 16000


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
    from pystoi import stoi as measure

    reference, degraded = check_and_trim(reference, degraded, sample_rate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = float(measure(reference, degraded, sample_rate))
    if any("Not enough STFT frames" in str(warning.message) for warning in caught):
        raise ValueError("STOI needs about 0.4 s of speech after silence is removed")
    return value


def pesq_wb(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns the wide-band PESQ, 1.04 to 4.64 (ITU-T P.862.2; library pesq).

    Of more than 20 s it is the mean of pieces.
    """
    import pesq

    reference, degraded = check_and_trim(reference, degraded, sample_rate)
    reference = resample_for_scoring(reference, sample_rate, PESQ_SAMPLE_RATE)
    degraded = resample_for_scoring(degraded, sample_rate, PESQ_SAMPLE_RATE)
    num_pieces = int(np.ceil(reference.size / (PESQ_PIECE_SECONDS * PESQ_SAMPLE_RATE)))
    values: list[float] = []
    for clean, coded in zip(
        np.array_split(reference, num_pieces), np.array_split(degraded, num_pieces), strict=True
    ):
        if not clean.any():
            continue
        try:
            values.append(float(pesq.pesq(PESQ_SAMPLE_RATE, clean, coded, "wb")))
        except pesq.NoUtterancesError:
            continue  # A piece of silence.
        except pesq.BufferTooShortError as error:
            raise ValueError("PESQ needs at least 0.25 s") from error
    if not values or not np.isfinite(values).all():
        raise ValueError("PESQ found no utterance: the wave is too quiet or holds no speech")
    return float(np.mean(values))


def mel_distance(
    reference: Float[np.ndarray, " S"], degraded: Float[np.ndarray, " R"], sample_rate: int
) -> float:
    """Returns the mean absolute difference of natural log mel magnitudes, the
    measure of HiFi-GAN's mel loss (arXiv 2010.05646).

    16 kHz, 80 Slaney bands up to 8 kHz, Hann window 1024, hop 256, floor 1e-5.
    """
    reference, degraded = check_and_trim(reference, degraded, sample_rate)
    return float(np.abs(_log_mel(reference, sample_rate) - _log_mel(degraded, sample_rate)).mean())


def _log_mel(wave: Float[np.ndarray, " S"], sample_rate: int) -> Float[np.ndarray, "D T"]:
    import torch
    from torchaudio.functional import melscale_fbanks

    wave = resample_for_scoring(wave, sample_rate, MEL_SAMPLE_RATE)
    if wave.size <= 512:
        raise ValueError(f"the mel distance needs more than 512 samples at 16 kHz, got {wave.size}")
    spectrum = torch.stft(
        torch.from_numpy(np.ascontiguousarray(wave, np.float32)),
        n_fft=1024,
        hop_length=256,
        window=torch.hann_window(1024),
        return_complex=True,
    ).abs()  # (513, T)
    bands = melscale_fbanks(
        513, 0.0, 8000.0, 80, MEL_SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    return (bands.T @ spectrum).clamp(min=1e-5).log().numpy()
