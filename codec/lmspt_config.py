"""Frozen configuration of LM-SPT's networks (arXiv 2506.16738, and its released code)."""

from dataclasses import dataclass, field
from math import prod
from typing import Literal

from codec.checks import at_least, one_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvConfig:
    """Convolutions on the wave with Snake, as in Descript's codec (arXiv 2306.06546, A)."""

    width: int = 32
    """Channels of the encoders' first convolution; each stride doubles them."""
    semantic_width: int = 0
    """The same of the semantic encoder; 0: width."""
    strides: tuple[int, ...] = (4, 5, 6, 8, 2)
    """Downsampling factors of the encoders, first to last."""
    decoder_width: int = 1536
    """Channels of the decoder's first convolution; each stride halves them."""
    decoder_strides: tuple[int, ...] = ()
    """Upsampling factors of the decoder, first to last; empty: strides reversed."""
    dilations: tuple[int, ...] = (1, 3, 9)
    """Of the residual units of every stride."""
    kernel_size: int = 7
    """Samples of a residual unit's dilated convolution."""

    def __post_init__(self) -> None:
        if not self.strides or not self.dilations:
            raise ValueError("lmspt.conv.strides and .dilations must not be empty")
        at_least(
            1,
            lmspt__conv__width=self.width,
            lmspt__conv__strides=self.strides,
            lmspt__conv__decoder_strides=self.decoder_strides,
            lmspt__conv__dilations=self.dilations,
        )
        at_least(0, lmspt__conv__semantic_width=self.semantic_width)
        _check_halves("lmspt.conv.decoder_width", self.decoder_width, self.upsampling)
        _check_odd("lmspt.conv.kernel_size", self.kernel_size)

    @property
    def upsampling(self) -> tuple[int, ...]:
        """Factors of the decoder, first to last."""
        return self.decoder_strides or self.strides[::-1]

    @property
    def hop_length(self) -> int:
        """Samples per frame of the encoders."""
        return prod(self.strides)

    @property
    def decoder_hop_length(self) -> int:
        """Samples per frame of the decoder."""
        return prod(self.upsampling)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Transformer after each encoder (first form; 2506.16738, appendix D: 8 layers of 512)."""

    num_layers: int = 0
    """Layers; 0: no Transformer."""
    num_heads: int = 8
    """Attention heads; they share lmspt.dimension."""
    context: int = 250
    """Frames that a frame sees on each side (before it alone where lmspt.causal)."""

    def __post_init__(self) -> None:
        at_least(0, lmspt__transformer__num_layers=self.num_layers)
        at_least(
            1,
            lmspt__transformer__num_heads=self.num_heads,
            lmspt__transformer__context=self.context,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WhisperConfig:
    """Whisper's encoder as the semantic one, frozen, and what makes codes of its features.

    The first five say which Whisper: recipes/train_semantic.py reads them from the model."""

    width: int = 384
    """Features of Whisper's hidden states (tiny 384, base 512)."""
    num_layers: int = 4
    """Its encoder's Transformer layers (tiny 4, base 6)."""
    num_heads: int = 6
    """Their attention heads (tiny 6, base 8)."""
    feedforward: int = 1536
    """Features inside their feed-forward parts (tiny 1536, base 2048)."""
    num_mels: int = 80
    """Mel bins that it hears."""
    adapter_width: int = 256
    """Channels of the ConvNeXt blocks behind it."""
    adapter_depth: int = 2
    """Their number."""

    def __post_init__(self) -> None:
        at_least(
            1,
            lmspt__whisper__width=self.width,
            lmspt__whisper__num_layers=self.num_layers,
            lmspt__whisper__num_heads=self.num_heads,
            lmspt__whisper__feedforward=self.feedforward,
            lmspt__whisper__num_mels=self.num_mels,
            lmspt__whisper__adapter_width=self.adapter_width,
        )
        at_least(0, lmspt__whisper__adapter_depth=self.adapter_depth)
        if self.width % self.num_heads:
            raise ValueError(
                f"lmspt.whisper: {self.num_heads} heads cannot share {self.width} features"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxiliaryConfig:
    """The decoder that speaks the semantic codebook alone; it exists for training."""

    kind: Literal["none", "conv", "spectral"] = "spectral"
    """Convolutions, Vocos, or no auxiliary decoder (what ships)."""
    sample_rate: int = 16_000
    """Hz of its speech: the teacher's."""
    width: int = 192
    """Channels: of the first convolution, or of the ConvNeXt blocks."""
    strides: tuple[int, ...] = (2, 2)
    """Upsampling factors, first to last; conv: to samples, spectral: to STFT frames."""
    depths: tuple[int, ...] = (1, 1, 1)
    """spectral: blocks before, between and after the upsamplings."""
    window: int = 640
    """spectral: samples of the STFT window."""
    hop: int = 160
    """spectral: samples between STFT frames."""
    dilations: tuple[int, ...] = (1, 3, 9)
    """conv: of the residual units of every stride."""
    kernel_size: int = 7
    """conv: of a residual unit's dilated convolution; spectral: frames of a block's."""
    causal: bool = False
    """conv: no sample looks ahead."""

    def __post_init__(self) -> None:
        one_of(("none", "conv", "spectral"), lmspt__auxiliary__kind=self.kind)
        if not self.strides or not self.dilations:
            raise ValueError("lmspt.auxiliary.strides and .dilations must not be empty")
        at_least(
            1,
            lmspt__auxiliary__sample_rate=self.sample_rate,
            lmspt__auxiliary__width=self.width,
            lmspt__auxiliary__strides=self.strides,
            lmspt__auxiliary__hop=self.hop,
            lmspt__auxiliary__dilations=self.dilations,
        )
        at_least(0, lmspt__auxiliary__depths=self.depths)
        _check_odd("lmspt.auxiliary.kernel_size", self.kernel_size)
        if self.kind == "conv":
            at_least(least_stride(self.causal), lmspt__auxiliary__strides=self.strides)
            _check_halves("lmspt.auxiliary.width", self.width, self.strides)
        if self.kind == "spectral":
            self._check_vocos()

    def _check_vocos(self) -> None:
        if self.causal:
            raise ValueError("lmspt.auxiliary.causal is for kind conv: Vocos looks ahead")
        if len(self.depths) != len(self.strides) + 1:
            raise ValueError(
                f"lmspt.auxiliary.depths needs {len(self.strides) + 1} numbers (one more than "
                f"lmspt.auxiliary.strides), got {self.depths}"
            )
        if (self.window - self.hop) % 2 or self.window < 2 * self.hop:
            raise ValueError(
                "lmspt.auxiliary.window must be at least twice lmspt.auxiliary.hop and differ from "
                f"it by an even number, got {self.window} and {self.hop}"
            )

    @property
    def hop_length(self) -> int:
        """Samples per codec frame."""
        return prod(self.strides) * (self.hop if self.kind == "spectral" else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LMSPTConfig:
    """LM-SPT: a semantic and an acoustic encoder, a split quantiser, one decoder of both."""

    encoder: Literal["conv", "spectral"] = "spectral"
    """Convolutions on the wave (lmspt.conv), or ConvNeXt on mel frames (spectral)."""
    decoder: Literal["conv", "spectral"] = "spectral"
    """Transposed convolutions (lmspt.conv), or Vocos (spectral)."""
    semantic: Literal["own", "whisper"] = "own"
    """The semantic encoder: of the same kind as the acoustic one, or a pretrained Whisper's
    (lmspt.whisper), as GLM-4-Voice has (arXiv 2412.02612, section 3.1), for waves at 16 kHz."""
    dimension: int = 256
    """Features D of the latents; spectral.dimension is not read."""
    shared_encoder: bool = False
    """One encoder's latent serves both quantisers."""
    semantic_subtraction: bool = True
    """The acoustic codebooks quantise what the semantic one left over (released form); or their
    encoder's whole latent, in parallel (first form)."""
    causal: bool = False
    """No frame looks ahead; for convolutions and the Transformer."""
    conv: ConvConfig = field(default_factory=ConvConfig)
    """Read where encoder or decoder is conv."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """After each encoder that is not Whisper's."""
    whisper: WhisperConfig = field(default_factory=WhisperConfig)
    """Read where semantic is whisper."""
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)
    """Decoder of the semantic codebook, for training."""

    def __post_init__(self) -> None:
        one_of(("conv", "spectral"), lmspt__encoder=self.encoder, lmspt__decoder=self.decoder)
        one_of(("own", "whisper"), lmspt__semantic=self.semantic)
        if self.semantic == "whisper" and (self.shared_encoder or self.causal):
            raise ValueError(
                "lmspt.semantic whisper is an encoder apart, and looks ahead: leave "
                "lmspt.shared_encoder and lmspt.causal out"
            )
        at_least(1, lmspt__dimension=self.dimension)
        if self.causal and "spectral" in (self.encoder, self.decoder):
            raise ValueError(
                "lmspt.causal is for encoder conv and decoder conv: spectral looks ahead"
            )
        strides = {"lmspt__conv__strides": self.conv.strides}
        strides["lmspt__conv__decoder_strides"] = self.conv.decoder_strides
        at_least(least_stride(self.causal), **strides)
        heads = self.transformer.num_heads
        if self.transformer.num_layers and (self.dimension % heads or self.dimension // heads % 2):
            raise ValueError(
                f"lmspt.transformer.num_heads: {heads} heads cannot share {self.dimension} "
                "features in even parts"
            )


def least_stride(causal: bool) -> int:
    """A stride has a kernel of twice its length: 1, padded on both sides, makes T + 1 frames."""
    return 1 if causal else 2


def _check_odd(name: str, size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"{name} must be odd, got {size}")


def _check_halves(name: str, width: int, strides: tuple[int, ...]) -> None:
    """Each stride halves the channels: some must be left."""
    if width // 2 ** len(strides) < 1:
        raise ValueError(f"{name} must be at least {2 ** len(strides)} for {len(strides)} strides")
