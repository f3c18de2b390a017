"""Codec: recordings to codes and back, whatever networks its configuration names.

Codecs in half precision, as they ship: half the size on disk, computed with as before.

Rounding changes some codes: it makes another codec, with another digest, to export tokens with.

Any codec by its folder or hub id.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from codec.config import CodecConfig, codec_config_from_dict
from codec.distillation.teachers import WINDOW_SECONDS
from codec.io import (
    WEIGHTS_FILE,
    atomic_files,
    check_config_file,
    check_source,
    check_trainable,
)
from codec.models.base import SpeechCodec
from codec.models.lmspt import DualEncoder, build_auxiliary, build_decoder
from codec.modules.layers import Lengths
from codec.modules.quantize import Quantized, ResidualVQ, SplitVQ
from codec.modules.seanet import SEANetDecoder, SEANetEncoder, semantic_head
from codec.modules.vocos import SpectralDecoder, SpectralEncoder
from codec.tokens import CodecStamp

SUMS = "entry_sum"
"""What a codebook's moving averages add up; a folder in half precision leaves these tensors out."""


class CodecOutput(NamedTuple):
    """What a training step needs of one pass."""

    wave: Float[Tensor, "B 1 S"]
    quantized: Quantized


class Codec(PyTorchModelHubMixin, SpeechCodec, library_name="parlance", tags=["speech-codec"]):
    """A trainable speech codec.

    `from_pretrained(folder or hub id)`, `save_pretrained(folder)` and `push_to_hub(id)` move it;
    a folder holds config.json and model.safetensors. Where LM-SPT's convolutions have odd strides,
    the last few samples of a decoded wave are zeros (see `codec.convolutional.ConvDecoder`).
    """

    def __init__(self, config: CodecConfig | dict[str, Any]) -> None:
        """`config` may be a config.json's content, which is how the hub mixin hands it over."""
        super().__init__()
        if isinstance(config, dict):
            config = codec_config_from_dict(config)
        self.config = config
        self._folded: dict[str, str] = {}  # Digest of the folded weights -> of those they are of.
        self._frozen: list[nn.Module] = []
        dimension = config.dimension
        self.auxiliary: nn.Module | None = None
        if config.family == "lmspt":
            self.encoder = DualEncoder(config)
            self.quantizer: ResidualVQ | SplitVQ = SplitVQ(
                dimension, config.quantizer, subtract=config.lmspt.semantic_subtraction,
                shared=config.lmspt.shared_encoder,
            )  # fmt: skip
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
    def codebook_sizes(self) -> tuple[int, ...]:
        """K of every codebook."""
        return self.config.quantizer.sizes

    @property
    def latent_dimension(self) -> int:
        """D of the latent and of codebook entries."""
        return self.config.dimension

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

    @torch.no_grad()
    def entries(self) -> list[Float[Tensor, "K D"]]:
        """Of every codebook, as the decoder hears them: it gets their sums."""
        codes = [torch.arange(size, device=self.device) for size in self.codebook_sizes]
        return [self.quantizer.decode(row[None, None], q)[0].mT for q, row in enumerate(codes)]

    def forward(
        self, wave: Float[Tensor, "B 1 S"], codes: Int[Tensor, "B T"] | None = None
    ) -> CodecOutput:
        """Code and decode for training; the output has the input's length. `codes`: LM-SPT's
        semantic codebook, where it is frozen and what it makes of the wave is known."""
        if codes is None:
            quantized = self.quantizer(self.encoder(wave))
        else:
            quantized = self._beside(wave, codes)
        return CodecOutput(self.decoder(quantized.latent)[..., : wave.shape[-1]], quantized)

    def _beside(self, wave: Float[Tensor, "B 1 S"], codes: Int[Tensor, "B T"]) -> Quantized:
        encoder, quantizer = self.encoder, self.quantizer
        if not isinstance(encoder, DualEncoder) or encoder.acoustic is None:
            raise ValueError("only LM-SPT with two encoders can be told its semantic codes")
        assert isinstance(quantizer, SplitVQ)
        return quantizer.beside(codes, encoder.acoustic(wave))

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
        auxiliary, codes = self.auxiliary, self._check_codes(codes, 0)[:, :1]
        return self._decode_pieces(
            lambda part, inside: auxiliary(self.quantizer.decode(part, 0), inside), codes, lengths
        )

    def without_auxiliary(self) -> "Codec":
        """A copy that ships, without LM-SPT's auxiliary decoder: codes, waves, digest are the same.

        Raises `ValueError` for a folded codec.
        """
        if self.is_folded:
            raise ValueError(f"{self.source}: folded; load it with Codec.from_pretrained")
        auxiliary = replace(self.config.lmspt.auxiliary, kind="none")
        config = replace(self.config, lmspt=replace(self.config.lmspt, auxiliary=auxiliary))
        state = self.state_dict()
        codec = Codec(config)
        codec.load_state_dict({name: state[name] for name in codec.state_dict()})
        codec.source = self.source
        return codec.to(self.device).train(self.training)

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

    def freeze_semantic(self) -> None:
        """Training leaves LM-SPT's semantic encoder and codebook as they are from now on.

        Raises `ValueError` for another family, and where both halves share an encoder.
        """
        if not isinstance(self.encoder, DualEncoder) or self.encoder.acoustic is None:
            raise ValueError(
                "freeze_semantic: only codec.family lmspt, without lmspt.shared_encoder, has a "
                "semantic half that can be frozen"
            )
        assert isinstance(self.quantizer, SplitVQ)
        self._frozen = [self.encoder.semantic, self.quantizer.semantic]
        for part in self._frozen:
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Codec":
        """Training mode, or not. Raises `ValueError` for a folded codec."""
        if mode and self._folded:
            raise ValueError(
                f"{self.source}: this codec was loaded for inference; to train it, load it with "
                "Codec.from_pretrained"
            )
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write config.json and model.safetensors; `options` are the hub mixin's.

        A folded codec saves the codec that it was loaded from. Raises `ValueError`, before any file
        is touched, when that is not there any more or one of the two has changed.
        """
        return PyTorchModelHubMixin.save_pretrained(self._unfolded(), save_directory, **options)

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
        chunk, context = super()._chunk_frames
        if self.config.family == "lmspt" and self.config.lmspt.semantic == "whisper":
            # A piece and its context must fit into what Whisper hears at once.
            chunk = int(WINDOW_SECONDS * self.frame_rate) - 2 * context
        return chunk, context

    def _encode_piece(self, wave: Tensor, lengths: Lengths | None, books: range) -> Tensor:
        return self.quantizer.encode(self.encoder(wave, lengths), len(books), books.start)

    def _decode_piece(self, codes: Tensor, lengths: Lengths | None, first_codebook: int) -> Tensor:
        return self.decoder(self.quantizer.decode(codes, first_codebook), lengths)

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
        if isinstance(config, dict):
            check_trainable(config, model_id)
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


KEPT = ("cluster_size", "num_updates")
"""Small tensors that count, and are no weights."""


def halve(codec: Codec) -> Codec:
    """Rounds every weight to what float16 can hold, in place. Raises ValueError for a codec that
    was folded for inference, and one whose weights float16 cannot hold."""
    if codec.is_folded:
        raise ValueError(f"{codec.source}: folded; load it with Codec.from_pretrained")
    state = codec.state_dict()
    for name, tensor in state.items():
        if _is_weight(name, tensor):
            rounded = tensor.half().to(tensor.dtype)
            if not bool(rounded.isfinite().all()):
                raise ValueError(f"{codec.source}: {name} is too large for float16")
            state[name] = rounded
    for name in state:
        if name.endswith(SUMS):
            state[name] = _sums(state, name)
    codec.load_state_dict(state)
    return codec


def is_half(codec: Codec) -> bool:
    """Whether float16 holds the codec as it is."""
    state = codec.state_dict()
    for name, tensor in state.items():
        if _is_weight(name, tensor) and not torch.equal(tensor.half().to(tensor.dtype), tensor):
            return False
        if name.endswith(SUMS) and not torch.equal(tensor, _sums(state, name)):
            return False
    return True


def save_half(codec: Codec, folder: str | Path) -> None:
    """Writes a halved codec's folder; sums of moving averages are left out, as they follow from
    the entries."""
    if not is_half(codec):
        raise ValueError("the codec holds more than half precision: halve it first")
    with atomic_files(Path(folder)) as temporary:
        codec.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)
        state = {
            name: (tensor.half() if _is_weight(name, tensor) else tensor).contiguous()
            for name, tensor in codec.state_dict().items()
            if not name.endswith(SUMS)
        }
        save_file(state, temporary / WEIGHTS_FILE, metadata={"format": "pt"})


def _is_weight(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not name.endswith((*KEPT, SUMS))


def _sums(state: dict[str, Tensor], name: str) -> Tensor:
    stem = name.removesuffix(SUMS)
    return state[f"{stem}entries"] * state[f"{stem}cluster_size"][:, None]


def load_codec(
    path_or_hub_id: str | Path, device: str = "cpu", *, fold: bool = True
) -> SpeechCodec:
    """A trained codec, ready to encode and decode, from a local folder or a hub id.

    It is one of ours, or EnCodec, DAC, Mimi or X-Codec2 of transformers, which config.json tells.
    The weight norm of ours is folded, which is faster: pass `fold=False`, or use
    `Codec.from_pretrained`, to train it further. Raises `ValueError` when it is missing or its
    files do not fit together.
    """
    path, source = Path(path_or_hub_id), str(path_or_hub_id)
    check_device(device)
    check_source(path)
    try:
        file = path / "config.json"
        if not path.is_dir():
            file = Path(hf_hub_download(source, "config.json"))
        check_config_file(file)
        # Ours have none; all of transformers' have.
        if "model_type" in json.loads(file.read_text(encoding="utf-8")):
            from codec.models.hf import load_baseline

            return load_baseline(source, device)
        codec = Codec.from_pretrained(source, map_location=device)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"{path_or_hub_id}: no such folder, and not to be had from the hub either "
            f"({type(error).__name__}); check the name"
        ) from error
    return codec.fold_weight_norm() if fold else codec


def check_device(device: str) -> None:
    """Raises `ValueError` for a device that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}); try cpu") from error


