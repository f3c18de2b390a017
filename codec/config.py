"""Frozen configurations of the codec architectures and their checks. Imports no config library."""

from dataclasses import dataclass, field, is_dataclass
from math import prod
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

from codec.io import fits_type

C = TypeVar("C")
Family = Literal["seanet", "spectral", "lmspt"]
WHISPER_RATE, WHISPER_HOP = 16_000, 320
MAX_CODEBOOKS = 1024


def at_least(least: int | float, **values: int | float | tuple[int, ...]) -> None:
    """Raises `ValueError` that names the first value, or element, below `least`.

    Values are keyword arguments, named by their configuration key with `__` for each dot.
    """
    for name, value in values.items():
        if any(each < least for each in (value if isinstance(value, tuple) else (value,))):
            key = name.replace("__", ".")
            raise ValueError(f"{key} must be at least {least:g}, got {value}")


def one_of(choices: tuple[str, ...], **values: str) -> None:
    """Raises `ValueError` that names the first value that is none of `choices`; see `at_least`."""
    for name, value in values.items():
        if value not in choices:
            key = name.replace("__", ".")
            raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")


def least_stride(causal: bool) -> int:
    """The smallest stride of a convolution whose kernel is two strides long.

    Stride 1 with padding on both sides would give T + 1 frames.
    """
    return 1 if causal else 2


def _check_odd(name: str, size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"{name} must be odd, got {size}")


def _check_halvings(name: str, width: int, strides: tuple[int, ...]) -> None:
    """Every stride halves the number of channels; at least one channel must remain."""
    if width // 2 ** len(strides) < 1:
        raise ValueError(f"{name} must be at least {2 ** len(strides)} for {len(strides)} strides")


def _check_depths(prefix: str, name: str, depths: tuple[int, ...], num_strides: int) -> None:
    at_least(0, **{f"{prefix}.{name}": depths})
    if len(depths) != num_strides + 1:
        raise ValueError(
            f"{prefix}.{name} needs {num_strides + 1} numbers (one more than {prefix}.strides), "
            f"got {depths}"
        )


