"""Recordings in and out: every format and rate that should work, every bad file by name."""

import logging
import warnings

import numpy as np
import pytest
import soundfile
import torch

from codec import read_audio, write_audio
from codec.audio import (
    magnitude_spectrogram,
    mel_filterbank,
    resample_batch,
    resample_wave,
    stream_audio,
)


def tone(seconds: float, rate: int, frequency: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_every_sample_rate_is_resampled(tmp_path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1.0, rate), rate)
    wave = read_audio(tmp_path / "a.wav", 16_000)
    assert wave.dtype == np.float32
    assert abs(len(wave) - 16_000) <= 1
    middle = slice(2000, 14_000)
    assert np.abs(wave[middle] - tone(1.0, 16_000)[middle]).max() < 1e-3


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "opus", "aiff"])
def test_every_format_reads(tmp_path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    options = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    rate = 48_000
    soundfile.write(file, tone(1.0, rate), rate, **options)
    wave = read_audio(file, 16_000)
    assert abs(len(wave) - 16_000) < 2000
    assert 0.4 < np.abs(wave[4000:12_000]).max() < 0.6


def test_stereo_is_averaged(tmp_path) -> None:
    left, right = tone(0.5, 16_000), np.zeros(8000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    wave = read_audio(tmp_path / "a.wav", 16_000)
    np.testing.assert_allclose(wave, left / 2, atol=1e-6)


def test_telephone_band_is_warned_about(tmp_path, caplog) -> None:
    soundfile.write(tmp_path / "a.wav", tone(0.5, 8000), 8000)
    with caplog.at_level(logging.WARNING):
        read_audio(tmp_path / "a.wav", 16_000)
    assert "8000 Hz" in caplog.text
    assert "a.wav" in caplog.text


def test_names_with_spaces_and_other_scripts(tmp_path) -> None:
    file = tmp_path / "eine Aufnahme" / "\u0440\u0435\u0447\u044c \u8bed.wav"
    write_audio(file, tone(0.2, 16_000), 16_000)
    assert len(read_audio(file, 16_000)) == 3200


def test_a_stretch_is_the_same_as_slicing(tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(2.0, 16_000), 16_000, subtype="FLOAT")
    whole = read_audio(tmp_path / "a.wav", 16_000)
    part = read_audio(tmp_path / "a.wav", 16_000, start=0.5, duration=0.25)
    np.testing.assert_array_equal(part, whole[8000:12_000])


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_concatenated_blocks_equal_the_recording(tmp_path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(3.3, rate), rate)
    blocks = list(stream_audio(tmp_path / "a.wav", 16_000, block_seconds=0.5))
    assert len(blocks) >= 6
    assert max(len(block) for block in blocks) < 16_000
    np.testing.assert_allclose(
        np.concatenate(blocks), read_audio(tmp_path / "a.wav", 16_000), atol=1e-6
    )


def bad_files(folder) -> dict[str, str]:
    """File name -> a word of the error that must name it."""
    rate, noise = 16_000, 0.1 * np.random.default_rng(0).standard_normal(16_000)
    soundfile.write(folder / "silent.wav", np.zeros(rate), rate)
    soundfile.write(folder / "no-samples.wav", np.zeros(0), rate)
    broken = noise.copy()
    broken[5000] = np.nan
    soundfile.write(folder / "nan.wav", broken, rate, subtype="FLOAT")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is not sound")
    (folder / "folder.wav").mkdir()
    return {
        "silent.wav": "silent", "no-samples.wav": "no samples", "nan.wav": "NaN",
        "empty.wav": "empty", "text.wav": "cannot be read", "folder.wav": "folder",
        "missing.wav": "no such",
    }  # fmt: skip


def test_bad_recordings_are_named_with_what_to_do(tmp_path) -> None:
    for name, word in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=word) as caught:
            read_audio(tmp_path / name, 16_000)
        message = str(caught.value)
        assert name in message
        assert "\n" not in message
        with pytest.raises(ValueError, match=word):
            list(stream_audio(tmp_path / name, 16_000))


@pytest.mark.parametrize("suffix", ["wav", "ogg", "flac"])
def test_a_cut_file_is_noticed(tmp_path, suffix: str) -> None:
    """libsndfile alone reads what is left of a WAV or Ogg file without a word."""
    file = tmp_path / f"a.{suffix}"
    soundfile.write(file, tone(4.0, 16_000) * np.linspace(0.1, 1, 64_000), 16_000)
    whole = file.read_bytes()
    for share in (0.3, 0.5, 0.9):
        file.write_bytes(whole[: round(len(whole) * share)])
        with pytest.raises(ValueError, match="truncated"):
            read_audio(file, 16_000)


def test_a_failed_write_leaves_the_earlier_file(tmp_path) -> None:
    write_audio(tmp_path / "a.wav", tone(0.2, 16_000), 16_000)
    before = (tmp_path / "a.wav").read_bytes()

    def blocks():
        yield tone(0.1, 16_000)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_audio(tmp_path / "a.wav", blocks(), 16_000)
    assert (tmp_path / "a.wav").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.wav"]


def test_resampling_keeps_the_tone_and_removes_what_does_not_fit() -> None:
    wave = tone(1.0, 48_000, 440.0) + tone(1.0, 48_000, 12_000.0)
    out = resample_wave(wave.astype(np.float32), 48_000, 16_000)
    assert np.abs(out[1000:-1000] - tone(1.0, 16_000)[1000:-1000]).max() < 2e-3


def test_mel_filters_have_unit_area_and_rise_in_frequency() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank = mel_filterbank(sample_rate=16_000, num_mels=80, window=1024)
    assert bank.shape == (513, 80)
    peaks = bank.argmax(0)
    assert (peaks.diff() >= 0).all()
    wide = bank[:, 40:].sum(0) * 16_000 / 1024
    torch.testing.assert_close(wide, torch.ones(40), atol=0.06, rtol=0)


def test_magnitude_of_silence_has_a_gradient() -> None:
    wave = torch.zeros(1, 2000, requires_grad=True)
    magnitude_spectrogram(wave, window=256, hop=64).sum().backward()
    assert torch.isfinite(wave.grad).all()


@pytest.mark.parametrize(("source", "target"), [(24_000, 16_000), (16_000, 24_000)])
def test_a_batch_is_resampled_with_its_gradient(source: int, target: int) -> None:
    waves = [tone(0.5, source, frequency)[:-3] for frequency in (300.0, 900.0)]
    batch = torch.from_numpy(np.stack(waves)).float().reshape(2, 1, -1).requires_grad_()
    found = resample_batch(batch, source, target)
    assert found.shape == (2, 1, -(-batch.shape[-1] * target // source))
    middle = slice(1000, 6000)
    for row, frequency in zip(found, (300.0, 900.0), strict=True):
        expected = torch.from_numpy(tone(0.5, target, frequency))[middle].float()
        assert (row[0, middle] - expected).abs().max() < 2e-3
    found.square().sum().backward()
    assert batch.grad is not None
    assert batch.grad.abs().amax(dim=-1).min() > 0
    assert resample_batch(batch, source, source) is batch
