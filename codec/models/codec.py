"""Codec: building, loading, saving, weight norm folding, and rounding to half precision."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from codec.config import CodecConfig, codec_config_from_dict
from codec.distillation.teachers import WINDOW_SECONDS
from codec.io import (
    WEIGHTS_FILE,
    apply_umask_to_weights,
    atomic_files,
    check_config_file,
    check_source,
    check_trainable,
    hub_reason,
    parse_json,
    sha256_of_tensors,
)
from codec.models.base import SpeechCodec
from codec.models.lmspt import DualEncoder, build_auxiliary, build_decoder, build_quantizer
from codec.modules.layers import Lengths
from codec.modules.quantize import Quantized, ResidualVQ, SplitVQ
from codec.modules.seanet import SEANetDecoder, SEANetEncoder, semantic_head
from codec.modules.vocos import SpectralDecoder, SpectralEncoder
from codec.tokens import CodecStamp
from codec.weights import build_outline, check_shapes, stored_shapes

SUMS = "entry_sum"
"""Suffix of a codebook's EMA sums, which a folder in half precision omits."""
KEPT = ("cluster_size", "num_updates")
"""Suffixes of a codebook's statistics, which stay in full precision."""


class CodecOutput(NamedTuple):
    """Output of a training forward pass."""

    wave: Float[Tensor, "B 1 S"]
    quantized: Quantized


