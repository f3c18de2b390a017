"""Reading and writing audio, resampling, mel filters: the only file that uses audio libraries.

They are imported inside functions so that `import codec` stays light.
"""

import io
import logging
import os
import re
import shlex
import shutil
import stat
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from codec.io import temporary_name, write_errors

logger = logging.getLogger(__name__)

MIN_RATE, MAX_RATE = 4_000, 384_000
OGG_PAGE_LIMIT = 65_307
# Above digital silence and 16-bit dither, well below the peak of a quiet voice.
SILENCE_PEAK = 1e-4
CANCELLED_SHARE = 0.1
"""Channels cancel each other if the level of their mean is below this share of the loudest's."""
INTEGER_PEAK = 16.0
"""Float samples beyond this are integers of 16, 24 or 32 bits that were not divided: no recording
exceeds full scale by 24 dB."""
CONTAINERS = (
    (4, b"ftyp", "mp4"), (0, b"\x1aE\xdf\xa3", "matroska"), (0, b"\xff\xf1", "aac"),
    (0, b"\xff\xf9", "aac"), (0, b"0&\xb2u", "asf"), (0, b"#!AMR", "amr"),
)  # fmt: skip
"""Position and bytes by which formats are recognized that libsndfile lacks, and their names in
FFmpeg. Others are never given to FFmpeg: some, such as playlists, make it open other files."""
AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"),
    *(".au", ".caf", ".rf64", ".w64", ".voc"),
    *(".m4a", ".m4b", ".mp4", ".webm", ".mka", ".aac", ".wma", ".amr"),
)
"""Suffixes of recordings in a folder. A file given by name is read whatever its suffix."""
OGG_SUFFIXES = {".oga": "VORBIS", ".opus": "OPUS"}
"""Suffixes that name no format of libsndfile, and what its format Ogg contains there."""
OPEN_SIZES = ((0, 0), (0x7FFF_0000, 0x8000_FFFF), (0xFFFF_0000, 0xFFFF_FFFF))
"""Sizes in WAV headers of programs that write to a pipe and so do not know them."""
MAX_PARTS = 1000
"""Maximum number of files joined to one, and of chunks before a WAV file's samples."""
MAX_VALUES = 2**26
"""Samples of all channels that are decoded at once: a header may state 1024 channels."""
MANY = 2**62
"""Number of samples where it is not known."""


def recordings_in(folder: str | Path, expected: Iterable[str] = ()) -> list[Path]:
    """The recordings below a folder, sorted, without hidden ones.

    Suffixes of other files are logged with their numbers, but for the `expected` ones.
    """
    found, others = [], Counter[str]()
    for path in sorted(Path(folder).rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        suffix = path.suffix.lower()
        if suffix in AUDIO_SUFFIXES:
            found.append(path)
        elif path.is_file() and suffix not in expected:
            others[suffix or "no suffix"] += 1
    if others:
        listed = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common(8))
        logger.warning("%s: files that are no recordings are skipped: %s", folder, listed)
    return found


class AudioInfo(NamedTuple):
    """What the header of a recording states; the number of samples is counted if it does not."""

    sample_rate: int
    num_channels: int
    num_samples: int
    """Per channel."""


def audio_info(path: str | Path) -> AudioInfo:
    """Rate, channels and length of a recording.

    Raises:
        ValueError: the file is missing, empty, truncated or unreadable.
    """
    with _opened(Path(path)) as source:
        if source.num_samples is not None:
            return AudioInfo(source.rate, source.num_channels, source.num_samples)
        count = sum(len(raw) for raw in source.blocks(0, MANY, 30 * source.rate))
        return AudioInfo(source.rate, source.num_channels, count)


