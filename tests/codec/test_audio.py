"""Recordings in and out: every format and rate that should work, every bad file by name."""

import logging
import os
import resource
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import voiced

from codec import read_audio, write_audio
from codec.audio import (
    audio_info,
    audio_tags,
    cancelled_channel,
    check_recording,
    magnitude_spectrogram,
    mel_filterbank,
    recordings_in,
    resample_batch,
    resample_wave,
    stream_audio,
)
from codec.io import WriteError

RATE = 16_000


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


def write(path: Path, wave: np.ndarray, **options: str) -> bytes:
    soundfile.write(path, wave, RATE, **options)
    return path.read_bytes()


def replaced(data: bytes, *patches: tuple[int, bytes]) -> bytes:
    changed = bytearray(data)
    for position, new in patches:
        changed[position : position + len(new)] = new
    return bytes(changed)


def piped(folder: Path, wave: np.ndarray) -> dict[str, bytes]:
    """Files as programs write them that cannot seek: sizes are left open."""
    wav = write(folder / "whole.wav", wave)
    at = wav.index(b"data") + 4
    big = b"\xff" * 4
    w64 = write(folder / "whole.w64", wave)
    at64 = w64.index(b"data") + 16
    flac = write(folder / "whole.flac", wave)
    # STREAMINFO: the number of samples, and their checksum.
    flac = replaced(flac, (21, bytes([flac[21] & 0xF0])), (22, bytes(20)))
    return {
        "ffmpeg.wav": replaced(wav, (4, big), (at, big)),
        "espeak.wav": replaced(wav, (4, b"\x24\xf0\xff\x7f"), (at, b"\x00\xf0\xff\x7f")),
        "sox.wav": replaced(wav, (4, b"\x24\x00\x00\x80"), (at, b"\x00\x00\x00\x80")),
        "zero.wav": replaced(wav, (4, bytes(4)), (at, bytes(4))),
        "zero-data.wav": replaced(wav, (at, bytes(4))),
        "pipe.w64": replaced(w64, (16, big * 2), (at64, big + b"\xff\xff\xff\x7f")),
        "pipe.flac": flac,
    }


def test_sizes_that_a_pipe_leaves_open_are_no_truncation(tmp_path) -> None:
    wave = voiced(2.0)
    for name, data in piped(tmp_path, wave).items():
        (tmp_path / name).write_bytes(data)
        expected = read_audio(tmp_path / f"whole{Path(name).suffix}", RATE)
        np.testing.assert_array_equal(read_audio(tmp_path / name, RATE), expected, err_msg=name)
        part = read_audio(tmp_path / name, RATE, start=0.5, duration=0.25)
        np.testing.assert_array_equal(part, expected[8000:12_000], err_msg=name)
        blocks = list(stream_audio(tmp_path / name, RATE, 0.3))
        np.testing.assert_array_equal(np.concatenate(blocks), expected, err_msg=name)
        assert audio_info(tmp_path / name) == (RATE, 1, len(wave))


def test_a_wav_without_samples_has_none(tmp_path) -> None:
    data = write(tmp_path / "a.wav", np.zeros(0))
    tags = b"LIST" + (4).to_bytes(4, "little") + b"INFO"
    (tmp_path / "a.wav").write_bytes(replaced(data + tags, (4, bytes([len(data) + 4]))))
    with pytest.raises(ValueError, match="no samples"):
        read_audio(tmp_path / "a.wav", RATE)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "zero-data.wav"])
def test_a_pipe_is_read(tmp_path, name: str) -> None:
    wave = voiced(1.0)
    whole = tmp_path / f"whole{Path(name).suffix}"
    data = piped(tmp_path, wave).get(name) or whole.read_bytes()
    expected = read_audio(whole, RATE)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    np.testing.assert_array_equal(read_audio(tmp_path / "pipe", RATE), expected)
    writer.join()


def test_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match="/dev/null: is a device, not a recording"):
        read_audio("/dev/null", RATE)


@pytest.mark.parametrize("suffix", ["wav", "mp3", "opus", "ogg"])
def test_joined_files_are_read_to_the_end(tmp_path, suffix: str, caplog) -> None:
    options = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    data = [
        write(tmp_path / f"{name}.{suffix}", voiced(1.5, seed=seed), **options)
        for seed, name in enumerate("ab")
    ]
    (tmp_path / f"joined.{suffix}").write_bytes(data[0] + data[1])
    single = [read_audio(tmp_path / f"{name}.{suffix}", RATE) for name in "ab"]
    assert not caplog.text
    joined = read_audio(tmp_path / f"joined.{suffix}", RATE)
    np.testing.assert_allclose(joined, np.concatenate(single), atol=1e-4)
    assert "2 files, which are joined" in caplog.text
    late = read_audio(tmp_path / f"joined.{suffix}", RATE, start=2.0, duration=0.5)
    at = 32_000 - len(single[0])
    assert np.abs(late - single[1][at : at + 8000]).max() < 0.05