class Codec(PyTorchModelHubMixin, SpeechCodec, library_name="parlance", tags=["speech-codec"]):
    """A trainable speech codec of the family that its configuration names.

    Loaded by `from_pretrained(folder or hub id)`, saved by `save_pretrained(folder)` and
    `push_to_hub(id)` as config.json and model.safetensors. With odd strides in LM-SPT's
    convolutions the last few samples of a decoded wave are zeros (see `ConvDecoder`).
    """

    def __init__(self, config: CodecConfig | dict[str, Any]) -> None:
        """`config` may be the content of config.json, as the hub mixin passes it."""
        super().__init__()
        if isinstance(config, dict):
            config = codec_config_from_dict(config)
        self.config = config
        self._folded: dict[str, str] = {}  # Digest of the folded weights: of the original ones.
        self._frozen: list[nn.Module] = []
        dimension = config.dimension
        self.auxiliary: nn.Module | None = None
        self.quantizer: ResidualVQ | SplitVQ
        if config.family == "lmspt":
            self.encoder = DualEncoder(config)
            self.quantizer = build_quantizer(config)
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
        """Sample rate of input and output waves in Hz."""
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
        """Features D of the latent and of codebook entries."""
        return self.config.dimension

    @property
    def is_folded(self) -> bool:
        """Whether weight norm is folded: such a codec is for inference only."""
        return bool(self._folded)

    @property
    def stamp(self) -> CodecStamp:
        """Identifies the codec and its weights in token shards; folding does not change it."""
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
        """Entries of each codebook in the decoder's input space, where they are summed."""
        codes = [torch.arange(size, device=self.device) for size in self.codebook_sizes]
        return [self.quantizer.decode(row[None, None], q)[0].mT for q, row in enumerate(codes)]

    def forward(
        self, wave: Float[Tensor, "B 1 S"], codes: Int[Tensor, "B T"] | None = None
    ) -> CodecOutput:
        """Encode, quantize and decode for training; the output has the input's length.

        `codes`: known codes of LM-SPT's frozen semantic codebook, which skip its encoder. Raises
        `ValueError` for them if the codec does not have two encoders.
        """
        if codes is None:
            quantized = self.quantizer(self.encoder(wave))
        else:
            if not isinstance(self.encoder, DualEncoder) or self.encoder.acoustic is None:
                raise ValueError("known semantic codes need an LM-SPT codec with two encoders")
            assert isinstance(self.quantizer, SplitVQ)
            quantized = self.quantizer.with_semantic_codes(codes, self.encoder.acoustic(wave))
        return CodecOutput(self.decoder(quantized.latent)[..., : wave.shape[-1]], quantized)

    @torch.inference_mode()
    def resynthesize(
        self, codes: Int[Tensor, "B q T"], lengths: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B 1 S"]:
        """LM-SPT's auxiliary decoder on the semantic codes, codes[:, 0], alone.

        Returns waves at `config.lmspt.auxiliary.sample_rate` Hz; `lengths` as in `decode`. Raises
        `ValueError` for codes that cannot be of this codec, and without auxiliary decoder.
        """
        if self.auxiliary is None:
            raise ValueError(
                f"{self.source}: has no auxiliary decoder; only LM-SPT codecs in training have one"
            )
        auxiliary, codes = self.auxiliary, self._check_codes(codes, 0)[:, :1]
        return self._decode_chunked(
            lambda part, inside: auxiliary(self.quantizer.decode(part, 0), inside), codes, lengths
        )

    def without_auxiliary(self) -> "Codec":
        """A copy without LM-SPT's auxiliary decoder; codes, waves and digest are the same.

        Raises `ValueError` if weight norm is folded.
        """
        self.check_unfolded("to copy it")
        auxiliary = replace(self.config.lmspt.auxiliary, kind="none")
        config = replace(self.config, lmspt=replace(self.config.lmspt, auxiliary=auxiliary))
        state = self.state_dict()
        codec = Codec(config)
        codec.load_state_dict({name: state[name] for name in codec.state_dict()})
        codec.source = self.source
        return codec.to(self.device).train(self.training)

    def fold_weight_norm(self) -> "Codec":
        """Folds weight norm into the weights, in place, for faster inference.

        Codes, waves and stamp stay the same. A folded codec cannot be trained, saved or exported.
        A codec without weight norm is only set to evaluation mode.
        """
        normed = [module for module in self.modules() if is_parametrized(module, "weight")]
        if normed:
            digest = _digest(self)
            for module in normed:
                remove_parametrizations(module, "weight", leave_parametrized=True)
            self._folded[_digest(self)] = digest
            self.requires_grad_(False)
        return self.eval()

    def check_unfolded(self, purpose: str) -> None:
        """Raises `ValueError` if weight norm is folded; the message ends with `purpose`."""
        if self.is_folded:
            raise ValueError(
                f"{self.source}: its weight norm is folded for inference (load_codec folds it); "
                f"load it with Codec.from_pretrained or load_codec(..., fold=False) {purpose}"
            )

    def freeze_semantic(self) -> None:
        """Freezes LM-SPT's semantic encoder and codebook.

        Raises `ValueError` for another family and for a shared encoder.
        """
        if not isinstance(self.encoder, DualEncoder) or self.encoder.acoustic is None:
            raise ValueError(
                "freeze_semantic: only codec.family lmspt, without lmspt.shared_encoder, has a "
                "separate semantic encoder"
            )
        assert isinstance(self.quantizer, SplitVQ)
        self._frozen = [self.encoder.semantic, self.quantizer.semantic]
        for part in self._frozen:
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Codec":
        """Sets training or evaluation mode. Raises `ValueError` if weight norm is folded."""
        if mode:
            self.check_unfolded("to train it")
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes config.json and model.safetensors; `options` are those of the hub mixin.

        Raises `ValueError` if weight norm is folded, before it touches any file.
        """
        self.check_unfolded("to save it")
        address = PyTorchModelHubMixin.save_pretrained(self, save_directory, **options)
        apply_umask_to_weights(save_directory)
        return address

    @property
    def _chunk_frames(self) -> tuple[int, int]:
        chunk, context = super()._chunk_frames
        if self.config.family == "lmspt" and self.config.lmspt.semantic == "whisper":
            # A chunk with its context must fit into Whisper's window.
            chunk = int(WINDOW_SECONDS * self.frame_rate) - 2 * context
        return chunk, context

    def _encode_chunk(self, wave: Tensor, lengths: Lengths | None, books: range) -> Tensor:
        return self.quantizer.encode(self.encoder(wave, lengths), len(books), books.start)

    def _decode_chunk(self, codes: Tensor, lengths: Lengths | None, first_codebook: int) -> Tensor:
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
        """Called by `from_pretrained`: builds from config.json and loads all tensors, strictly."""
        if config is None:
            raise ValueError(f"{model_id}: no config.json there; is it the folder of a codec?")
        if isinstance(config, dict):
            check_trainable(config, model_id)
        file = Path(model_id) / WEIGHTS_FILE
        if not Path(model_id).is_dir():
            keys = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            options = {key: download[key] for key in keys if key in download}
            file = Path(hf_hub_download(model_id, WEIGHTS_FILE, **options))
        _check_file(file)
        shapes = stored_shapes(file)
        try:
            if isinstance(config, dict):
                config = codec_config_from_dict(config)
            outline = build_outline(lambda: cls(config), len(shapes))
        except ValueError as error:
            raise ValueError(f"{model_id}/config.json: {error}") from error
        check_shapes(outline, shapes, file, may_lack=SUMS)
        codec = cls(config)
        load_weights(codec, file)
        codec.source = model_id
        return codec.to(map_location).eval()


def load_codec(
    path_or_hub_id: str | Path, device: str = "cpu", *, fold: bool = True
) -> SpeechCodec:
    """A codec for inference from a local folder or a hub id.

    config.json determines the class: `Codec`, or EnCodec, DAC, Mimi or X-Codec2 of transformers.

    Args:
        fold: fold the weight norm of a `Codec`, for faster inference. Use `fold=False` or
            `Codec.from_pretrained` to train, save or export it.

    Raises:
        ValueError: the codec is missing, its files do not match, or the device does not exist.
    """
    path, source = Path(path_or_hub_id), str(path_or_hub_id)
    check_device(device)
    check_source(path)
    try:
        file = path / "config.json"
        if not path.is_dir():
            file = Path(hf_hub_download(source, "config.json"))
        check_config_file(file)
        # Every configuration of transformers has a model_type, ours have none.
        if "model_type" in parse_json(file.read_text(encoding="utf-8")):
            from codec.models.hf import load_baseline

            return load_baseline(source, device)
        codec = Codec.from_pretrained(source, map_location=device)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"{path_or_hub_id}: no such folder, and the hub does not provide it "
            f"({hub_reason(error)}); check the name"
        ) from error
    return codec.fold_weight_norm() if fold else codec


def check_device(device: str) -> None:
    """Raises `ValueError` for a device that does not exist or cannot be used."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}); try cpu") from error