def read_audio(
    path: str | Path, sample_rate: int, *, start: float = 0.0, duration: float | None = None,
    allow_silence: bool = False,
) -> Float[np.ndarray, " S"]:  # fmt: skip
    """One recording as mono float32 samples (S,) in [-1, 1] at `sample_rate` Hz.

    WAV, FLAC, Ogg, Opus, MP3 and what else libsndfile reads, also of several files joined; MP4,
    WebM, AAC, WMA and AMR through PyAV if it is installed. A pipe is read to its end.

    Channels are averaged; where they cancel each other, the loudest one is used. Float samples
    beyond [-1, 1] are scaled. Both are logged.

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
    """Decodes, checks, mixes the channels and resamples block by block."""
    with _opened(path) as source:
        yield from _decode(source, path, sample_rate, block_seconds, start, duration)


class _Source(NamedTuple):
    """An open recording."""

    rate: int
    num_channels: int
    num_samples: int | None
    """Per channel; None: not known before it is decoded."""
    blocks: Callable[[int, int, int], Iterator[np.ndarray]]
    """Samples (S, C) from a position on: position, their number, and that of a block."""
    is_float: bool = False
    """Samples may exceed [-1, 1]."""


@contextmanager
def _opened(path: Path) -> Iterator[_Source]:
    """A recording, a pipe, or several files joined to one."""
    import soundfile

    if not path.exists():
        raise ValueError(f"{path}: no such recording; check the path")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a recording; name a file in it")
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise ValueError(f"{path}: is a device, not a recording; write its output to a file")
    with ExitStack() as stack:
        try:
            file: BinaryIO = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
        if stat.S_ISFIFO(mode):
            pipe, file = file, stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(pipe, file)
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise ValueError(f"{path}: the file is empty (0 bytes); copy or record it again")
        head = _bytes(file, 0, 64).ljust(64, b"\0")
        for position, magic, kind in CONTAINERS:
            if head[position:].startswith(magic):
                yield _open_container(stack, file, kind, path)
                return
        try:
            parts = _parts(file, head, size)
        except _Truncated:
            raise ValueError(f"{path}: truncated: the file ends too early; copy it again") from None
        if len(parts) > MAX_PARTS:
            raise ValueError(f"{path}: more than {MAX_PARTS} files joined; split it")
        try:
            if stat.S_ISREG(mode) and parts == [_Part(0, size)]:
                opened = [stack.enter_context(soundfile.SoundFile(path))]
            else:
                views: list[Any] = [_View(file, part) for part in parts]
                opened = [stack.enter_context(soundfile.SoundFile(view)) for view in views]
            yield _sndfile_source(opened, parts, path)
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"{path}: cannot be read as audio ({error.error_string}); WAV, FLAC, Ogg, Opus and "
                f"MP3 work, and the file may be truncated; other formats: {_conversion(path)}"
            ) from error


def _conversion(path: Path) -> str:
    """The command that makes a WAV file of any recording."""
    return f"ffmpeg -i {shlex.quote(str(path))} -ac 1 converted.wav"


# ---------------------------------------------------------------- libsndfile


class _Truncated(Exception):
    """The header states more than the file has."""


class _Part(NamedTuple):
    """Bytes [start, stop) of a file, which libsndfile reads as one file."""

    start: int
    stop: int
    patches: tuple[tuple[int, bytes], ...] = ()
    """Bytes that replace those at a position of the part: sizes that the header leaves open."""
    counted: bool = True
    """The header states the number of samples."""


class _View(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, part: _Part):
        self._file, self._part, self._position = file, part, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = self._part.stop - self._part.start
        self._position = max(0, offset + (0, self._position, size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = self._part.start + self._position
        data = bytearray(_bytes(self._file, start, min(len(buffer), self._part.stop - start)))
        for place, new in self._part.patches:
            for index, byte in enumerate(new, start=place - self._position):
                if 0 <= index < len(data):
                    data[index] = byte
        buffer[: len(data)] = bytes(data)
        self._position += len(data)
        return len(data)


def _bytes(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(max(0, count))


def _parts(file: BinaryIO, head: bytes, size: int) -> list[_Part]:
    """The files that a file consists of: one, but for several that were joined.

    Raises:
        _Truncated: in formats whose truncated files libsndfile reads without an error.
    """
    parts = [_Part(0, size)]
    if head[:4] == b"RIFF":
        parts, start = [], 0
        while not parts or (_bytes(file, start, 4) == b"RIFF" and len(parts) <= MAX_PARTS):
            parts.append(_wav_part(file, start, size))
            start = parts[-1].stop
        # What follows the last one are tags.
        parts[-1] = parts[-1]._replace(stop=size)
    elif head[:4] == b"riff":
        parts = [_w64_part(file, size)]
    elif head[:4] == b"fLaC":
        # STREAMINFO: 36 bits that hold the number of samples, or 0.
        if not head[21] & 0x0F and not any(head[22:26]):
            parts = [_Part(0, size, ((22, b"\xff" * 4),), counted=False)]
    elif head[:4] == b"OggS":
        tail = _bytes(file, max(0, size - OGG_PAGE_LIMIT), OGG_PAGE_LIMIT)
        # Byte 5 of a page header has the flags (4: last page of the stream), byte 26 the number
        # of segments, whose sizes follow.
        page = tail[max(tail.rfind(b"OggS"), 0) :]
        segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
        if not page[5:6] > b"\x03" or len(page) < 27 + len(segments) + sum(segments):
            raise _Truncated
        if page[14:18] != head[14:18]:
            parts = _ogg_parts(file, size)
    elif head[:3] == b"ID3" or (head[0] == 0xFF and head[1] >= 0xE0):
        parts = _mp3_parts(file, size)
    elif head[:4] == b"FORM":
        declared = int.from_bytes(head[4:8], "big") + 8
        if 8 < declared < 0x7F00_0000 and size < declared:
            raise _Truncated
    elif head[:4] == b".snd":
        offset, declared = struct.unpack(">II", head[4:12])
        if declared != 0xFFFF_FFFF and size < offset + declared:
            raise _Truncated
    elif head[:4] == b"RF64" and head[12:16] == b"ds64":
        declared = int.from_bytes(head[20:28], "little") + 8
        if declared < 2**63 and size < declared:
            raise _Truncated
    return parts


def _wav_part(file: BinaryIO, start: int, size: int) -> _Part:
    """One WAV file, with the sizes that its header leaves open."""
    declared = int.from_bytes(_bytes(file, start + 4, 4), "little")
    end = size if _is_open(declared) else start + 8 + declared
    for kind, length, begin in _chunks(file, start + 12, size):
        if kind != b"data":
            continue
        # A recording without samples may end, or have other chunks.
        is_empty = length == 0 and _ends_with_chunks(file, begin, size)
        if _is_open(length) and not is_empty and not 0 < length <= size - begin:
            rest = [min(size - at, 0xFFFF_FFFF) for at in (start + 8, begin)]
            new = [number.to_bytes(4, "little") for number in rest]
            return _Part(start, size, ((4, new[0]), (begin - 4 - start, new[1])))
        if size < begin + length:
            raise _Truncated
        break
    if size < end:
        raise _Truncated
    return _Part(start, end)


def _is_open(size: int) -> bool:
    return any(low <= size <= high for low, high in OPEN_SIZES)


class _Chunk(NamedTuple):
    kind: bytes
    length: int
    begin: int
    """Position of its content."""


def _chunks(file: BinaryIO, position: int, size: int) -> Iterator[_Chunk]:
    """The chunks of a RIFF file from a position on; at most MAX_PARTS."""
    for _ in range(MAX_PARTS):
        if position + 8 > size:
            break
        kind, length = struct.unpack("<4sI", _bytes(file, position, 8))
        yield _Chunk(kind, length, position + 8)
        position += 8 + length + length % 2


def _ends_with_chunks(file: BinaryIO, position: int, size: int) -> bool:
    """Whether chunks from a position on end where the file does."""
    for kind, length, begin in _chunks(file, position, size):
        if not re.fullmatch(rb"[ -~]{4}", kind):
            return False
        position = begin + length + length % 2
    return position in (size, size + 1)


def _w64_part(file: BinaryIO, size: int) -> _Part:
    """Sony's W64: 64-bit sizes behind GUIDs of 16 bytes, which they include with themselves."""
    declared = int.from_bytes(_bytes(file, 16, 8), "little")
    position = 40
    while position + 24 <= size:
        kind = _bytes(file, position, 4)
        length = int.from_bytes(_bytes(file, position + 16, 8), "little")
        if kind == b"data" and (length <= 24 or length >= 2**62):
            sizes = (number.to_bytes(8, "little") for number in (size, size - position))
            return _Part(0, size, tuple(zip((16, position + 16), sizes, strict=True)))
        if kind == b"data" or length < 24:
            break
        position += length + -length % 8
    if declared < 2**62 and size < declared:
        raise _Truncated
    return _Part(0, size)


