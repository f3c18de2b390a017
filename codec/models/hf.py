"""EnCodec, DAC, Mimi and X-Codec2 of transformers behind the SpeechCodec interface.

Codes and waves equal those of transformers' own `encode` (with the model's feature extractor) and
`decode`. Only `load_codec` imports this file.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec.distillation.teachers import loading
from codec.io import apply_umask_to_weights, sha256_of, sha256_of_tensors
from codec.models.base import CHUNK_SECONDS, SpeechCodec
from codec.modules.layers import Lengths, ceil_div
from codec.program import quiet_transformers
from codec.tokens import CodecStamp
from codec.weights import check_layers, check_sizes, weights_of

MAX_ENTRIES = 1 << 16  # Token shards store codes as uint16.


class Baseline(SpeechCodec):
    """A frozen codec of transformers; subclasses implement `_codes` and `_wave`.

    These models do not mask padding, so items of a batch are grouped by length.
    """

    def __init__(self, network: nn.Module, source: str) -> None:
        super().__init__()
        self.network: Any = network.requires_grad_(False)
        self.source = source
        self.eval()
        if max(self.codebook_sizes) > MAX_ENTRIES:
            raise ValueError(
                f"{source}: has a codebook of {max(self.codebook_sizes)} entries; token shards "
                f"store codes in 16 bits: {MAX_ENTRIES} at most"
            )

    @property
    def config(self) -> Any:
        """The configuration object of transformers."""
        return self.network.config

    @property
    def sample_rate(self) -> int:
        """Sample rate of input and output waves in Hz."""
        return self.config.sampling_rate

    @cached_property
    def _digest(self) -> str:
        # Over the tensors only: their names differ between versions of transformers.
        tensors = self.state_dict().values()
        each = sorted(
            sha256_of_tensors([(str(tuple(tensor.shape)), tensor)], 64) for tensor in tensors
        )
        return sha256_of(bytes.fromhex("".join(each)), 16)

    @property
    def stamp(self) -> CodecStamp:
        """Identifies the codec and its weights (by digest) in token shards."""
        return CodecStamp(
            id=self.source,
            digest=self._digest,
            sample_rate=self.sample_rate,
            frame_rate=self.frame_rate,
            num_codebooks=self.num_codebooks,
            codebook_sizes=self.codebook_sizes,
        )

    def train(self, mode: bool = True) -> "Baseline":
        """Stays in evaluation mode: these models are frozen."""
        return super().train(False)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes config.json and model.safetensors; `options` are those of transformers."""
        with quiet_transformers():
            self.network.save_pretrained(save_directory, **options)
        apply_umask_to_weights(save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, map_location: str = "cpu", **options: Any
    ) -> "Baseline":
        """`load_baseline` of this class. Raises `ValueError` for another class or other options."""
        if options:
            raise ValueError(
                f"from_pretrained of a codec of transformers has no option {min(options)}"
            )
        codec = load_baseline(str(pretrained_model_name_or_path), map_location)
        if not isinstance(codec, cls):
            raise ValueError(
                f"{codec.source}: is not a {cls.__name__}; load_codec determines the class"
            )
        return codec

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Uploads the files of `save_pretrained`; `options` are those of transformers."""
        return self.network.push_to_hub(repo_id, **options)

    @classmethod
    def check(cls, model: str, config: Any) -> None:
        """Raises `ValueError` for a configuration that SpeechCodec does not support."""

    def _codes(self, wave: Float[Tensor, "B 1 S"], books: range) -> Int[Tensor, "B q T"]:
        """Codes of waves of one length; frames after ceil(S / hop_length) are dropped."""
        raise NotImplementedError

    def _wave(self, codes: Int[Tensor, "B q T"], first_codebook: int) -> Float[Tensor, "B 1 S"]:
        """Waves of T * hop_length samples, or a few fewer."""
        raise NotImplementedError

    def _encode_chunk(self, wave: Tensor, lengths: Lengths | None, books: range) -> Tensor:
        frames = ceil_div(wave.shape[-1], self.hop_length)
        codes = torch.zeros(len(wave), len(books), frames, dtype=torch.int64, device=wave.device)
        for size, rows in _by_length(wave, lengths):
            count = ceil_div(size, self.hop_length)
            codes[rows, :, :count] = self._codes(wave[rows, :, :size], books)[..., :count].long()
        return codes

    def _decode_chunk(self, codes: Tensor, lengths: Lengths | None, first_codebook: int) -> Tensor:
        waves = torch.zeros(len(codes), 1, codes.shape[-1] * self.hop_length, device=codes.device)
        for size, rows in _by_length(codes, lengths):
            wave = self._wave(codes[rows, :, :size], first_codebook)
            waves[rows, :, : wave.shape[-1]] = wave
        return waves


class EncodecBaseline(Baseline):
    """EnCodec (arXiv 2210.13438) at 24 kHz with the codebooks of its highest bandwidth."""

    @classmethod
    def check(cls, model: str, config: Any) -> None:
        """Raises `ValueError` for stereo, normalizing or windowed models, such as 48 kHz."""
        if config.audio_channels != 1 or config.normalize or config.chunk_length_s is not None:
            raise ValueError(
                f"{model}: an EnCodec of {config.audio_channels} channels with scales and "
                "overlapping windows (48 kHz) needs more than codes; use the 24 kHz model"
            )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return self.config.hop_length

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K of every codebook."""
        return (self.config.codebook_size,) * len(self.network.quantizer.layers)

    def _codes(self, wave: Tensor, books: range) -> Tensor:
        layers = self.network.quantizer.layers[books.start : books.stop]
        return torch.stack(_residual_codes(layers, self.network.encoder(wave)), dim=1)

    def _wave(self, codes: Tensor, first_codebook: int) -> Tensor:
        layers = self.network.quantizer.layers[first_codebook:]
        return self.network.decoder(_sum_of_entries(layers, codes))