def _add_sums(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Computes omitted EMA sums from the entries, in the precision of the codec."""
    for name in expected.keys() - found.keys():
        stem = name.removesuffix(SUMS)
        entries, size = (
            found[f"{stem}{part}"].to(expected[name].dtype) for part in ("entries", "cluster_size")
        )
        found[name] = entries * size[:, None]


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a codec folder has config.json and {WEIGHTS_FILE}")


def load_weights(codec: nn.Module, file: Path) -> None:
    """Loads every tensor of the codec. Raises `ValueError` that names the first mismatch."""
    _check_file(file)
    check_shapes(codec, stored_shapes(file), file, may_lack=SUMS)
    found = load_file(file)
    for name, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{file}: the tensor {name} has NaN or infinity; did training fail?")
    _add_sums(found, codec.state_dict())
    codec.load_state_dict(found)


def to_half_precision(codec: Codec) -> Codec:
    """Rounds the weights to float16 values, in place; they are still computed with in float32.

    Some codes change, so the result is another codec, with another digest. Raises `ValueError` if
    weight norm is folded, or if a weight exceeds the range of float16.
    """
    codec.check_unfolded("to round it")
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


def is_half_precision(codec: Codec) -> bool:
    """Whether all weights have float16 values."""
    state = codec.state_dict()
    for name, tensor in state.items():
        if _is_weight(name, tensor) and not torch.equal(tensor.half().to(tensor.dtype), tensor):
            return False
        if name.endswith(SUMS) and not torch.equal(tensor, _sums(state, name)):
            return False
    return True


def save_half_precision(codec: Codec, folder: str | Path) -> None:
    """Writes a codec's folder with weights in float16, half the size of `save_pretrained`.

    EMA sums of codebooks are omitted: they follow from the entries. Raises `ValueError` if
    `to_half_precision` has not rounded the codec.
    """
    if not is_half_precision(codec):
        raise ValueError("the codec has more than half precision; round it first (codec halve)")
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


def _digest(codec: nn.Module) -> str:
    # The auxiliary decoder is used in training only: codes and waves do not depend on it.
    state = sorted(codec.state_dict().items())
    return sha256_of_tensors(item for item in state if not item[0].startswith("auxiliary."))