def test_joined_files_of_two_rates_are_refused(tmp_path) -> None:
    data = write(tmp_path / "a.wav", voiced(1.0))
    soundfile.write(tmp_path / "b.wav", voiced(1.0), 8000)
    (tmp_path / "c.wav").write_bytes(data + (tmp_path / "b.wav").read_bytes())
    with pytest.raises(ValueError, match=r"different sample rates.*: ffmpeg -i "):
        read_audio(tmp_path / "c.wav", RATE)


def encode_with_ffmpeg(path: Path, kind: str, encoder: str, seconds: float = 2.0) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(encoder, rate=48_000, layout="mono")
        wave = (32767 * voiced(seconds, 48_000)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate = 48_000
        resampler = av.AudioResampler(stream.codec_context.format, "mono", 48_000, 960)
        for part in [*resampler.resample(frame), None]:
            container.mux(stream.encode(part))


@pytest.mark.parametrize(
    ("name", "kind", "encoder"),
    [("a.m4a", "mp4", "aac"), ("a.webm", "webm", "libopus"), ("a.mp3", "mp4", "aac")],
)
def test_containers_are_read_through_pyav(tmp_path, monkeypatch, name, kind, encoder) -> None:
    """Also an MP4 file that is called .mp3."""
    encode_with_ffmpeg(tmp_path / name, kind, encoder)
    wave = read_audio(tmp_path / name, RATE)
    assert abs(len(wave) - 32_000) < 1600
    expected = voiced(2.0)
    near = range(4200, 5800)
    products = [np.vdot(wave[at : at + 20_000], expected[5000:25_000]) for at in near]
    assert max(products) > 0.9 * np.square(expected[5000:25_000]).sum()
    blocks = list(stream_audio(tmp_path / name, RATE, 0.5))
    np.testing.assert_allclose(np.concatenate(blocks), wave, atol=1e-6)
    part = read_audio(tmp_path / name, 48_000, start=0.5, duration=0.25)
    whole = read_audio(tmp_path / name, 48_000)
    np.testing.assert_array_equal(part, whole[24_000:36_000])
    assert audio_info(tmp_path / name) == (48_000, 1, len(whole))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 3])
    if kind == "mp4":
        with pytest.raises(ValueError, match=f"{name}.*truncated"):
            read_audio(tmp_path / name, RATE)
    monkeypatch.setattr("codec.audio.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{name}.*install .*av.*ffmpeg -i .*{name} -ac 1"):
        read_audio(tmp_path / name, RATE)


