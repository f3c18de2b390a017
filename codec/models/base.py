"""SpeechCodec: what every codec offers, ours and the baselines, in pieces where input is long.

Long recordings in pieces: which frames a piece holds and which of them count.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec.modules.layers import Lengths, ceil_div
from codec.tokens import CodecStamp

# Longer recordings are coded in pieces of this length, each with CONTEXT on both sides, and with as
# many frames at least: LM-SPT's released convolutions reach 27 frames far, 2.2 s. There and in the
# frame-rate networks the pieces change nothing; SEANet's LSTMs and LM-SPT's Transformers look
# further, and what that changes is measured in the tests.
CHUNK_SECONDS = 30.0
CONTEXT_SECONDS = 2.0
CONTEXT_FRAMES = 32


class Piece(NamedTuple):
    """A stretch of frames [start, stop) and which of its frames are kept."""

    start: int
    stop: int
    keep: slice


def pieces_of(frames: int, chunk: int, context: int) -> Iterator[Piece]:
    """Stretches of `chunk` frames each, with up to `context` frames on both sides."""
    for first in range(0, frames, chunk):
        last = min(first + chunk, frames)
        start, stop = max(first - context, 0), min(last + context, frames)
        yield Piece(start, stop, slice(first - start, last - start))


class Codes(NamedTuple):
    """Codes of a batch and how many frames of each item count."""

    codes: Int[Tensor, "B Q T"]
    lengths: Int[Tensor, " B"]


class SpeechCodec(nn.Module):
    """Recordings to codes and back. `codec.load_codec` loads any; every command takes any.

    A codec brings its rates, its sizes, its stamp, and `_encode_piece` and `_decode_piece`.
    """

    source = "untitled"
    """The folder or hub id that it was loaded from."""

    @property
    def sample_rate(self) -> int:
        """Hz, of waves in and out."""
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
        """Names this codec and its very weights in token shards."""
        raise NotImplementedError

    def entries(self) -> list[Float[Tensor, "K D"]] | None:
        """Of every codebook, as the decoder hears them; None of a codec that does not tell."""
        return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """A codec of this class from a folder or hub id; `load_codec` finds the class out."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write config.json and model.safetensors, which `load_codec` takes."""
        raise NotImplementedError

    def push_to_hub(self, repo_id: str) -> Any:
        """Upload what `save_pretrained` writes."""
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
        """Where the weights are."""
        return next(self.parameters()).device

    @torch.inference_mode()
    def encode(
        self,
        wave: Float[Tensor, "B C S"],
        lengths: Int[Tensor, " B"] | None = None,
        num_codebooks: int | None = None,
        first_codebook: int = 0,
    ) -> Codes:
        """Codes of a batch of mono waves (B,1,S), T = ceil(S / hop_length).

        `lengths` are samples per item. The codes are those of `num_codebooks` codebooks (default:
        all that are left) from `first_codebook` on, counted from 0. Where that is not 0, its
        codebook quantises the latent itself, so the codes are no slice of the whole's; LM-SPT's and
        Mimi's are one from 1 on, where their acoustic codebooks begin.
        Each item of a padded batch gets the codes that it gets alone. Input of any length is coded
        in bounded memory. Raises `ValueError` for input that is not mono or empty, and for
        codebooks that are not there.
        """
        self._check_wave(wave, lengths)
        books = self._books(num_codebooks, first_codebook)
        wave = wave.to(self.device)
        if lengths is None:
            frames = torch.full((len(wave),), ceil_div(wave.shape[-1], self.hop_length))
        else:
            lengths = lengths.to(self.device)
            frames = ceil_div(lengths, self.hop_length)
        pieces = []
        for piece in pieces_of(ceil_div(wave.shape[-1], self.hop_length), *self._chunk_frames):
            start, stop = (frame * self.hop_length for frame in (piece.start, piece.stop))
            inside = None if lengths is None else (lengths - start).clamp(1, stop - start)
            codes = self._encode_piece(wave[..., start:stop], inside, books)
            pieces.append(codes[..., piece.keep])
        return Codes(torch.cat(pieces, dim=-1), frames.to(self.device))

    @torch.inference_mode()
    def encode_stream(
        self,
        blocks: Iterable[Float[np.ndarray, " _"]],
        num_codebooks: int | None = None,
        first_codebook: int = 0,
    ) -> Int[np.ndarray, "q T"]:
        """Codes of one recording that arrives in blocks of samples, in bounded memory.

        Equal to `encode` of the blocks joined. Raises `ValueError` when there are no samples.
        """
        books = self._books(num_codebooks, first_codebook)
        hop, (chunk, context) = self.hop_length, self._chunk_frames
        # `held` starts at frame `origin`; frames before `done` are coded.
        held, origin, done, codes = np.zeros(0, np.float32), 0, 0, []
        for block in blocks:
            held = np.concatenate([held, block])
            while origin * hop + len(held) >= (done + chunk + context) * hop + 1:
                stop = (done + chunk + context - origin) * hop
                codes.append(self._encode_held(held[:stop], done - origin, chunk, books))
                done += chunk
                drop = max(done - context, 0) - origin
                held, origin = held[drop * hop :], origin + drop
        total = origin + ceil_div(len(held), hop)
        if total == 0:
            raise ValueError("the recording holds no samples; record it again")
        while done < total:
            keep = min(chunk, total - done)
            stop = (done + chunk + context - origin) * hop
            start = max(done - context, 0) - origin
            piece = held[start * hop : stop]
            codes.append(self._encode_held(piece, done - origin - start, keep, books))
            done += keep
        return np.concatenate(codes, axis=1)

    @torch.inference_mode()
    def decode(
        self,
        codes: Int[Tensor, "B q T"],
        lengths: Int[Tensor, " B"] | None = None,
        first_codebook: int = 0,
    ) -> Float[Tensor, "B 1 S"]:
        """Waves of S = T * hop_length samples from any number of codebooks that follow each other.

        codes[:, 0] is of `first_codebook`, counted from 0. `lengths` are frames per item; what
        lies beyond them in the waves is undefined. Raises `ValueError` for codes that this codec
        cannot have made.
        """
        codes = self._check_codes(codes, first_codebook)
        return self._decode_pieces(
            lambda part, inside: self._decode_piece(part, inside, first_codebook), codes, lengths
        )

    def decode_stream(
        self, codes: Int[np.ndarray, "q T"], first_codebook: int = 0
    ) -> Iterator[Float[np.ndarray, " _"]]:
        """The wave of one recording, block after block: `decode` for hours of speech."""
        batch = torch.from_numpy(codes.astype(np.int64)).unsqueeze(0)
        whole = self._check_codes(batch, first_codebook)
        for piece in pieces_of(whole.shape[-1], *self._chunk_frames):
            part = whole[..., piece.start : piece.stop]
            with torch.inference_mode():
                wave = self._decode_piece(part, None, first_codebook)
            keep = slice(piece.keep.start * self.hop_length, piece.keep.stop * self.hop_length)
            yield wave[0, 0, keep].cpu().numpy()

    def _encode_piece(
        self, wave: Float[Tensor, "B 1 S"], lengths: Lengths | None, books: range
    ) -> Int[Tensor, "B q T"]:
        """Codes of a stretch of each recording, by the codebooks `books`."""
        raise NotImplementedError

    def _decode_piece(
        self, codes: Int[Tensor, "B q T"], lengths: Lengths | None, first_codebook: int
    ) -> Float[Tensor, "B 1 S"]:
        """Waves of T * hop_length samples from a stretch of codes."""
        raise NotImplementedError

    def _decode_pieces(
        self,
        decode: Callable[[Tensor, Lengths | None], Tensor],
        codes: Int[Tensor, "B q T"],
        lengths: Int[Tensor, " B"] | None,
    ) -> Float[Tensor, "B 1 S"]:
        """Waves of any length; `decode` makes any number of samples per frame of a stretch."""
        lengths = None if lengths is None else lengths.to(self.device)
        waves = []
        for piece in pieces_of(codes.shape[-1], *self._chunk_frames):
            size = piece.stop - piece.start
            inside = None if lengths is None else (lengths - piece.start).clamp(1, size)
            wave = decode(codes[..., piece.start : piece.stop], inside)
            hop = wave.shape[-1] // size
            waves.append(wave[..., piece.keep.start * hop : piece.keep.stop * hop])
        return torch.cat(waves, dim=-1)

    @property
    def _chunk_frames(self) -> tuple[int, int]:
        """Frames of a piece that are kept, and how many stand before and after them."""
        context = max(round(CONTEXT_SECONDS * self.frame_rate), CONTEXT_FRAMES)
        return round(CHUNK_SECONDS * self.frame_rate), context

    def _encode_held(
        self, samples: np.ndarray, skip: int, keep: int, books: range
    ) -> Int[np.ndarray, "q T"]:
        wave = torch.from_numpy(np.ascontiguousarray(samples)).to(self.device)[None, None]
        return self._encode_piece(wave, None, books)[0, :, skip : skip + keep].cpu().numpy()

    def _check_wave(self, wave: Tensor, lengths: Tensor | None) -> None:
        if wave.ndim != 3 or wave.shape[1] != 1:
            raise ValueError(
                f"codec expects waves (batch, 1, samples), got {tuple(wave.shape)}; "
                "average the channels of a stereo recording first"
            )
        if wave.shape[-1] == 0 or (lengths is not None and int(lengths.min()) < 1):
            raise ValueError("the recording holds no samples; record it again")
        if lengths is not None and int(lengths.max()) > wave.shape[-1]:
            raise ValueError(f"lengths {lengths.tolist()} exceed {wave.shape[-1]} samples")

    def _books(self, num_codebooks: int | None, first_codebook: int) -> range:
        left = self._num_from(first_codebook)
        count = left if num_codebooks is None else num_codebooks
        if not 1 <= count <= left:
            after = f" from first_codebook {first_codebook} on" if first_codebook else ""
            raise ValueError(f"num_codebooks must lie between 1 and {left}{after}, got {count}")
        return range(first_codebook, first_codebook + count)

    def _num_from(self, first_codebook: int) -> int:
        if not 0 <= first_codebook < self.num_codebooks:
            raise ValueError(
                f"first_codebook must lie between 0 and {self.num_codebooks - 1}, "
                f"got {first_codebook}"
            )
        return self.num_codebooks - first_codebook

    def _check_codes(self, codes: Tensor, first_codebook: int) -> Tensor:
        most = self._num_from(first_codebook)
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
                    f"got {low}..{high}: another codec's?"
                )
        return codes.to(self.device)
