"""EnCodec, DAC, Mimi and X-Codec2: published codecs of transformers, as any codec of ours.

Their codes are those that transformers' own `encode` gives for the recording as the model's feature
extractor prepares it, and their waves those of its `decode`. Only `load_codec` imports this file.
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec.distillation.teachers import loading, quiet
from codec.models.base import CHUNK_SECONDS, SpeechCodec
from codec.modules.layers import Lengths, ceil_div
from codec.tokens import CodecStamp

MOST_ENTRIES = 1 << 16
"""Token shards hold codes of 16 bits."""


class Baseline(SpeechCodec):
    """A frozen model of transformers; `_codes` and `_wave` know its parts.

    None of these models can leave padding out of sight, so recordings of a batch that differ in
    length go through one by one.
    """

    def __init__(self, network: nn.Module, source: str) -> None:
        super().__init__()
        self.network: Any = network.requires_grad_(False)
        self.source = source
        self.eval()
        if max(self.codebook_sizes) > MOST_ENTRIES:
            raise ValueError(
                f"{source}: has a codebook of {max(self.codebook_sizes)} entries, but codes here "
                f"have 16 bits: {MOST_ENTRIES} at most"
            )

    @property
    def config(self) -> Any:
        """Transformers' own configuration."""
        return self.network.config

    @property
    def sample_rate(self) -> int:
        return self.config.sampling_rate

    @cached_property
    def _digest(self) -> str:
        # Of tensors without their names, which versions of transformers change.
        tensors = (tensor.cpu().contiguous() for tensor in self.state_dict().values())
        each = [
            hashlib.sha256(repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes()).digest()
            for tensor in tensors
        ]
        return hashlib.sha256(b"".join(sorted(each))).hexdigest()[:16]

    @property
    def stamp(self) -> CodecStamp:
        return CodecStamp(
            id=self.source,
            digest=self._digest,
            sample_rate=self.sample_rate,
            frame_rate=self.frame_rate,
            num_codebooks=self.num_codebooks,
            codebook_sizes=self.codebook_sizes,
        )

    def train(self, mode: bool = True) -> "Baseline":
        """Never: these models are frozen."""
        return super().train(False)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write config.json and model.safetensors as transformers does; `options` are its own."""
        with quiet():
            self.network.save_pretrained(save_directory, **options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, map_location: str = "cpu", **options: Any
    ) -> "Baseline":
        """`load_baseline` of this class; it takes no other options."""
        if options:
            raise ValueError(f"from_pretrained of a codec of transformers has no {min(options)}")
        codec = load_baseline(str(pretrained_model_name_or_path), map_location)
        if not isinstance(codec, cls):
            raise ValueError(
                f"{codec.source}: is no {cls.__name__}; load_codec finds the class out"
            )
        return codec

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload what `save_pretrained` writes; `options` are transformers'."""
        return self.network.push_to_hub(repo_id, **options)

    @classmethod
    def check(cls, model: str, config: Any) -> None:
        """Raises `ValueError` for a configuration that the contract has no place for."""

    def _codes(self, wave: Float[Tensor, "B 1 S"], books: range) -> Int[Tensor, "B q T"]:
        """Codes of recordings of one length; frames after ceil(S / hop_length) are dropped."""
        raise NotImplementedError

    def _wave(self, codes: Int[Tensor, "B q T"], first_codebook: int) -> Float[Tensor, "B 1 S"]:
        """Waves of T * hop_length samples, or a few less."""
        raise NotImplementedError

    def _encode_chunk(self, wave: Tensor, lengths: Lengths | None, books: range) -> Tensor:
        frames = ceil_div(wave.shape[-1], self.hop_length)
        codes = torch.zeros(len(wave), len(books), frames, dtype=torch.int64, device=wave.device)
        for size, rows in _alike(wave, lengths):
            count = ceil_div(size, self.hop_length)
            codes[rows, :, :count] = self._codes(wave[rows, :, :size], books)[..., :count].long()
        return codes

    def _decode_chunk(self, codes: Tensor, lengths: Lengths | None, first_codebook: int) -> Tensor:
        waves = torch.zeros(len(codes), 1, codes.shape[-1] * self.hop_length, device=codes.device)
        for size, rows in _alike(codes, lengths):
            wave = self._wave(codes[rows, :, :size], first_codebook)
            waves[rows, :, : wave.shape[-1]] = wave
        return waves