class DacBaseline(Baseline):
    """DAC (arXiv 2306.06546); with an odd stride the last few samples of a wave are zeros."""

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.config.downsampling_ratios)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K of every codebook."""
        return (self.config.codebook_size,) * len(self.network.quantizer.quantizers)

    def _codes(self, wave: Tensor, books: range) -> Tensor:
        latent = self.network.encoder(
            nn.functional.pad(wave, (0, -wave.shape[-1] % self.hop_length))
        )
        codes = []
        for quantizer in self.network.quantizer.quantizers[books.start : books.stop]:
            quantized, _, _, chosen, _ = quantizer(latent)
            latent = latent - quantized
            codes.append(chosen)
        return torch.stack(codes, dim=1)

    def _wave(self, codes: Tensor, first_codebook: int) -> Tensor:
        quantizers = self.network.quantizer.quantizers[first_codebook:]
        entries = [
            quantizer.out_proj(quantizer.codebook(row).transpose(1, 2))
            for quantizer, row in zip(quantizers, codes.unbind(1), strict=False)
        ]
        return self.network.decoder(sum(entries))


class MimiBaseline(Baseline):
    """Mimi (arXiv 2410.00037): codebook 1 is semantic, the others quantize the same latent.

    So codes from the first acoustic codebook on are a slice of the full codes.
    """

    @classmethod
    def check(cls, model: str, config: Any) -> None:
        """Raises `ValueError` for models that are not mono, or lack the encoder or decoder."""
        if config.audio_channels != 1:
            raise ValueError(f"{model}: has {config.audio_channels} channels; use a mono Mimi")
        if config.encoder_config is None or config.decoder_config is None:
            raise ValueError(f"{model}: lacks the encoder or decoder; use a complete Mimi")

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.config.upsampling_ratios) * self.config.latent_stride

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K of every codebook."""
        return (self.config.codebook_size,) * self.config.num_quantizers

    @property
    def _chunk_frames(self) -> tuple[int, int]:
        # The attention window of its Transformers, which run before the last downsampling.
        context = ceil_div(self.config.sliding_window, self.config.latent_stride)
        return round(CHUNK_SECONDS * self.frame_rate), context

    def _codes(self, wave: Tensor, books: range) -> Tensor:
        latent = self.network.encoder(wave).latents
        codes = []
        for part, layers in self._parts(books):
            projected = latent if part.input_proj is None else part.input_proj(latent)
            codes += _residual_codes(layers, projected)
        return torch.stack(codes, dim=1)

    def _wave(self, codes: Tensor, first_codebook: int) -> Tensor:
        latents, done = [], 0
        for part, layers in self._parts(range(first_codebook, first_codebook + codes.shape[1])):
            latent = _sum_of_entries(layers, codes[:, done : done + len(layers)])
            latents.append(latent if part.output_proj is None else part.output_proj(latent))
            done += len(layers)
        return self.network.decoder(sum(latents)).audio_values

    def _parts(self, books: range) -> Iterator[tuple[Any, nn.ModuleList]]:
        """The semantic and acoustic quantizer, each with its layers of the codebooks `books`."""
        quantizer = self.network.quantizer
        for part, offset in (
            (quantizer.semantic_residual_vector_quantizer, 0),
            (quantizer.acoustic_residual_vector_quantizer, quantizer.num_semantic_quantizers),
        ):
            layers = part.layers[max(books.start - offset, 0) : max(books.stop - offset, 0)]
            if len(layers):
                yield part, layers


