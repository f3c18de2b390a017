"""Codec: recordings to codes and back, whatever networks its configuration names."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from codec.config import CodecConfig, codec_config_from_dict
from codec.folder import WEIGHTS_FILE, load_weights
from codec.layers import Lengths, ceil_div
from codec.lmspt import DualEncoder, build_auxiliary, build_decoder
from codec.pieces import CHUNK_SECONDS, CONTEXT_SECONDS, pieces_of
from codec.quantize import Quantized, ResidualVQ, SplitVQ
from codec.seanet import SEANetDecoder, SEANetEncoder, semantic_head
from codec.spectral import SpectralDecoder, SpectralEncoder
from codec.tokens import CodecStamp


class Codes(NamedTuple):
    """Codes of a batch and how many frames of each item count."""

    codes: Int[Tensor, "B Q T"]
    lengths: Int[Tensor, " B"]


class CodecOutput(NamedTuple):
    """What a training step needs of one pass."""

    wave: Float[Tensor, "B 1 S"]
    quantized: Quantized


class Codec(nn.Module, PyTorchModelHubMixin, library_name="parlance", tags=["speech-codec"]):
    """A trainable speech codec.

    `from_pretrained(folder or hub id)`, `save_pretrained(folder)` and `push_to_hub(id)` move it;
    a folder holds config.json and model.safetensors.
    """

    def __init__(self, config: CodecConfig | dict[str, Any]) -> None:
        """`config` may be a config.json's content, which is how the hub mixin hands it over."""
        super().__init__()
        if isinstance(config, dict):
            config = codec_config_from_dict(config)
        self.config = config
        self.source = "untitled"
        self._folded: dict[str, str] = {}  # Digest of the folded weights -> of those they are of.
        dimension = config.dimension
        self.auxiliary: nn.Module | None = None
        if config.family == "lmspt":
            self.encoder = DualEncoder(config)
            self.quantizer: nn.Module = SplitVQ(
                dimension, config.quantizer, subtract=config.lmspt.semantic_subtraction
            )
            self.decoder = build_decoder(config)
            self.auxiliary = build_auxiliary(config)
            return
        if config.family == "seanet":
            self.encoder, self.decoder = SEANetEncoder(config.seanet), SEANetDecoder(config.seanet)
            self.semantic_head = semantic_head(dimension, config.seanet.semantic_dimension)
        else:
            self.encoder = SpectralEncoder(config.spectral, config.sample_rate)
            self.decoder = SpectralDecoder(config.spectral)
        self.quantizer = ResidualVQ(dimension, config.quantizer)

    @property
    def sample_rate(self) -> int:
        """Hz, of waves in and out."""
        return self.config.sample_rate

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return self.config.hop_length

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    def num_codebooks(self) -> int:
        """Q."""
        return self.config.quantizer.num_codebooks

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K of every codebook."""
        return self.config.quantizer.sizes

    @property
    def latent_dimension(self) -> int:
        """D of the latent and of codebook entries."""
        return self.config.dimension

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def is_folded(self) -> bool:
        """Whether `fold_weight_norm` has made it a codec for inference only."""
        return bool(self._folded)

    @property
    def stamp(self) -> CodecStamp:
        """Names this codec and its very weights in token shards."""
        digest = _digest(self)
        return CodecStamp(
            id=self.source,
            digest=self._folded.get(digest, digest),
            sample_rate=self.sample_rate,
            frame_rate=self.frame_rate,
            num_codebooks=self.num_codebooks,
            codebook_sizes=self.codebook_sizes,
        )

    def forward(self, wave: Float[Tensor, "B 1 S"]) -> CodecOutput:
        """Code and decode for training; the output has the input's length."""
        quantized = self.quantizer(self.encoder(wave))
        return CodecOutput(self.decoder(quantized.latent)[..., : wave.shape[-1]], quantized)

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
        codebook quantises the latent itself, so the codes are no slice of the whole's.
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
        return self._decode_pieces(self.decoder, codes, lengths, first_codebook)

    @torch.inference_mode()
    def resynthesize(
        self, codes: Int[Tensor, "B q T"], lengths: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B 1 S"]:
        """What LM-SPT's auxiliary decoder makes of the semantic codebook, codes[:, 0], alone.

        At `config.lmspt.auxiliary.sample_rate` Hz; `lengths` as `decode` has them. Raises
        `ValueError` for codes that this codec cannot have made, and without such a decoder.
        """
        if self.auxiliary is None:
            raise ValueError(
                f"{self.source}: has no auxiliary decoder; LM-SPT has one while it is trained"
            )
        codes = self._check_codes(codes, 0)[:, :1]
        return self._decode_pieces(self.auxiliary, codes, lengths, 0)

    def _decode_pieces(
        self, decoder: nn.Module, codes: Tensor, lengths: Tensor | None, first_codebook: int
    ) -> Tensor:
        lengths = None if lengths is None else lengths.to(self.device)
        waves = []
        for piece in pieces_of(codes.shape[-1], *self._chunk_frames):
            size = piece.stop - piece.start
            inside = None if lengths is None else (lengths - piece.start).clamp(1, size)
            part = codes[..., piece.start : piece.stop]
            wave = decoder(self.quantizer.decode(part, first_codebook), inside)
            hop = wave.shape[-1] // size
            waves.append(wave[..., piece.keep.start * hop : piece.keep.stop * hop])
        return torch.cat(waves, dim=-1)

    def decode_stream(
        self, codes: Int[np.ndarray, "q T"], first_codebook: int = 0
    ) -> Iterator[Float[np.ndarray, " _"]]:
        """The wave of one recording, block after block: `decode` for hours of speech."""
        batch = torch.from_numpy(codes.astype(np.int64)).unsqueeze(0)
        whole = self._check_codes(batch, first_codebook)
        for piece in pieces_of(whole.shape[-1], *self._chunk_frames):
            part = whole[..., piece.start : piece.stop]
            with torch.inference_mode():
                wave = self.decoder(self.quantizer.decode(part, first_codebook))
            keep = slice(piece.keep.start * self.hop_length, piece.keep.stop * self.hop_length)
            yield wave[0, 0, keep].cpu().numpy()

    def fold_weight_norm(self) -> "Codec":
        """Makes this codec faster, for inference only; its codes, waves and stamp stay the same.

        Afterwards it cannot be trained: load it with `Codec.from_pretrained` for that.
        """
        normed = [module for module in self.modules() if is_parametrized(module, "weight")]
        if normed:
            digest = _digest(self)
            for module in normed:
                remove_parametrizations(module, "weight", leave_parametrized=True)
            self._folded[_digest(self)] = digest
        return self.eval()

    def train(self, mode: bool = True) -> "Codec":
        """Training mode, or not. Raises `ValueError` for a folded codec."""
        if mode and self._folded:
            raise ValueError(
                f"{self.source}: this codec was loaded for inference; to train it, load it with "
                "Codec.from_pretrained"
            )
        return super().train(mode)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write config.json and model.safetensors; `options` are the hub mixin's.

        A folded codec saves the codec that it was loaded from. Raises `ValueError`, before any file
        is touched, when that is not there any more or one of the two has changed.
        """
        return super(Codec, self._unfolded()).save_pretrained(save_directory, **options)

    def _unfolded(self) -> "Codec":
        if not self._folded:
            return self
        try:
            codec = Codec.from_pretrained(self.source)
        except (ValueError, OSError) as error:
            raise ValueError(
                "a codec that was folded for inference is saved from where it was loaded, and "
                f"{self.source} cannot be loaded any more ({type(error).__name__}); load it with "
                "Codec.from_pretrained from where it is now, and save that"
            ) from error
        if codec.stamp.digest != self.stamp.digest:
            raise ValueError(
                f"{self.source}: the codec there and the one that was loaded from there are not "
                "the same any more; to change a codec, load it with Codec.from_pretrained"
            )
        return codec

    @property
    def _chunk_frames(self) -> tuple[int, int]:
        return round(CHUNK_SECONDS * self.frame_rate), round(CONTEXT_SECONDS * self.frame_rate)

    def _encode_piece(self, wave: Tensor, lengths: Lengths | None, books: range) -> Tensor:
        return self.quantizer.encode(self.encoder(wave, lengths), len(books), books.start)

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
        for row, size in zip(codes.unbind(1), self.codebook_sizes[first_codebook:], strict=False):
            low, high = int(row.min()), int(row.max())
            if low < 0 or high >= size:
                raise ValueError(
                    f"codes must lie in 0..{size - 1}, got {low}..{high}: another codec's?"
                )
        return codes.to(self.device)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict[str, Any] | CodecConfig | None = None,
        map_location: str = "cpu",
        **download: Any,
    ) -> "Codec":
        """Part of `from_pretrained`: build from config.json and load every tensor, strictly."""
        if config is None:
            raise ValueError(f"{model_id}: no config.json there; is it the folder of a codec?")
        try:
            codec = cls(config)
        except ValueError as error:
            raise ValueError(f"{model_id}/config.json: {error}") from error
        file = Path(model_id) / WEIGHTS_FILE
        if not Path(model_id).is_dir():
            keys = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            options = {key: download[key] for key in keys if key in download}
            file = Path(hf_hub_download(model_id, WEIGHTS_FILE, **options))
        load_weights(codec, file)
        codec.source = model_id
        return codec.to(map_location).eval()


def _digest(codec: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        if name.startswith("auxiliary."):
            continue  # It speaks for training only: codes and waves are the same without it.
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