class EncodecBaseline(Baseline):
    """EnCodec at 24 kHz, with all the codebooks of its highest bandwidth; fewer are a prefix."""

    @classmethod
    def check(cls, model: str, config: Any) -> None:
        if config.audio_channels != 1 or config.normalize or config.chunk_length_s is not None:
            raise ValueError(
                f"{model}: an EnCodec of {config.audio_channels} channels with scaled, overlapping "
                "windows (the 48 kHz one) keeps more than codes; use the 24 kHz one"
            )

    @property
    def hop_length(self) -> int:
        return self.config.hop_length

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.config.codebook_size,) * len(self.network.quantizer.layers)

    def _codes(self, wave: Tensor, books: range) -> Tensor:
        layers = self.network.quantizer.layers[books.start : books.stop]
        return torch.stack(_residual_codes(layers, self.network.encoder(wave)), dim=1)

    def _wave(self, codes: Tensor, first_codebook: int) -> Tensor:
        layers = self.network.quantizer.layers[first_codebook:]
        return self.network.decoder(_sum_of_entries(layers, codes))


class DacBaseline(Baseline):
    """DAC; where a stride is odd its decoder lacks a few samples at the end, which are zeros."""

    @property
    def hop_length(self) -> int:
        return prod(self.config.downsampling_ratios)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
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
    """Mimi: codebook 1 is semantic; the acoustic ones quantise the same latent beside it.

    So the codes from the first acoustic codebook on are a slice of the whole's.
    """

    @classmethod
    def check(cls, model: str, config: Any) -> None:
        if config.audio_channels != 1:
            raise ValueError(f"{model}: codes {config.audio_channels} channels; use a mono Mimi")
        if config.encoder_config is None or config.decoder_config is None:
            raise ValueError(f"{model}: holds one half of a Mimi; use a whole one")

    @property
    def hop_length(self) -> int:
        return prod(self.config.upsampling_ratios) * self.config.latent_stride

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.config.codebook_size,) * self.config.num_quantizers

    @property
    def _chunk_frames(self) -> tuple[int, int]:
        # Frames that its Transformers attend to, which run before the last downsampling.
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
        """The quantisers that hold these codebooks, each with its layers for them."""
        quantizer = self.network.quantizer
        first = quantizer.num_semantic_quantizers
        for part, shift in (
            (quantizer.semantic_residual_vector_quantizer, 0),
            (quantizer.acoustic_residual_vector_quantizer, first),
        ):
            layers = part.layers[max(books.start - shift, 0) : max(books.stop - shift, 0)]
            if len(layers):
                yield part, layers


class XCodec2Baseline(Baseline):
    """X-Codec2: one codebook, chosen by a wav2vec2-BERT and an acoustic encoder together.

    Its log-mels are normalised over the recording, and its decoder over the frames: pieces of a
    long recording are normalised by themselves.
    """

    def __init__(self, network: nn.Module, source: str) -> None:
        from transformers import Xcodec2FeatureExtractor

        super().__init__(network, source)
        self._extract = Xcodec2FeatureExtractor(
            sampling_rate=self.sample_rate, hop_length=self.hop_length
        )

    @property
    def hop_length(self) -> int:
        return self.config.hop_length

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (prod(self.config.quantization_levels),)

    def _codes(self, wave: Tensor, books: range) -> Tensor:
        # It adds a sample and fills up: one frame more than ceil(S / hop_length) where S is whole
        # frames, which transformers' mask leaves out too.
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
"""By the `model_type` of config.json."""


def load_baseline(model: str, device: str = "cpu") -> Baseline:
    """A baseline from a folder that transformers saved, or a hub id.

    Raises `ValueError` when it is missing, damaged, or no codec that is known here.
    """
    from transformers import AutoConfig, AutoModel

    with loading(model, "codec"):
        config = AutoConfig.from_pretrained(model)
    if config.model_type not in BASELINES:
        raise ValueError(
            f"{model}: a model of type {config.model_type} is no codec that is known here; of "
            f"transformers' these are: {', '.join(BASELINES)}"
        )
    kind = BASELINES[config.model_type]
    kind.check(model, config)
    with loading(model, "codec"):
        loaded: Any = AutoModel.from_pretrained(
            model,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    network, info = loaded
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"{model}: its weights lack {', '.join(lacking[:3])}; fetch it again")
    for name, tensor in network.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{model}: the tensor {name} holds NaN or infinity; fetch it again")
    return kind(network, model).to(device)


def _alike(batch: Tensor, lengths: Lengths | None) -> Iterator[tuple[int, Tensor]]:
    """Each length that occurs, with the rows that have it."""
    if lengths is None:
        yield batch.shape[-1], torch.arange(len(batch), device=batch.device)
        return
    for size in sorted(set(lengths.tolist())):
        yield size, (lengths == size).nonzero()[:, 0]


def _residual_codes(layers: Iterable[Any], latent: Float[Tensor, "B D T"]) -> list[Tensor]:
    """Codes (B,T) of each codebook, each of what those before it leave."""
    codes = []
    for layer in layers:
        codes.append(layer.encode(latent))
        latent = latent - layer.decode(codes[-1])
    return codes


def _sum_of_entries(layers: Iterable[Any], codes: Int[Tensor, "B q T"]) -> Tensor:
    return sum(layer.decode(row) for layer, row in zip(layers, codes.unbind(1), strict=False))  # pyright: ignore[reportReturnType]