def _ogg_parts(file: BinaryIO, size: int) -> list[_Part]:
    """Chained Ogg streams: each begins with a page that has the flag 2."""
    starts, position, is_first = [], 0, False
    while (head := _bytes(file, position, 27 + 255))[:4] == b"OggS" and len(head) >= 27:
        # Streams that begin together are multiplexed, not chained.
        if head[5] & 2 and not is_first:
            starts.append(position)
        is_first = bool(head[5] & 2)
        position += 27 + head[26] + sum(head[27 : 27 + head[26]])
    edges = [*(starts or [0]), size]
    return [_Part(start, stop) for start, stop in pairwise(edges)]


def _mp3_parts(file: BinaryIO, size: int) -> list[_Part]:
    """MP3 files that were joined: libsndfile ends where the first one's Xing header states."""
    parts, start = [], 0
    while start < size and len(parts) <= MAX_PARTS:
        frame = start
        if (head := _bytes(file, start, 10))[:3] == b"ID3" and len(head) == 10:
            frame += 10 + sum((byte & 0x7F) << 7 * (3 - at) for at, byte in enumerate(head[6:]))
        head, stop = _bytes(file, frame, 64), size
        # Behind the frame's header and side information, whose length depends on its kind.
        for at in (13, 21, 36):
            flags = int.from_bytes(head[at + 4 : at + 8], "big")
            if head[at : at + 4] in (b"Xing", b"Info") and flags & 3 == 3:
                stop = frame + int.from_bytes(head[at + 12 : at + 16], "big")
                follows = _bytes(file, stop, 3)
                is_sync = follows[:1] == b"\xff" and follows[1:2] >= b"\xe0"
                # A short rest may be a frame that the header does not count.
                is_next = follows == b"ID3" or (is_sync and size - stop > 4096)
                if stop <= frame or not is_next:
                    stop = size
        parts.append(_Part(start, stop))
        start = stop
    return parts


