"""eval/quality.py: DNSMOS equals the package's own, the speaking rate by hand."""

import sys
from types import ModuleType

import numpy as np
import pytest

from eval.metrics import MEASURES, UNPAIRED
from eval.quality import dnsmos, speaking_rate, speech_seconds


def noise(seconds: float) -> np.ndarray:
    samples = 0.05 * np.random.default_rng(0).standard_normal(round(seconds * 16000))
    return samples.astype(np.float32)


@pytest.mark.parametrize("seconds", [4.6, 10.5])
def test_dnsmos_is_the_packages_own(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module needs librosa for a fourth score, which is not reported here."""
    librosa = ModuleType("librosa")
    monkeypatch.setitem(sys.modules, "librosa", librosa)
    from speechmos import dnsmos as package

    session = package.ort.InferenceSession
    one_thread = package.ort.SessionOptions()
    one_thread.intra_op_num_threads = 1
    monkeypatch.setattr(
        package.ort, "InferenceSession", lambda path, *_, **__: session(path, one_thread)
    )
    monkeypatch.setattr(
        package.DNSMOS, "audio_melspec", lambda self, audio: np.zeros((900, 120), np.float32)
    )
    wave = noise(seconds)
    own = package.run(wave, 16000)
    found = dnsmos(wave, 16000)
    expected = (own["sig_mos"], own["bak_mos"], own["ovrl_mos"])
    assert found == pytest.approx(expected, abs=1e-4)
    for metric, value in zip(("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl"), found, strict=True):
        assert UNPAIRED[metric](wave, 16000) == value
        assert MEASURES[metric].low <= value <= MEASURES[metric].high


def test_samples_beyond_one_are_clipped() -> None:
    wave = 30 * noise(4.6)
    assert dnsmos(wave, 16000) == dnsmos(wave.clip(-1, 1), 16000)


@pytest.mark.parametrize("metric", UNPAIRED)
@pytest.mark.parametrize(
    ("wave", "message"),
    [(np.zeros(0), "empty"), (np.zeros(9), "silent"), (np.full(9, np.inf), "infinite")],
)
def test_waves_without_a_score(metric: str, wave: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNPAIRED[metric](wave, 16000)


def test_speaking_rate_leaves_out_the_silence_at_both_ends() -> None:
    """1 s of near silence, 1 s of noise, 0.5 s of pause, 0.5 s of noise, 0.7 s of near silence."""
    wave = noise(3.7)
    wave[:16000] *= 1e-4
    wave[32000:40000] = 0
    wave[48000:] *= 1e-4
    assert speech_seconds(wave, 16000) == pytest.approx(2.0)
    assert speaking_rate(6, wave, 16000) == pytest.approx(3.0)
    assert speech_seconds(wave[:47900], 16000) == pytest.approx(2.0 - 100 / 16000)
    assert speech_seconds(noise(0.01), 16000) == pytest.approx(0.01)