def _add_sums(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Those that are left out follow from the entries, in the precision of the codec."""
    for name in expected:
        stem = name.removesuffix(SUMS)
        parts = [f"{stem}entries", f"{stem}cluster_size"]
        if stem != name and name not in found and all(part in found for part in parts):
            entries, size = (found[part].to(expected[part].dtype) for part in parts)
            if entries.shape[:1] == size.shape:
                found[name] = entries * size[:, None]


def load_weights(codec: nn.Module, file: Path) -> None:
    """Every tensor, with its shape, or a `ValueError` that names the first misfit."""
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; a codec folder holds config.json and {WEIGHTS_FILE}"
        )
    try:
        found = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file}: not a whole safetensors file ({error}); copy it again"
        ) from error
    expected = codec.state_dict()
    _add_sums(found, expected)
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(
                f"{file}: the tensor {name} is missing; is config.json another codec's?"
            )
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{file}: the tensor {name} has shape {tuple(found[name].shape)}, config.json asks "
                f"for {tuple(tensor.shape)}"
            )
        if not bool(found[name].isfinite().all()):
            raise ValueError(f"{file}: the tensor {name} holds NaN or infinity: a failed training?")
    if unknown := sorted(set(found) - set(expected)):
        raise ValueError(
            f"{file}: holds the unknown tensor {unknown[0]}; is config.json another's?"
        )
    codec.load_state_dict(found)