def _sndfile_source(files: list[Any], parts: list[_Part], path: Path) -> _Source:
    """Files of libsndfile, one after the other."""
    formats = {(file.samplerate, file.channels) for file in files}
    if len(formats) > 1:
        raise ValueError(
            f"{path}: several files joined, of different sample rates or channels; "
            f"convert it: {_conversion(path)}"
        )
    if len(files) > 1:
        logger.warning("%s: consists of %d files, which are joined", path, len(files))
    for file, part in zip(files, parts, strict=True):
        if not part.counted:
            # Read in sequence: to seek, libFLAC needs the number of samples.
            file.seekable = lambda: False

    is_used = False

    def blocks(start: int, count: int, length: int) -> Iterator[np.ndarray]:
        nonlocal is_used
        must_seek, is_used = is_used, True
        for file, part in zip(files, parts, strict=True):
            if part.counted and start >= file.frames:
                start -= file.frames
                continue
            if part.counted and (start or must_seek):
                file.seek(start)
            elif start:
                _skip(file, start)
            start = 0
            while count > 0:
                size = min(length, count, MAX_VALUES // file.channels)
                try:
                    raw = file.read(size, dtype="float32", always_2d=True)
                except ValueError as error:  # Of positions behind the stated end.
                    raise ValueError(f"{path}: cannot be read as audio ({error})") from error
                if len(raw) == 0:
                    break
                count -= len(raw)
                yield raw

    total = sum(file.frames for file in files) if all(part.counted for part in parts) else None
    is_float = files[0].subtype in ("FLOAT", "DOUBLE")
    return _Source(files[0].samplerate, files[0].channels, total, blocks, is_float)


def _skip(file: Any, count: int) -> None:
    while count > 0 and (done := len(file.read(min(count, 2**18), always_2d=True))):
        count -= done


# ---------------------------------------------------------------- FFmpeg


def _open_container(stack: ExitStack, file: BinaryIO, kind: str, path: Path) -> _Source:
    """The first audio stream of a file that FFmpeg reads, through PyAV."""
    if find_spec("av") is None:
        raise ValueError(
            f"{path}: to read this format install the package av, or convert it: "
            f"{_conversion(path)}"
        )
    import av
    from av.error import FFmpegError

    file.seek(0)
    try:
        container: Any = stack.enter_context(av.open(file, format=kind))
        stream = container.streams.audio[0]
    except (FFmpegError, IndexError) as error:
        raise ValueError(
            f"{path}: cannot be read as audio ({error}); the file may be truncated"
        ) from error
    rate = stream.rate
    duration = stream.duration and float(stream.duration * stream.time_base)

    def decoded() -> Iterator[np.ndarray]:
        resampler, done = av.AudioResampler(format="fltp", rate=rate), 0
        try:
            for frame in chain(container.decode(stream), [None]):
                for part in resampler.resample(frame):
                    if part is not None:
                        samples = part.to_ndarray().T
                        done += len(samples)
                        yield samples
        except (FFmpegError, ValueError) as error:
            raise ValueError(
                f"{path}: cannot be read as audio ({error}); the file may be truncated"
            ) from error
        if duration and done / rate < 0.99 * duration - 0.2:
            raise ValueError(
                f"{path}: truncated: it has {done / rate:.2f} s of {duration:.2f} s; copy it again"
            )

    def blocks(start: int, count: int, length: int) -> Iterator[np.ndarray]:
        held: list[np.ndarray] = []
        for samples in decoded():
            kept = samples[start : start + count]
            start, count = max(0, start - len(samples)), count - len(kept)
            held += [kept] if len(kept) else []
            if sum(map(len, held)) >= length:
                yield np.concatenate(held)
                held = []
            if count == 0:
                break
        if held:
            yield np.concatenate(held)

    return _Source(rate, stream.channels, None, blocks)


# ---------------------------------------------------------------- samples


def _decode(
    source: _Source, path: Path, sample_rate: int, block_seconds: float, start: float,
    duration: float | None,
) -> Iterator[np.ndarray]:  # fmt: skip
    import soxr

    rate = source.rate
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
    first, expected = round(start * rate), MANY if duration is None else round(duration * rate)
    if source.num_samples is not None:
        expected = min(expected, source.num_samples - first)
    if expected <= 0:
        raise ValueError(f"{path}: has no samples from {start:g} s on; record it again")
    gain = _gain(source, path) if source.is_float else 1.0
    resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
    # A block is longer than the resampler's delay, so no output block is empty.
    length, done, channel = max(1, round(block_seconds * rate)), 0, None
    for raw in source.blocks(first, expected, length):
        if not np.isfinite(raw).all():
            raise ValueError(f"{path}: has NaN or infinite samples; export it again")
        done += len(raw)
        if channel is None and (channel := cancelled_channel(raw)) is not None:
            logger.warning(
                "%s: its channels cancel each other; channel %d alone is used", path, channel + 1
            )
        mixed = raw.mean(axis=1) if channel is None else raw[:, channel]
        mono = np.clip(mixed if gain == 1.0 else mixed * np.float32(gain), -1.0, 1.0)
        yield resampler.resample_chunk(mono) if rate != sample_rate else mono
    if done == 0:
        raise ValueError(f"{path}: has no samples from {start:g} s on; record it again")
    # libsndfile estimates the length of an MP3: a few missing samples are no truncation.
    if source.num_samples is not None and expected - done > max(4608, 0.001 * expected):
        raise ValueError(
            f"{path}: truncated: it has {done / rate:.2f} s of {expected / rate:.2f} s; "
            "copy it again"
        )
    if rate != sample_rate:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def cancelled_channel(samples: Float[np.ndarray, "S C"]) -> int | None:
    """Index of the loudest channel if the channels cancel each other when averaged, else None."""
    if samples.shape[1] == 1:
        return None
    levels = np.sqrt(np.square(samples).mean(axis=0))
    mixed = np.sqrt(np.square(samples.mean(axis=1)).mean())
    loudest = int(levels.argmax())
    is_cancelled = levels[loudest] > SILENCE_PEAK and mixed < CANCELLED_SHARE * levels[loudest]
    return loudest if is_cancelled else None


def _gain(source: _Source, path: Path) -> float:
    """The factor that brings float samples into [-1, 1]; 1 if they are."""
    if path.is_file():
        found = path.stat()
        peak = _peak_of_file(path, found.st_mtime_ns, found.st_size)
    else:
        peak = _peak(source)
    if peak <= 1.0 or not np.isfinite(peak):
        return 1.0
    gain = 1.0 / peak
    if peak > INTEGER_PEAK:
        scales = [scale for scale in (2.0**15, 2.0**23, 2.0**31) if peak <= scale]
        if not scales:
            raise ValueError(f"{path}: has samples up to {peak:.3g}; export it with at most 1")
        gain = 1.0 / scales[0]
    logger.warning("%s: has samples up to %.4g instead of 1; scaled by %.3g", path, peak, gain)
    return gain


@lru_cache(4096)
def _peak_of_file(path: Path, modified: int, size: int) -> float:
    """The peak of all channels; once for crops of one file."""
    with _opened(path) as source:
        return _peak(source)


def _peak(source: _Source) -> float:
    blocks = source.blocks(0, MANY, 2**18)
    return max((float(np.abs(raw).max()) for raw in blocks), default=0.0)


def _check_speech(wave: np.ndarray, path: str | Path, allow_silence: bool) -> None:
    if wave.size == 0:
        raise ValueError(f"{path}: has no samples; record it again")
    peak = float(np.abs(wave).max())
    if peak < SILENCE_PEAK and not allow_silence:
        raise ValueError(f"{path}: the recording is silent (peak {peak:.1e}); record it again")


def check_recording(
    wave: Float[np.ndarray, " S"], name: str | Path, *, allow_silence: bool = False
) -> None:
    """Raises `ValueError` that names the recording if it is empty, silent or not finite, or holds
    integers that were not divided."""
    if not np.isfinite(wave).all():
        raise ValueError(f"{name}: has NaN or infinite samples; export it again")
    _check_speech(wave, name, allow_silence)
    if (peak := float(np.abs(wave).max(initial=0.0))) > INTEGER_PEAK:
        raise ValueError(
            f"{name}: has samples up to {peak:.4g}; give them from -1 to 1, for instance 16-bit "
            "integers divided by 32768"
        )


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


def audio_tags(path: str | Path) -> dict[str, str]:
    """The metadata of a recording, by libsndfile's names (`software`, `comment`, `title`, ...);
    empty if it has none, or is of a format that libsndfile does not read.

    Raises:
        ValueError: no such file.
    """
    import soundfile

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such recording; check the path")
    try:
        with soundfile.SoundFile(path) as file:
            return {name: value for name, value in file.copy_metadata().items() if value}
    except soundfile.LibsndfileError:
        return {}


def check_name(path: str | Path) -> None:
    """Raises `ValueError` unless the suffix names a format that can be written."""
    import soundfile

    kind = _format_of(Path(path))[0]
    if kind not in soundfile.available_formats() or soundfile.default_subtype(kind) is None:
        raise ValueError(f"{path}: cannot be written as {kind or 'no format'}; use .wav")
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; name a file")


def _format_of(path: Path) -> tuple[str, str | None]:
    """libsndfile's format and encoding of a suffix, which may not exist; None: its default."""
    encoding = OGG_SUFFIXES.get(path.suffix.lower())
    return ("OGG", encoding) if encoding else (path.suffix[1:].upper(), None)


def write_audio(
    path: str | Path,
    wave: Float[np.ndarray, " S"] | Iterable[Float[np.ndarray, " _"]],
    sample_rate: int,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Writes a mono wave (S,) in [-1, 1], or its blocks, in the format of the suffix (WAV: 16 bit).

    A failed or interrupted write leaves an earlier file unchanged (temporary name, then rename).
    Samples beyond [-1, 1] are clipped, with a warning.

    Args:
        tags: metadata, by the names of `audio_tags`; samples do not depend on it. WAV has it in an
            INFO list, FLAC and Ogg in comments, MP3 in ID3 (with LAME as the software). Formats
            without metadata (AU, W64) are written without, with a warning.

    Raises:
        WriteError: the file cannot be written, for instance because the disk is full.
        ValueError: the suffix names no format.
    """
    import soundfile

    path = Path(path)
    check_name(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_name(path, path.suffix)
    kind, encoding = _format_of(path)
    peak = 0.0
    try:
        with (
            write_errors(path, soundfile.LibsndfileError),
            soundfile.SoundFile(partial, "w", sample_rate, 1, encoding, format=kind) as file,
        ):
            _write_tags(file, tags or {}, path)
            for block in [wave] if isinstance(wave, np.ndarray) else wave:
                peak = max(peak, float(np.abs(block).max(initial=0.0)))
                file.write(np.clip(block, -1.0, 1.0))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if peak > 1.0:
        logger.warning("%s: samples up to %.3g were clipped to 1", path, peak)


def _write_tags(file: Any, tags: Mapping[str, str], path: Path) -> None:
    from soundfile import LibsndfileError

    try:
        for name, value in tags.items():
            setattr(file, name, value)
    except LibsndfileError:
        lacks = "; ".join(tags.values())
        logger.warning("%s: this format holds no metadata; not in the file: %s", path, lacks)


def mel_filterbank(
    *, sample_rate: int, num_mels: int, window: int, slaney_scale: bool = False
) -> Float[Tensor, "F M"]:
    """Triangular mel filters (F,M) of unit area over F = window // 2 + 1 bins, 0 Hz to Nyquist.

    SpeechTokenizer uses the HTK mel scale, LM-SPT Slaney's.
    """
    import warnings

    from torchaudio.functional import melscale_fbanks

    if torch.empty(0).is_meta:  # torchaudio reads the values.
        return torch.empty(window // 2 + 1, num_mels)
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
