"""SpeechCodec: the interface of every codec, with chunked encoding and decoding of long input."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec.audio import INTEGER_PEAK
from codec.modules.layers import Lengths, ceil_div
from codec.tokens import CodecStamp

# Longer input is processed in chunks of this length with context on both sides, CONTEXT_FRAMES or
# more: the receptive field of LM-SPT's released convolutions is 27 frames (2.2 s) on each side. For
# them and for the frame-rate networks chunking changes nothing. SEANet's LSTMs and LM-SPT's
# Transformers have a larger receptive field; the tests measure the difference.
CHUNK_SECONDS = 30.0
CONTEXT_SECONDS = 2.0
CONTEXT_FRAMES = 32


class ChunkWithContext(NamedTuple):
    """Frames [start, stop) including context, and the slice of them that is kept."""

    start: int
    stop: int
    keep: slice


def chunks_with_context(num_frames: int, size: int, context: int) -> Iterator[ChunkWithContext]:
    """Chunks of `size` frames, each with up to `context` frames on both sides."""
    for first in range(0, num_frames, size):
        last = min(first + size, num_frames)
        start, stop = max(first - context, 0), min(last + context, num_frames)
        yield ChunkWithContext(start, stop, slice(first - start, last - start))


class Codes(NamedTuple):
    """Codes of a padded batch and the number of frames of each item."""

    codes: Int[Tensor, "B Q T"]
    lengths: Int[Tensor, " B"]


class SpeechCodec(nn.Module):
    """Interface of a codec: waves to codes and back. `codec.load_codec` loads any codec.

    A subclass defines `sample_rate`, `hop_length`, `codebook_sizes`, `stamp`, `_encode_chunk` and
    `_decode_chunk`.
    """

    source = "untitled"
    """Folder or hub id that the codec was loaded from."""

    @property
    def sample_rate(self) -> int:
        """Sample rate of input and output waves in Hz."""
        raise NotImplementedError

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        raise NotImplementedError

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K of every codebook."""
        raise NotImplementedError

    @property
    def stamp(self) -> CodecStamp:
        """Identifies the codec and its weights (by digest) in token shards."""
        raise NotImplementedError

    def entries(self) -> list[Float[Tensor, "K D"]] | None:
        """Entries of each codebook in the decoder's input space; None if not available."""
        return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """A codec of this class from a folder or hub id; `load_codec` determines the class."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes config.json and model.safetensors, which `load_codec` loads."""
        raise NotImplementedError

    def push_to_hub(self, repo_id: str) -> Any:
        """Uploads the files of `save_pretrained` to the hub."""
        raise NotImplementedError

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    def num_codebooks(self) -> int:
        """Q."""
        return len(self.codebook_sizes)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @torch.inference_mode()
    def encode(
        self,
        wave: Float[Tensor, "B C S"],
        lengths: Int[Tensor, " B"] | None = None,
        num_codebooks: int | None = None,
        first_codebook: int = 0,
    ) -> Codes:
        """Codes (B,Q,T) of mono waves (B,1,S), T = ceil(S / hop_length), in bounded memory.

        Each item of a padded batch gets the codes that it gets alone.

        Args:
            lengths: samples per item; default: S.
            num_codebooks: default: all from `first_codebook` on.
            first_codebook: counted from 0. Its codebook quantizes the latent itself, so for values
                other than 0 the result is not a slice of the full codes, except from 1 on for
                LM-SPT and Mimi, whose acoustic codebooks begin there.

        Raises:
            ValueError: the input is no float tensor, empty, not mono, not finite or not within
                [-1, 1], or the codebooks do not exist.
        """
        self._check_wave(wave, lengths)
        books = self._codebook_range(num_codebooks, first_codebook)
        wave = wave.to(self.device)
        if wave.dtype != torch.float32:
            wave = wave.to(next(self.parameters()).dtype)
        num_frames = ceil_div(wave.shape[-1], self.hop_length)
        if lengths is None:
            frames = torch.full((len(wave),), num_frames)
        else:
            lengths = lengths.to(self.device)
            frames = ceil_div(lengths, self.hop_length)
        codes = []
        for chunk in chunks_with_context(num_frames, *self._chunk_frames):
            start, stop = chunk.start * self.hop_length, chunk.stop * self.hop_length
            inside = None if lengths is None else (lengths - start).clamp(1, stop - start)
            codes.append(self._encode_chunk(wave[..., start:stop], inside, books)[..., chunk.keep])
        return Codes(torch.cat(codes, dim=-1), frames.to(self.device))

    @torch.inference_mode()
    def encode_stream(
        self,
        blocks: Iterable[Float[np.ndarray, " _"]],
        num_codebooks: int | None = None,
        first_codebook: int = 0,
    ) -> Int[np.ndarray, "q T"]:
        """Codes of one recording given as blocks of samples, in bounded memory.

        Equal to `encode` of the concatenated blocks. Raises `ValueError` if there are no samples,
        and for blocks that are no float samples (S,) or not finite.
        """
        books = self._codebook_range(num_codebooks, first_codebook)
        hop, (size, context) = self.hop_length, self._chunk_frames
        # `buffer` starts at frame `origin`; frames before `done` are encoded.
        buffer, origin, done, codes = np.zeros(0, np.float32), 0, 0, []

        def encode_next(keep: int) -> None:
            first = max(done - context, 0)
            samples = buffer[(first - origin) * hop : (done + size + context - origin) * hop]
            wave = torch.from_numpy(np.ascontiguousarray(samples)).to(self.device)[None, None]
            skip = done - first
            chunk = self._encode_chunk(wave, None, books)[0, :, skip : skip + keep]
            codes.append(chunk.cpu().numpy())

        for block in blocks:
            _check_block(block)
            buffer = np.concatenate([buffer, block.astype(np.float32, copy=False)])
            while origin * hop + len(buffer) > (done + size + context) * hop:
                encode_next(size)
                done += size
                drop = max(done - context, 0) - origin
                buffer, origin = buffer[drop * hop :], origin + drop
        total = origin + ceil_div(len(buffer), hop)
        if total == 0:
            raise ValueError("the recording has no samples; record it again")
        while done < total:
            encode_next(min(size, total - done))
            done += size
        return np.concatenate(codes, axis=1)

    @torch.inference_mode()
    def decode(
        self,
        codes: Int[Tensor, "B q T"],
        lengths: Int[Tensor, " B"] | None = None,
        first_codebook: int = 0,
    ) -> Float[Tensor, "B 1 S"]:
        """Waves (B,1,S), S = T * hop_length, from the codes of consecutive codebooks.

        Args:
            lengths: frames per item; samples beyond them are undefined. Default: T.
            first_codebook: codebook of codes[:, 0], counted from 0.

        Raises:
            ValueError: the codes cannot be of this codec.
        """
        codes = self._check_codes(codes, first_codebook)
        return self._decode_chunked(
            lambda part, inside: self._decode_chunk(part, inside, first_codebook), codes, lengths
        )

    def decode_stream(
        self, codes: Int[np.ndarray, "q T"], first_codebook: int = 0
    ) -> Iterator[Float[np.ndarray, " _"]]:
        """`decode` of one recording as an iterator over blocks of samples, in bounded memory.

        Raises `ValueError` for codes that cannot be of this codec.
        """
        if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu":
            raise ValueError(f"codes must be integers in a NumPy array, not {_kind_of(codes)}")
        batch = torch.from_numpy(codes.astype(np.int64)).unsqueeze(0)
        batch = self._check_codes(batch, first_codebook)
        for chunk in chunks_with_context(batch.shape[-1], *self._chunk_frames):
            with torch.inference_mode():
                part = batch[..., chunk.start : chunk.stop]
                wave = self._decode_chunk(part, None, first_codebook)
            keep = slice(chunk.keep.start * self.hop_length, chunk.keep.stop * self.hop_length)
            yield wave[0, 0, keep].cpu().numpy()

    def _encode_chunk(
        self, wave: Float[Tensor, "B 1 S"], lengths: Lengths | None, books: range
    ) -> Int[Tensor, "B q T"]:
        """Codes of one chunk of each item, of the codebooks `books`."""
        raise NotImplementedError

    def _decode_chunk(
        self, codes: Int[Tensor, "B q T"], lengths: Lengths | None, first_codebook: int
    ) -> Float[Tensor, "B 1 S"]:
        """Waves of T * hop_length samples from one chunk of codes."""
        raise NotImplementedError

    def _decode_chunked(
        self,
        decode: Callable[[Tensor, Lengths | None], Tensor],
        codes: Int[Tensor, "B q T"],
        lengths: Int[Tensor, " B"] | None,
    ) -> Float[Tensor, "B 1 S"]:
        """Waves of codes of any length; `decode` may have any number of samples per frame."""
        lengths = None if lengths is None else lengths.to(self.device)
        waves = []
        for chunk in chunks_with_context(codes.shape[-1], *self._chunk_frames):
            size = chunk.stop - chunk.start
            inside = None if lengths is None else (lengths - chunk.start).clamp(1, size)
            wave = decode(codes[..., chunk.start : chunk.stop], inside)
            hop = wave.shape[-1] // size
            waves.append(wave[..., chunk.keep.start * hop : chunk.keep.stop * hop])
        return torch.cat(waves, dim=-1)

    @property
    def _chunk_frames(self) -> tuple[int, int]:
        """Frames of a chunk without context, and of its context on each side."""
        context = max(round(CONTEXT_SECONDS * self.frame_rate), CONTEXT_FRAMES)
        return round(CHUNK_SECONDS * self.frame_rate), context

    def _check_wave(self, wave: Any, lengths: Any) -> None:
        if not isinstance(wave, Tensor):
            raise ValueError(
                f"codec expects waves (batch, 1, samples) as a tensor, not {_kind_of(wave)}; one "
                "recording in NumPy is given as torch.from_numpy(wave)[None, None]"
            )
        if not wave.is_floating_point():
            raise ValueError(
                f"codec expects samples from -1 to 1 as floats, not {_kind_of(wave)}; divide "
                "16-bit integers by 32768"
            )
        if wave.ndim != 3 or wave.shape[1] != 1:
            raise ValueError(
                f"codec expects waves (batch, 1, samples), got {tuple(wave.shape)}; "
                "average the channels of a stereo recording first"
            )
        if lengths is not None and (
            not isinstance(lengths, Tensor)
            or lengths.shape != wave.shape[:1]
            or lengths.is_floating_point()
        ):
            raise ValueError(
                f"lengths must be a tensor of integers ({len(wave)},), one for each wave, not "
                f"{_kind_of(lengths)} {tuple(getattr(lengths, 'shape', ()))}"
            )
        if wave.shape[-1] == 0 or (lengths is not None and int(lengths.min()) < 1):
            raise ValueError("the recording has no samples; record it again")
        if lengths is not None and int(lengths.max()) > wave.shape[-1]:
            raise ValueError(f"lengths {lengths.tolist()} exceed {wave.shape[-1]} samples")
        if len(wave):
            low, high = (float(extreme) for extreme in wave.aminmax())
            _check_peak(max(-low, high))

    def _codebook_range(self, num_codebooks: int | None, first_codebook: int) -> range:
        remaining = self._num_codebooks_from(first_codebook)
        count = remaining if num_codebooks is None else num_codebooks
        if not 1 <= count <= remaining:
            after = f" from first_codebook {first_codebook} on" if first_codebook else ""
            raise ValueError(
                f"num_codebooks must lie between 1 and {remaining}{after}, got {count}"
            )
        return range(first_codebook, first_codebook + count)

    def _num_codebooks_from(self, first_codebook: int) -> int:
        if not 0 <= first_codebook < self.num_codebooks:
            raise ValueError(
                f"first_codebook must lie between 0 and {self.num_codebooks - 1}, "
                f"got {first_codebook}"
            )
        return self.num_codebooks - first_codebook

    def _check_codes(self, codes: Any, first_codebook: int) -> Tensor:
        most = self._num_codebooks_from(first_codebook)
        is_integer = isinstance(codes, Tensor) and not (
            codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool
        )
        if not is_integer:
            raise ValueError(f"codes must be a tensor of integers, not {_kind_of(codes)}")
        codes = codes.long()
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= most or not codes.shape[2]:
            raise ValueError(
                f"codec expects codes (batch, 1 to {most} codebooks, frames), "
                f"got {tuple(codes.shape)}"
            )
        rows = codes.transpose(0, 1).flatten(1)  # (q, B * T)
        lows, highs = (extremes.tolist() for extremes in rows.aminmax(dim=1))
        sizes = self.codebook_sizes[first_codebook : first_codebook + codes.shape[1]]
        for book, (low, high, size) in enumerate(zip(lows, highs, sizes, strict=True), 1):
            if low < 0 or high >= size:
                raise ValueError(
                    f"codes of codebook {first_codebook + book} must lie in 0..{size - 1}, "
                    f"got {low}..{high}; are they codes of another codec?"
                )
        return codes.to(self.device)


def _kind_of(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return f"a {type(value).__name__}" + (f" of {dtype}" if dtype is not None else "")


def _check_block(block: Any) -> None:
    if not isinstance(block, np.ndarray) or block.dtype.kind != "f" or block.ndim != 1:
        shape = getattr(block, "shape", "")
        raise ValueError(
            "codec expects blocks of samples (S,) from -1 to 1 as floats in NumPy arrays, not "
            f"{_kind_of(block)} {shape}"
        )
    if block.size:
        _check_peak(float(np.abs(block).max()))


def _check_peak(peak: float) -> None:
    if not math.isfinite(peak):
        raise ValueError("the recording has NaN or infinite samples; export it again")
    if peak > INTEGER_PEAK:
        raise ValueError(
            f"codec expects samples from -1 to 1, got up to {peak:.4g}; divide 16-bit integers "
            "by 32768"
        )
