"""Reading and writing audio, resampling, mel filters: the only file that uses audio libraries.

They are imported inside functions so that `import codec` stays light.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

logger = logging.getLogger(__name__)

MIN_RATE, MAX_RATE = 4_000, 384_000
OGG_PAGE_LIMIT = 65_307
# Above digital silence and 16-bit dither, well below the peak of a quiet voice.
SILENCE_PEAK = 1e-4
AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"),
    *(".au", ".caf", ".rf64", ".w64", ".voc"),
)
"""Suffixes of recordings in a folder. A file given by name is read whatever its suffix."""


def read_audio(
    path: str | Path, sample_rate: int, *, start: float = 0.0, duration: float | None = None,
    allow_silence: bool = False,
) -> Float[np.ndarray, " S"]:  # fmt: skip
    """One recording as mono float32 samples (S,) in [-1, 1] at `sample_rate` Hz.

    Args:
        start: seconds.
        duration: seconds; None: to the end.
        allow_silence: accept a silent recording, such as a segment of a longer one.

    Raises:
        ValueError: the file is missing, empty, truncated, unreadable, not finite, or silent.
    """
    blocks = list(_blocks(Path(path), sample_rate, 30.0, start, duration))
    wave = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    _check_speech(wave, path, allow_silence)
    return wave


def stream_audio(
    path: str | Path, sample_rate: int, block_seconds: float = 30.0
) -> Iterator[Float[np.ndarray, " _"]]:
    """`read_audio` as an iterator over blocks, for long recordings in bounded memory.

    The concatenated blocks equal the result of `read_audio`. Raises `ValueError` as it does, for a
    silent recording after the last block.
    """
    peak = 0.0
    for block in _blocks(Path(path), sample_rate, block_seconds, 0.0, None):
        peak = max(peak, float(np.abs(block).max(initial=0.0)))
        yield block
    if peak < SILENCE_PEAK:
        raise ValueError(f"{path}: the recording is silent (peak {peak:.1e}); record it again")


def _blocks(
    path: Path, sample_rate: int, block_seconds: float, start: float, duration: float | None
) -> Iterator[np.ndarray]:
    """Decodes, checks, averages the channels and resamples block by block."""
    import soundfile

    if not path.exists():
        raise ValueError(f"{path}: no such recording; check the path")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a recording; name a file in it")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes); copy or record it again")
    _check_complete(path)
    try:
        with soundfile.SoundFile(path) as file:
            yield from _decode(file, path, sample_rate, block_seconds, start, duration)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{path}: cannot be read as audio ({error.error_string}); "
            "WAV, FLAC, Ogg, Opus and MP3 work, and the file may be truncated"
        ) from error


def _check_complete(path: Path) -> None:
    """Detects truncated files of the formats that libsndfile reads without an error."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] in (b"RIFF", b"FORM"):
            declared = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big") + 8
            # Programs that write to a pipe declare no size: 0 or close to 4 GiB.
            truncated = 8 < declared < 0xFFFF_0000 and size < declared
        elif head[:4] == b".snd":
            offset = int.from_bytes(head[4:8], "big")
            declared = int.from_bytes(head[8:12], "big")
            truncated = declared != 0xFFFF_FFFF and size < offset + declared
        elif head[:4] == b"riff" or head[:4] == b"RF64":
            # Sony's W64 has its size after a GUID of 16 bytes; RF64 in its first chunk, ds64.
            file.seek(16 if head[:4] == b"riff" else 20)
            declared = int.from_bytes(file.read(8), "little") + 8 * (head[:4] == b"RF64")
            truncated = size < declared
        elif head[:4] == b"OggS":
            file.seek(max(0, size - OGG_PAGE_LIMIT))
            tail = file.read()
            # Byte 5 of a page header has the flags (4: last page of the stream), byte 26 the number
            # of segments, whose sizes follow.
            page = tail[max(tail.rfind(b"OggS"), 0) :]
            segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
            truncated = not page[5:6] > b"\x03" or len(page) < 27 + len(segments) + sum(segments)
        else:
            truncated = False
    if truncated:
        raise ValueError(f"{path}: truncated: the file ends too early; copy it again")


def _decode(file, path: Path, sample_rate: int, block_seconds, start, duration):
    import soxr

    rate = file.samplerate
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(
            f"{path}: its sample rate {rate} Hz is not supported ({MIN_RATE} to {MAX_RATE}); "
            "convert it to 16000 Hz"
        )
    if rate < 0.75 * sample_rate:
        logger.warning(
            "%s: recorded at %d Hz, so its bandwidth is %d Hz; the codec expects %d Hz",
            path, rate, rate // 2, sample_rate,
        )  # fmt: skip
    expected = file.frames - round(start * rate)
    if duration is not None:
        expected = min(expected, round(duration * rate))
    if expected <= 0:
        raise ValueError(f"{path}: has no samples from {start:g} s on; record it again")
    if start > 0:
        file.seek(round(start * rate))
    resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
    # A block is longer than the resampler's delay, so no output block is empty.
    block_frames, done = max(1, round(block_seconds * rate)), 0
    while done < expected:
        raw = file.read(min(block_frames, expected - done), dtype="float32", always_2d=True)
        if len(raw) == 0:
            # libsndfile estimates the length of an MP3: a few missing samples are no truncation.
            if expected - done <= max(4608, 0.001 * expected):
                break
            raise ValueError(
                f"{path}: truncated: it has {done / rate:.2f} s of {expected / rate:.2f} s; "
                "copy it again"
            )
        if not np.isfinite(raw).all():
            raise ValueError(f"{path}: has NaN or infinite samples; export it again")
        done += len(raw)
        mono = np.clip(raw.mean(axis=1), -1.0, 1.0)
        yield resampler.resample_chunk(mono) if rate != sample_rate else mono
    if rate != sample_rate:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _check_speech(wave: np.ndarray, path: str | Path, allow_silence: bool) -> None:
    if wave.size == 0:
        raise ValueError(f"{path}: has no samples; record it again")
    peak = float(np.abs(wave).max())
    if peak < SILENCE_PEAK and not allow_silence:
        raise ValueError(f"{path}: the recording is silent (peak {peak:.1e}); record it again")


