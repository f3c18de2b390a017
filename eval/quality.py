"""Metrics of a wave without a reference: DNSMOS P.835, and the speaking rate.

All raise ValueError for waves that are silent, empty or not finite. eval/metrics.py lists them.
"""

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from eval.speech import check_scorable, resample_for_scoring

LIBRARIES = {
    **dict.fromkeys(("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl"), ("speechmos", "onnxruntime")),
    "speaking_rate": ("numpy",),
}

DNSMOS_SAMPLE_RATE = 16000
DNSMOS_SECONDS = 9.01
"""Input of the network; a shorter wave is repeated, a longer one scored every second."""

ACTIVITY_FRAME_SECONDS = 0.02
ACTIVITY_RANGE_DB = 40.0
"""Frames at most this much below the loudest frame hold speech, as in STOI."""


class Dnsmos(NamedTuple):
    """Mean opinion scores that DNSMOS P.835 predicts, 1 to 5."""

    sig: float
    """Quality of the speech signal."""
    bak: float
    """Quality of the background: 5 is no noticeable noise."""
    ovrl: float
    """Overall quality."""


def dnsmos_sig(wave: Float[np.ndarray, " S"], sample_rate: int) -> float:
    """Returns DNSMOS SIG, the predicted quality of the speech signal."""
    return dnsmos(wave, sample_rate).sig


def dnsmos_bak(wave: Float[np.ndarray, " S"], sample_rate: int) -> float:
    """Returns DNSMOS BAK, the predicted quality of the background."""
    return dnsmos(wave, sample_rate).bak


def dnsmos_ovrl(wave: Float[np.ndarray, " S"], sample_rate: int) -> float:
    """Returns DNSMOS OVRL, the predicted overall quality."""
    return dnsmos(wave, sample_rate).ovrl


def dnsmos(wave: Float[np.ndarray, " S"], sample_rate: int, num_threads: int = 1) -> Dnsmos:
    """Returns the three scores of DNSMOS P.835 (Reddy et al. 2022, arXiv 2110.01763) at 16 kHz.

    The networks are those of the package speechmos, which itself needs librosa. Samples outside of
    [-1, 1] are clipped.

    Args:
        num_threads: of onnxruntime, within an operator.
    """
    check_scorable(wave, "scored")
    wave = resample_for_scoring(wave, sample_rate, DNSMOS_SAMPLE_RATE)
    return _dnsmos_of_bytes(wave.astype(np.float32).clip(-1, 1).tobytes(), num_threads)


@lru_cache(maxsize=1)
def _dnsmos_of_bytes(wave_bytes: bytes, num_threads: int) -> Dnsmos:
    """Keeps the last result: the three scores are asked for in turn."""
    wave = np.frombuffer(wave_bytes, np.float32)
    length = int(DNSMOS_SECONDS * DNSMOS_SAMPLE_RATE)
    while wave.size < length:
        wave = np.tile(wave, 2)
    session = _dnsmos_session(num_threads)
    num_windows = int(wave.size // DNSMOS_SAMPLE_RATE - DNSMOS_SECONDS) + 1
    found = []
    for start in range(0, num_windows * DNSMOS_SAMPLE_RATE, DNSMOS_SAMPLE_RATE):
        window = wave[start : start + length]
        found.append(session.run(None, {"input_1": window[np.newaxis]})[0][0])
    sig, bak, ovrl = np.stack(found).astype(np.float64).T  # (3, windows)
    # The package's polynomials from the networks' outputs to the scale of the ratings.
    return Dnsmos(
        float(np.polyval([-0.08397278, 1.22083953, 0.0052439], sig).mean()),
        float(np.polyval([-0.13166888, 1.60915514, -0.39604546], bak).mean()),
        float(np.polyval([-0.06766283, 1.11546468, 0.04602535], ovrl).mean()),
    )


@lru_cache(maxsize=1)
def _dnsmos_session(num_threads: int) -> Any:
    import onnxruntime

    found = importlib.util.find_spec("speechmos")  # Importing it would need librosa.
    if found is None or found.origin is None:
        raise ModuleNotFoundError("DNSMOS needs speechmos: pip install 'parlance[eval]'")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    model = Path(found.origin).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def speech_seconds(wave: Float[np.ndarray, " S"], sample_rate: int) -> float:
    """Returns the length in seconds without the silence at both ends; pauses count as speech."""
    check_scorable(wave, "scored")
    length = min(wave.size, round(ACTIVITY_FRAME_SECONDS * sample_rate))
    num_frames = -(-wave.size // length)
    frames = np.pad(wave.astype(np.float64), (0, num_frames * length - wave.size))
    energies = (frames.reshape(num_frames, length) ** 2).sum(axis=1)
    active = np.flatnonzero(energies >= energies.max() * 10 ** (-ACTIVITY_RANGE_DB / 10))
    end = min(int(active[-1] + 1) * length, wave.size)
    return (end - int(active[0]) * length) / sample_rate


def speaking_rate(num_units: int, wave: Float[np.ndarray, " S"], sample_rate: int) -> float:
    """Returns words (or characters, for scripts without spaces) a second of speech.

    Args:
        num_units: number of words or characters of the text.
    """
    return num_units / speech_seconds(wave, sample_rate)