class XCodec2Baseline(Baseline):
    """X-Codec2: one codebook on a wav2vec2-BERT and an acoustic encoder.

    Log-mels and the decoder's input are normalized over time, in a long recording per chunk.
    """

    def __init__(self, network: nn.Module, source: str) -> None:
        from transformers import Xcodec2FeatureExtractor

        super().__init__(network, source)
        self._extract = Xcodec2FeatureExtractor(
            sampling_rate=self.sample_rate, hop_length=self.hop_length
        )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return self.config.hop_length

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K of every codebook."""
        return (prod(self.config.quantization_levels),)

    def _codes(self, wave: Tensor, books: range) -> Tensor:
        # The extractor adds a sample and pads: if S is a multiple of hop_length there is one frame
        # more than ceil(S / hop_length), which transformers masks too.
        inputs = self._extract(
            list(wave[:, 0].cpu().numpy()), sampling_rate=self.sample_rate, return_tensors="pt"
        )
        return self.network.encode(**inputs.to(wave.device)).audio_codes

    def _wave(self, codes: Tensor, first_codebook: int) -> Tensor:
        return self.network.decode(codes).audio_values


BASELINES: dict[str, type[Baseline]] = {
    "encodec": EncodecBaseline,
    "dac": DacBaseline,
    "mimi": MimiBaseline,
    "xcodec2": XCodec2Baseline,
}
"""Classes by the `model_type` of config.json."""


def load_baseline(model: str, device: str = "cpu") -> Baseline:
    """A codec of transformers from a folder or hub id.

    Raises `ValueError` if it is missing, corrupted, or not one of `BASELINES`.
    """
    with loading(model, "codec"):
        return _loaded(model).to(device)


def _loaded(model: str) -> Baseline:
    """Raises errors of all kinds: properties of a configuration do too."""
    from transformers import AutoConfig, AutoModel

    check_layers(Path(model))
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if config.model_type not in BASELINES:
        raise ValueError(
            f"{model}: model type {config.model_type} is not a supported codec of transformers "
            f"({', '.join(BASELINES)})"
        )
    kind = BASELINES[config.model_type]
    kind.check(model, config)
    check_sizes(
        lambda: AutoModel.from_config(config, trust_remote_code=False), weights_of(Path(model))
    )
    loaded: Any = AutoModel.from_pretrained(
        model,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=False,
    )
    network, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{model}: its weights lack {', '.join(missing[:3])}; download it again")
    for name, tensor in network.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{model}: the tensor {name} has NaN or infinity; download it again")
    return kind(network, model)


def _by_length(batch: Tensor, lengths: Lengths | None) -> Iterator[tuple[int, Tensor]]:
    """Each length that occurs, with the indices of the items of that length."""
    if lengths is None:
        yield batch.shape[-1], torch.arange(len(batch), device=batch.device)
        return
    for size in sorted(set(lengths.tolist())):
        yield size, (lengths == size).nonzero()[:, 0]


def _residual_codes(layers: Iterable[Any], latent: Float[Tensor, "B D T"]) -> list[Tensor]:
    """Codes (B,T) of each codebook, of the residual of those before it."""
    codes = []
    for layer in layers:
        codes.append(layer.encode(latent))
        latent = latent - layer.decode(codes[-1])
    return codes


def _sum_of_entries(layers: Iterable[Any], codes: Int[Tensor, "B q T"]) -> Tensor:
    return sum(layer.decode(row) for layer, row in zip(layers, codes.unbind(1), strict=False))  # pyright: ignore[reportReturnType]