def _check_stft(prefix: str, window: int, hop: int) -> None:
    if (window - hop) % 2 or window < 2 * hop:
        raise ValueError(
            f"{prefix}.window must be at least twice {prefix}.hop and differ from it by an even "
            f"number, got {window} and {hop}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SEANetConfig:
    """Encoder and decoder of SpeechTokenizer (arXiv 2308.16692) and DM-Codec (2410.15017)."""

    num_filters: int = 64
    """Channels of the first convolution; each stride doubles them."""
    strides: tuple[int, ...] = (8, 5, 4, 2)
    """Upsampling factors of the decoder; the encoder uses them in reverse."""
    dimension: int = 1024
    """Features D of the latent."""
    semantic_dimension: int = 768
    """Width that codebook 1 is projected to for a semantic teacher."""
    bidirectional: bool = True
    """Bidirectional LSTM in the encoder; the decoder's is always causal."""
    dilation_base: int = 2
    """Dilation of residual unit i is this to the power i."""
    residual_kernel_size: int = 3
    """Kernel size of a residual unit's dilated convolution."""
    num_residual_layers: int = 1
    """Residual units per stride."""
    num_lstm_layers: int = 2
    """LSTM layers; 0: no LSTM."""
    activation: Literal["elu", "snake"] = "elu"
    """Activation function; AnyGPT's variant of the released model has Snake."""

    def __post_init__(self) -> None:
        if not self.strides:
            raise ValueError("seanet.strides must name at least one stride")
        at_least(
            1,
            seanet__num_filters=self.num_filters,
            seanet__strides=self.strides,
            seanet__dimension=self.dimension,
            seanet__semantic_dimension=self.semantic_dimension,
            seanet__dilation_base=self.dilation_base,
            seanet__residual_kernel_size=self.residual_kernel_size,
            seanet__num_residual_layers=self.num_residual_layers,
        )
        at_least(0, seanet__num_lstm_layers=self.num_lstm_layers)
        one_of(("elu", "snake"), seanet__activation=self.activation)

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.strides)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectralConfig:
    """Frame-rate networks: a ConvNeXt encoder of log-mel frames, a Vocos decoder (2306.00814)."""

    num_mels: int = 100
    """Mel bins of the encoder's input."""
    window: int = 640
    """Samples of the STFT window, in encoder and decoder."""
    hop: int = 160
    """Samples between mel frames."""
    strides: tuple[int, ...] = (2, 2)
    """Downsampling of mel frames to codec frames."""
    encoder_width: int = 256
    """Channels of the encoder's ConvNeXt blocks."""
    encoder_depths: tuple[int, ...] = (3, 3, 3)
    """Blocks before the first stride, between strides, and after the last."""
    dimension: int = 256
    """Features D of the latent."""
    decoder_width: int = 320
    """Channels of the decoder's ConvNeXt blocks."""
    decoder_depths: tuple[int, ...] = (4, 4, 4)
    """Blocks at the codec's frame rate, between upsamplings, and at the mel frame rate."""
    kernel_size: int = 7
    """Kernel size of a block's depthwise convolution, in frames."""

    def __post_init__(self) -> None:
        at_least(
            1,
            spectral__num_mels=self.num_mels,
            spectral__hop=self.hop,
            spectral__strides=self.strides,
            spectral__encoder_width=self.encoder_width,
            spectral__dimension=self.dimension,
            spectral__decoder_width=self.decoder_width,
        )
        _check_odd("spectral.kernel_size", self.kernel_size)
        _check_depths("spectral", "encoder_depths", self.encoder_depths, len(self.strides))
        _check_depths("spectral", "decoder_depths", self.decoder_depths, len(self.strides))
        _check_stft("spectral", self.window, self.hop)

    @property
    def hop_length(self) -> int:
        """Samples per codec frame."""
        return self.hop * prod(self.strides)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvConfig:
    """Convolutions on the wave with Snake, as in DAC (arXiv 2306.06546, appendix A)."""

    width: int = 32
    """Channels of the encoders' first convolution; each stride doubles them."""
    semantic_width: int = 0
    """Channels of the semantic encoder's first convolution; 0: width."""
    strides: tuple[int, ...] = (4, 5, 6, 8, 2)
    """Downsampling factors of the encoders, first to last."""
    decoder_width: int = 1536
    """Channels of the decoder's first convolution; each stride halves them."""
    decoder_strides: tuple[int, ...] = ()
    """Upsampling factors of the decoder, first to last; empty: strides reversed."""
    dilations: tuple[int, ...] = (1, 3, 9)
    """Dilations of the residual units of every stride."""
    kernel_size: int = 7
    """Kernel size of a residual unit's dilated convolution."""

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
        _check_halvings("lmspt.conv.decoder_width", self.decoder_width, self.upsampling)
        _check_odd("lmspt.conv.kernel_size", self.kernel_size)

    @property
    def upsampling(self) -> tuple[int, ...]:
        """Upsampling factors of the decoder, first to last."""
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
    """Transformer after each encoder (2506.16738, first version, appendix D: 8 layers of 512)."""

    num_layers: int = 0
    """Layers; 0: no Transformer."""
    num_heads: int = 8
    """Attention heads; must divide lmspt.dimension."""
    context: int = 250
    """Frames that a frame attends to on each side (with lmspt.causal: only before it)."""

    def __post_init__(self) -> None:
        at_least(0, lmspt__transformer__num_layers=self.num_layers)
        at_least(
            1,
            lmspt__transformer__num_heads=self.num_heads,
            lmspt__transformer__context=self.context,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WhisperConfig:
    """A frozen Whisper encoder as the semantic encoder, and its trained ConvNeXt adapter.

    recipes/train_semantic.py sets the first five keys from the Whisper model."""

    width: int = 384
    """Size of Whisper's hidden states (tiny 384, base 512)."""
    num_layers: int = 4
    """Transformer layers of its encoder (tiny 4, base 6)."""
    num_heads: int = 6
    """Attention heads per layer (tiny 6, base 8)."""
    feedforward: int = 1536
    """Inner size of the feed-forward layers (tiny 1536, base 2048)."""
    num_mels: int = 80
    """Mel bins of its input."""
    adapter_width: int = 256
    """Channels of the adapter's ConvNeXt blocks."""
    adapter_depth: int = 2
    """Number of the adapter's ConvNeXt blocks."""

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
                f"lmspt.whisper.num_heads: {self.num_heads} does not divide width {self.width}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxiliaryConfig:
    """Auxiliary decoder of the semantic codebook alone, used in training only (LM-SPT)."""

    kind: Literal["none", "conv", "spectral"] = "spectral"
    """Transposed convolutions, Vocos, or no auxiliary decoder (released codecs)."""
    sample_rate: int = 16_000
    """Sample rate of its output in Hz: the teacher's."""
    width: int = 192
    """Channels of the first convolution (conv) or of the ConvNeXt blocks (spectral)."""
    strides: tuple[int, ...] = (2, 2)
    """Upsampling factors, first to last; conv: to samples, spectral: to STFT frames."""
    depths: tuple[int, ...] = (1, 1, 1)
    """spectral: ConvNeXt blocks before, between, and after the upsamplings."""
    window: int = 640
    """spectral: samples of the STFT window."""
    hop: int = 160
    """spectral: samples between STFT frames."""
    dilations: tuple[int, ...] = (1, 3, 9)
    """conv: dilations of the residual units of every stride."""
    kernel_size: int = 7
    """conv: of a residual unit's dilated convolution; spectral: of a block, in frames."""
    causal: bool = False
    """conv: causal convolutions."""

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
        _check_odd("lmspt.auxiliary.kernel_size", self.kernel_size)
        if self.kind == "conv":
            at_least(least_stride(self.causal), lmspt__auxiliary__strides=self.strides)
            _check_halvings("lmspt.auxiliary.width", self.width, self.strides)
        if self.kind == "spectral":
            if self.causal:
                raise ValueError("lmspt.auxiliary.causal needs kind conv: Vocos is not causal")
            _check_depths("lmspt.auxiliary", "depths", self.depths, len(self.strides))
            _check_stft("lmspt.auxiliary", self.window, self.hop)

    @property
    def hop_length(self) -> int:
        """Samples per codec frame."""
        return prod(self.strides) * (self.hop if self.kind == "spectral" else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LMSPTConfig:
    """LM-SPT (arXiv 2506.16738): semantic and acoustic encoder, split quantizer, one decoder."""

    encoder: Literal["conv", "spectral"] = "spectral"
    """Convolutions on the wave (lmspt.conv) or ConvNeXt on mel frames (spectral)."""
    decoder: Literal["conv", "spectral"] = "spectral"
    """Transposed convolutions (lmspt.conv) or Vocos (spectral)."""
    semantic: Literal["own", "whisper"] = "own"
    """The semantic encoder: of the same kind as the acoustic one, or a pretrained Whisper encoder
    (lmspt.whisper) as in GLM-4-Voice (arXiv 2412.02612, section 3.1), for waves at 16 kHz."""
    dimension: int = 256
    """Features D of the latents; spectral.dimension is ignored."""
    shared_encoder: bool = False
    """Both quantizers use the latent of one encoder."""
    semantic_subtraction: bool = True
    """The acoustic codebooks quantize the acoustic latent less the semantic entry (released code),
    or the acoustic latent itself, in parallel (first version of the paper)."""
    causal: bool = False
    """Causal convolutions and causal attention."""
    conv: ConvConfig = field(default_factory=ConvConfig)
    """Used if encoder or decoder is conv."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """Transformer after each encoder that is not Whisper."""
    whisper: WhisperConfig = field(default_factory=WhisperConfig)
    """Used if semantic is whisper."""
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)
    """Auxiliary decoder, for training."""

    def __post_init__(self) -> None:
        one_of(("conv", "spectral"), lmspt__encoder=self.encoder, lmspt__decoder=self.decoder)
        one_of(("own", "whisper"), lmspt__semantic=self.semantic)
        if self.semantic == "whisper" and (self.shared_encoder or self.causal):
            raise ValueError(
                "lmspt.semantic whisper is a separate encoder and is not causal: do not set "
                "lmspt.shared_encoder or lmspt.causal"
            )
        at_least(1, lmspt__dimension=self.dimension)
        if self.causal and "spectral" in (self.encoder, self.decoder):
            raise ValueError(
                "lmspt.causal needs encoder conv and decoder conv: spectral is not causal"
            )
        at_least(
            least_stride(self.causal),
            lmspt__conv__strides=self.conv.strides,
            lmspt__conv__decoder_strides=self.conv.decoder_strides,
        )
        heads = self.transformer.num_heads
        if self.transformer.num_layers and (self.dimension % heads or self.dimension // heads % 2):
            raise ValueError(
                f"lmspt.transformer.num_heads: lmspt.dimension {self.dimension} is not an even "
                f"number of features for each of {heads} heads"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizerConfig:
    """Residual vector quantizer (SoundStream, arXiv 2107.03312, section III.C)."""

    num_codebooks: int = 8
    """Q."""
    codebook_size: int = 1024
    """K of every codebook."""
    codebook_sizes: tuple[int, ...] = ()
    """K of each codebook if they differ; empty: codebook_size."""
    codebook_dimension: int = 0
    """Features of the entries, with projections from and to the latent (factorized codes of DAC,
    arXiv 2306.06546, section 3.2); 0: those of the latent, without projections."""
    codebook_dimensions: tuple[int, ...] = ()
    """Features of each codebook if they differ; empty: codebook_dimension."""
    normalize: bool = False
    """L2-normalized lookup: nearest by cosine similarity."""
    learning: Literal["ema", "gradient"] = "ema"
    """Entries are updated by moving averages, or by the gradient of losses.weights.codebook."""
    decay: float = 0.99
    """Decay of the EMA statistics per training step."""
    kmeans_iterations: int = 10
    """k-means (Lloyd) iterations of the initialization on the first batch (SpeechTokenizer: 50).
    With 0, ema starts from vectors of that batch and gradient from a normal distribution."""
    kmeans_samples: int = 16_384
    """Maximum number of vectors for the initialization."""
    revival_ratio: float = 0.1
    """Dead-code revival: an entry used less than this share of the mean is replaced by a vector of
    the batch; 0: never. SpeechTokenizer's absolute threshold of 2 per batch would replace most
    entries in small batches."""
    dropout: float = 0.0
    """Quantizer dropout: share of a batch's items that keep only a random number of the first
    codebooks. In LM-SPT it applies to the acoustic codebooks only."""

    def __post_init__(self) -> None:
        sizes = (self.codebook_size, *self.codebook_sizes)
        is_count = 1 <= self.num_codebooks <= MAX_CODEBOOKS
        if not is_count or not all(2 <= size <= 65_536 for size in sizes):
            raise ValueError(
                f"quantizer: num_codebooks must be at least 1 and at most {MAX_CODEBOOKS}, "
                "codebook_size and codebook_sizes between 2 and 65536, got "
                f"{self.num_codebooks} and {sizes}"
            )
        for name in ("codebook_sizes", "codebook_dimensions"):
            if getattr(self, name) and len(getattr(self, name)) != self.num_codebooks:
                raise ValueError(
                    f"quantizer.{name} needs one number for each of the {self.num_codebooks} "
                    f"codebooks, got {getattr(self, name)}"
                )
        at_least(0, quantizer__codebook_dimension=self.codebook_dimension)
        if self.codebook_dimensions:
            at_least(1, quantizer__codebook_dimensions=self.codebook_dimensions)
        at_least(
            0,
            quantizer__kmeans_iterations=self.kmeans_iterations,
            quantizer__revival_ratio=self.revival_ratio,
        )
        at_least(1, quantizer__kmeans_samples=self.kmeans_samples)
        one_of(("ema", "gradient"), quantizer__learning=self.learning)
        if not 0 <= self.dropout <= 1 or not 0 < self.decay < 1:
            raise ValueError("quantizer.dropout must lie in [0, 1] and quantizer.decay in (0, 1)")

    @property
    def sizes(self) -> tuple[int, ...]:
        """K of each codebook."""
        return self.codebook_sizes or (self.codebook_size,) * self.num_codebooks

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Features of each codebook's entries; 0: those of the latent."""
        return self.codebook_dimensions or (self.codebook_dimension,) * self.num_codebooks


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecConfig:
    """Architecture of a codec: everything that its weights depend on."""

    family: Family = "spectral"
    """Encoder and decoder: seanet (SpeechTokenizer), spectral (Vocos) or lmspt (LM-SPT)."""
    sample_rate: int = 16_000
    """Sample rate in Hz."""
    seanet: SEANetConfig = field(default_factory=SEANetConfig)
    """Used if family is seanet."""
    spectral: SpectralConfig = field(default_factory=SpectralConfig)
    """Used if family is spectral, or if lmspt has spectral networks."""
    lmspt: LMSPTConfig = field(default_factory=LMSPTConfig)
    """Used if family is lmspt."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """Codebooks."""

    def __post_init__(self) -> None:
        one_of(get_args(Family), family=self.family)
        at_least(1, sample_rate=self.sample_rate)
        if self.family == "lmspt":
            self._check_lmspt()

    def _check_lmspt(self) -> None:
        lmspt = self.lmspt
        if self.quantizer.num_codebooks < 2:
            raise ValueError(
                "quantizer.num_codebooks must be at least 2 for LM-SPT: one semantic codebook and "
                "at least one acoustic codebook"
            )
        hops = {"encoder": lmspt.conv.hop_length, "decoder": lmspt.conv.decoder_hop_length}
        for name in hops:
            if getattr(lmspt, name) == "spectral":
                hops[name] = self.spectral.hop_length
        if hops["encoder"] != hops["decoder"]:
            raise ValueError(
                f"lmspt: the encoder has {hops['encoder']} samples per frame, the decoder "
                f"{hops['decoder']}; their strides must agree"
            )
        if lmspt.semantic == "whisper" and (
            self.sample_rate != WHISPER_RATE or hops["encoder"] % WHISPER_HOP
        ):
            raise ValueError(
                f"lmspt.semantic whisper needs sample_rate {WHISPER_RATE} and a multiple of "
                f"{WHISPER_HOP} samples per frame, got {self.sample_rate} and {hops['encoder']}"
            )
        auxiliary = lmspt.auxiliary
        if auxiliary.kind != "none":
            rate = auxiliary.sample_rate
            if auxiliary.hop_length * self.sample_rate != hops["encoder"] * rate:
                raise ValueError(
                    f"lmspt.auxiliary: its frames ({auxiliary.hop_length} samples at {rate} Hz) "
                    f"must be as long as the codec's ({hops['encoder']} samples at "
                    f"{self.sample_rate} Hz)"
                )

    @property
    def hop_length(self) -> int:
        """Samples per codec frame."""
        if self.family == "lmspt":
            spectral = self.lmspt.encoder == "spectral"
            return self.spectral.hop_length if spectral else self.lmspt.conv.hop_length
        return (self.seanet if self.family == "seanet" else self.spectral).hop_length

    @property
    def dimension(self) -> int:
        """Features D of the latent and of codebook entries."""
        return {"seanet": self.seanet, "spectral": self.spectral, "lmspt": self.lmspt}[
            self.family
        ].dimension


def codec_config_from_dict(data: dict[str, Any]) -> CodecConfig:
    """The inverse of `dataclasses.asdict`. Raises `ValueError` for unknown or ill-typed keys."""
    return _from_dict(CodecConfig, data, "config")


def _from_dict(cls: type[C], data: dict[str, Any], where: str) -> C:
    hints = get_type_hints(cls)
    if unknown := sorted(set(data) - set(hints)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {sorted(hints)}")
    values = {}
    for name, value in data.items():
        if is_dataclass(hints[name]) and isinstance(value, dict):
            values[name] = _from_dict(cast(type, hints[name]), value, f"{where}.{name}")
            continue
        values[name] = tuple(value) if isinstance(value, list) else value
        if not fits_type(values[name], hints[name]):
            raise ValueError(f"{where}.{name}: {value!r} is not of type {hints[name]}")
    return cls(**values)