def test_other_files_of_a_folder_are_named(tmp_path, caplog) -> None:
    for name in ("b.wav", "a.M4A", "c/d.flac", ".hidden.wav", "x.pdf", "y.pdf", "z.txt", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = ["a.M4A", "b.wav", "c/d.flac"]
    assert recordings_in(tmp_path, expected=(".txt",)) == [tmp_path / name for name in names]
    assert "no recordings are skipped: .pdf (2), no suffix (1)" in caplog.text


@pytest.mark.parametrize("scale", [2.0, 2.0**15, 2.0**23, 2.0**31])
def test_float_samples_beyond_full_scale_are_scaled(tmp_path, caplog, scale: float) -> None:
    wave = (0.9 * voiced(2.0) / np.abs(voiced(2.0)).max()).astype(np.float32)
    write(tmp_path / "a.wav", scale * wave, subtype="FLOAT")
    expected = wave / 0.9 if scale == 2.0 else wave
    found = read_audio(tmp_path / "a.wav", RATE)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert f"a.wav: has samples up to {0.9 * scale:.4g} instead of 1; scaled" in caplog.text
    # A quiet segment has the gain of the entire file.
    part = read_audio(tmp_path / "a.wav", RATE, start=0.5, duration=0.1)
    np.testing.assert_array_equal(part, found[8000:9600])
    write(tmp_path / "a.wav", 1e12 * wave, subtype="FLOAT")
    with pytest.raises(ValueError, match="samples up to 9e\\+11"):
        read_audio(tmp_path / "a.wav", RATE)


def test_samples_of_integers_are_refused() -> None:
    check_recording(1.5 * np.ones(10), "it")
    with pytest.raises(ValueError, match=r"it: has samples up to 3277; .* divided by 32768"):
        check_recording(np.full(10, 3276.8), "it")


def test_channels_that_cancel_are_not_averaged(tmp_path, caplog) -> None:
    wave = voiced(1.0)
    write(tmp_path / "a.wav", np.stack([0.5 * wave, -0.52 * wave], axis=1), subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", RATE), -0.52 * wave, atol=1e-6)
    assert "a.wav: its channels cancel each other; channel 2 alone is used" in caplog.text
    assert cancelled_channel(np.stack([wave, 0 * wave], axis=1)) is None
    assert cancelled_channel(np.stack([wave, -0.5 * wave], axis=1)) is None
    assert cancelled_channel(np.zeros((10, 2), np.float32)) is None
    assert cancelled_channel(wave[:, None]) is None


def test_what_a_file_clips_is_logged(tmp_path, caplog) -> None:
    write_audio(tmp_path / "a.wav", np.array([0.5, -1.0], np.float32), RATE)
    assert not caplog.text
    write_audio(tmp_path / "a.wav", np.array([0.5, -1.36], np.float32), RATE)
    assert "a.wav: samples up to 1.36 were clipped" in caplog.text


TAGS = {"software": "Parlance 1", "comment": "synthetic speech; seed 3"}


@pytest.mark.parametrize("suffix", ["wav", "rf64", "flac", "ogg", "oga", "opus", "mp3", "aiff"])
def test_tags_are_read_back_and_change_no_sample(tmp_path, suffix: str) -> None:
    tagged, plain = tmp_path / f"tagged.{suffix}", tmp_path / f"plain.{suffix}"
    write_audio(tagged, voiced(1.0), RATE, TAGS)
    write_audio(plain, voiced(1.0), RATE)
    found = audio_tags(tagged)
    assert found["comment"] == TAGS["comment"]
    # LAME writes its own name.
    assert suffix == "mp3" or found["software"].startswith("Parlance 1")
    assert "comment" not in audio_tags(plain)
    rate = 48_000 if suffix == "opus" else RATE
    np.testing.assert_array_equal(read_audio(tagged, rate), read_audio(plain, rate))
    # Other programs than libsndfile, through FFmpeg.
    with av.open(tagged) as container:
        values = {**container.metadata, **container.streams.audio[0].metadata}.values()
        assert TAGS["comment"] in values
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    if suffix in ("wav", "flac"):
        samples = np.concatenate(frames, axis=1)[0] / 2**15
        np.testing.assert_array_equal(samples.astype("f4"), read_audio(plain, RATE))


def test_formats_without_metadata_are_written_with_a_warning(tmp_path, caplog) -> None:
    write_audio(tmp_path / "a.au", voiced(1.0), RATE, TAGS)
    assert "a.au: this format holds no metadata; not in the file: Parlance 1; syn" in caplog.text
    assert audio_tags(tmp_path / "a.au") == {}
    assert len(read_audio(tmp_path / "a.au", RATE)) == RATE
    (tmp_path / "a.txt").write_text("no sound")
    assert audio_tags(tmp_path / "a.txt") == {}
    with pytest.raises(ValueError, match=r"b\.wav: no such recording"):
        audio_tags(tmp_path / "b.wav")


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


def test_threads_that_write_one_file(tmp_path) -> None:
    waves = [np.full(40_000, value, np.float32) for value in (0.25, 0.5)] * 4
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda wave: write_audio(tmp_path / "a.wav", wave, RATE), waves))
    samples = read_audio(tmp_path / "a.wav", RATE)
    assert len(set(samples.tolist())) == 1
    assert len(samples) == 40_000
    assert [each.name for each in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_a_wave_that_the_disk_has_no_room_for_is_named(tmp_path, suffix) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 50_000).astype(np.float32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(WriteError, match=rf"a\.{suffix}: cannot be written .*make room"):
            write_audio(tmp_path / f"a.{suffix}", noise, 16_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_an_ogg_file_without_a_first_page_is_named(tmp_path) -> None:
    write_audio(tmp_path / "a.ogg", tone(1.0, 16_000).astype(np.float32), 16_000)
    content = bytearray((tmp_path / "a.ogg").read_bytes())
    content[5] &= ~2
    (tmp_path / "a.ogg").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.ogg: "):
        read_audio(tmp_path / "a.ogg", 16_000)


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