def check_recording(
    wave: Float[np.ndarray, " S"], name: str | Path, *, allow_silence: bool = False
) -> None:
    """Raises `ValueError` that names the recording if it is empty, silent or not finite."""
    if not np.isfinite(wave).all():
        raise ValueError(f"{name}: has NaN or infinite samples; export it again")
    _check_speech(wave, name, allow_silence)


def resample_wave(
    wave: Float[np.ndarray, " S"], source_rate: int, target_rate: int
) -> Float[np.ndarray, " s"]:
    """Band-limited resampling of a mono wave (S,) between two rates in Hz (soxr HQ), as float32."""
    import soxr

    if source_rate == target_rate:
        return wave.astype(np.float32, copy=False)
    return soxr.resample(wave.astype(np.float32, copy=False), source_rate, target_rate)


def resample_batch(
    wave: Float[Tensor, "B C S"], source_rate: int, target_rate: int
) -> Float[Tensor, "B C s"]:
    """Differentiable band-limited resampling on any device (torchaudio, windowed sinc).

    S samples become ceil(S * target_rate / source_rate).
    """
    from torchaudio.functional import resample

    return wave if source_rate == target_rate else resample(wave, source_rate, target_rate)


def check_name(path: str | Path) -> None:
    """Raises `ValueError` unless the suffix names a format that can be written."""
    import soundfile

    kind = Path(path).suffix[1:].upper()
    if kind not in soundfile.available_formats() or soundfile.default_subtype(kind) is None:
        raise ValueError(f"{path}: cannot be written as {kind or 'no format'}; use .wav")
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; name a file")


def write_audio(
    path: str | Path,
    wave: Float[np.ndarray, " S"] | Iterable[Float[np.ndarray, " _"]],
    sample_rate: int,
) -> None:
    """Writes a mono wave (S,) in [-1, 1], or its blocks, in the format of the suffix (WAV: 16 bit).

    A failed or interrupted write leaves an earlier file unchanged (temporary name, then rename).

    Raises:
        OSError: the file cannot be written, for instance because the disk is full.
        ValueError: the suffix names no format.
    """
    import soundfile

    path = Path(path)
    check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with soundfile.SoundFile(partial, "w", sample_rate, 1) as file:
            for block in [wave] if isinstance(wave, np.ndarray) else wave:
                file.write(np.clip(block, -1.0, 1.0))
        os.replace(partial, path)
    except soundfile.LibsndfileError as error:
        raise OSError(
            f"{path}: cannot be written ({error.error_string}); is the disk full?"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def mel_filterbank(
    *, sample_rate: int, num_mels: int, window: int, slaney_scale: bool = False
) -> Float[Tensor, "F M"]:
    """Triangular mel filters (F,M) of unit area over F = window // 2 + 1 bins, 0 Hz to Nyquist.

    SpeechTokenizer uses the HTK mel scale, LM-SPT Slaney's.
    """
    import warnings

    from torchaudio.functional import melscale_fbanks

    with warnings.catch_warnings():
        # With a short window, low filters may be narrower than a bin; their rows are zero.
        warnings.filterwarnings("ignore", message="At least one mel filterbank")
        return melscale_fbanks(
            n_freqs=window // 2 + 1, f_min=0.0, f_max=sample_rate / 2, n_mels=num_mels,
            sample_rate=sample_rate, norm="slaney", mel_scale="slaney" if slaney_scale else "htk",
        )  # fmt: skip


def magnitude_spectrogram(
    wave: Float[Tensor, "B S"], *, window: int, hop: int, centered: bool = False
) -> Float[Tensor, "B F T"]:
    """Magnitudes of a Hann-windowed STFT, frame j centered on sample (j + 1/2) hop.

    Padded by reflection of (window - hop) / 2 samples on both sides, as in HiFi-GAN and
    SpeechTokenizer. With `centered`, as in LM-SPT, by window / 2: frame j is centered on j hop.
    """
    pad = window // 2 if centered else (window - hop) // 2
    padded = torch.nn.functional.pad(wave.unsqueeze(1), (pad, pad), mode="reflect").squeeze(1)
    spectrum = torch.stft(
        padded, window, hop, window=torch.hann_window(window, device=wave.device),
        center=False, return_complex=True,
    )  # fmt: skip
    # The floor keeps the gradient of the square root finite for a bin that is exactly zero.
    return (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
