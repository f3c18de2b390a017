"""Frozen configurations of the architecture. No config library here."""

from dataclasses import dataclass, field, is_dataclass
from math import prod
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from codec.checks import at_least, one_of
from codec.lmspt_config import LMSPTConfig

C = TypeVar("C")


Family = Literal["seanet", "spectral", "lmspt"]
WHISPER_RATE, WHISPER_HOP = 16_000, 320


@dataclass(frozen=True, kw_only=True, slots=True)
class SEANetConfig:
    """SpeechTokenizer's and DM-Codec's encoder and decoder (arXiv 2308.16692, section 3.1)."""

    num_filters: int = 64
    """Channels of the first convolution; each stride doubles them."""
    strides: tuple[int, ...] = (8, 5, 4, 2)
    """Upsampling factors of the decoder; the encoder uses them in reverse."""
    dimension: int = 1024
    """Features D of the latent."""
    semantic_dimension: int = 768
    """Width that codebook 1 is projected to for a semantic teacher."""
    bidirectional: bool = True
    """LSTM of the encoder in both directions; the decoder's is always causal."""
    dilation_base: int = 2
    """Residual layer i is dilated by this to the power i."""
    residual_kernel_size: int = 3
    """Samples of a residual unit's dilated convolution."""
    num_residual_layers: int = 1
    """Residual units per stride."""
    num_lstm_layers: int = 2
    """LSTM layers; 0 leaves the LSTM out."""
    activation: Literal["elu", "snake"] = "elu"
    """Nonlinearity; Snake is AnyGPT's variant of the released model."""

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
    """Frame-rate networks: ConvNeXt on log-mel frames in, Vocos (arXiv 2306.00814) out."""

    num_mels: int = 100
    """Mel bins that the encoder hears."""
    window: int = 640
    """Samples of the STFT window, in and out."""
    hop: int = 160
    """Samples between mel frames."""
    strides: tuple[int, ...] = (2, 2)
    """Downsampling of mel frames to codec frames."""
    encoder_width: int = 256
    """Channels of the encoder's ConvNeXt blocks."""
    encoder_depths: tuple[int, ...] = (3, 3, 3)
    """Blocks before the first stride, between strides and after the last."""
    dimension: int = 256
    """Features D of the latent."""
    decoder_width: int = 320
    """Channels of the decoder's ConvNeXt blocks."""
    decoder_depths: tuple[int, ...] = (4, 4, 4)
    """Blocks at the codec's rate, between upsamplings and at the mel rate."""
    kernel_size: int = 7
    """Frames of a block's depthwise convolution."""

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
        at_least(
            0,
            spectral__encoder_depths=self.encoder_depths,
            spectral__decoder_depths=self.decoder_depths,
        )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"spectral.kernel_size must be odd, got {self.kernel_size}")
        for name, depths in (("encoder", self.encoder_depths), ("decoder", self.decoder_depths)):
            if len(depths) != len(self.strides) + 1:
                raise ValueError(
                    f"spectral.{name}_depths needs {len(self.strides) + 1} numbers (one more than "
                    f"spectral.strides), got {depths}"
                )
        if (self.window - self.hop) % 2 or self.window < 2 * self.hop:
            raise ValueError(
                f"spectral.window must be at least twice spectral.hop and differ from it by an "
                f"even number, got {self.window} and {self.hop}"
            )

    @property
    def hop_length(self) -> int:
        """Samples per codec frame."""
        return self.hop * prod(self.strides)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizerConfig:
    """Residual vector quantiser with EMA codebooks (arXiv 2107.03312, section III.C)."""

    num_codebooks: int = 8
    """Q."""
    codebook_size: int = 1024
    """K of every codebook."""
    codebook_sizes: tuple[int, ...] = ()
    """K of each codebook where they differ; empty: codebook_size."""
    codebook_dimension: int = 0
    """Features in which entries are looked up, the latent projected to them and back (factorised
    codes, arXiv 2306.06546, section 3.2); 0: the latent's own, without projections."""
    codebook_dimensions: tuple[int, ...] = ()
    """Features of each codebook where they differ; empty: codebook_dimension."""
    normalize: bool = False
    """Entries are compared by direction alone (L2-normalised lookup)."""
    learning: Literal["ema", "gradient"] = "ema"
    """Entries follow the vectors' moving average, or the gradient of losses.weights.codebook."""
    decay: float = 0.99
    """Of the EMA statistics, per training step."""
    kmeans_iterations: int = 10
    """Lloyd iterations of the initialisation on the first batch (SpeechTokenizer: 50). With 0,
    ema starts from vectors of that batch and gradient from normally distributed entries."""
    kmeans_samples: int = 16_384
    """Vectors at most that the initialisation looks at."""
    revival_ratio: float = 0.1
    """An entry used less than this share of the mean is moved onto a vector of the batch; 0: never.

    SpeechTokenizer's absolute threshold of 2 a batch would revive most entries of small batches.
    """
    dropout: float = 0.0
    """Share of a training batch's items that keep a random number of first codebooks only. LM-SPT
    always keeps the semantic codebook: there it is of the acoustic ones."""

    def __post_init__(self) -> None:
        sizes = (self.codebook_size, *self.codebook_sizes)
        if self.num_codebooks < 1 or not all(2 <= size <= 65_536 for size in sizes):
            raise ValueError(
                "quantizer: num_codebooks must be at least 1, codebook_size and codebook_sizes "
                f"between 2 and 65536, got {self.num_codebooks} and {sizes}"
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
        """Features of each codebook's lookup, 0 for the latent's own."""
        return self.codebook_dimensions or (self.codebook_dimension,) * self.num_codebooks


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecConfig:
    """Architecture of one codec: everything that its weights depend on."""

    family: Family = "spectral"
    """Which networks surround the quantiser."""
    sample_rate: int = 16_000
    """Hz."""
    seanet: SEANetConfig = field(default_factory=SEANetConfig)
    """Read when family is seanet."""
    spectral: SpectralConfig = field(default_factory=SpectralConfig)
    """Read when family is spectral, or where lmspt names spectral networks."""
    lmspt: LMSPTConfig = field(default_factory=LMSPTConfig)
    """Read when family is lmspt."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """The codebooks."""

    def __post_init__(self) -> None:
        one_of(get_args(Family), family=self.family)
        at_least(1, sample_rate=self.sample_rate)
        if self.family == "lmspt":
            self._check_lmspt()

    def _check_lmspt(self) -> None:
        lmspt = self.lmspt
        if self.quantizer.num_codebooks < 2:
            raise ValueError("quantizer.num_codebooks: LM-SPT has a semantic and acoustic ones")
        hops = {
            "encoder": lmspt.conv.hop_length,
            "decoder": lmspt.conv.decoder_hop_length,
        }
        for name in hops:
            if getattr(lmspt, name) == "spectral":
                hops[name] = self.spectral.hop_length
        if hops["encoder"] != hops["decoder"]:
            raise ValueError(
                f"lmspt: the encoder's frames have {hops['encoder']} samples, the decoder's "
                f"{hops['decoder']}; their strides must agree"
            )
        if lmspt.semantic == "whisper" and (
            self.sample_rate != WHISPER_RATE or hops["encoder"] % WHISPER_HOP
        ):
            raise ValueError(
                f"lmspt.semantic whisper: Whisper hears {WHISPER_RATE} Hz and has a feature each "
                f"{WHISPER_HOP} samples; sample_rate {self.sample_rate} and frames of "
                f"{hops['encoder']} samples do not fit"
            )
        auxiliary = lmspt.auxiliary
        if auxiliary.kind != "none":
            exact = auxiliary.hop_length * self.sample_rate == hops["encoder"] * (
                auxiliary.sample_rate
            )
            if not exact:
                raise ValueError(
                    f"lmspt.auxiliary: {auxiliary.hop_length} samples a frame at "
                    f"{auxiliary.sample_rate} Hz are not as long as {hops['encoder']} at "
                    f"{self.sample_rate} Hz"
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
    """The inverse of `dataclasses.asdict`, with a `ValueError` for unknown keys."""
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
        if not _fits(values[name], hints[name]):
            raise ValueError(f"{where}.{name}: {value!r} is not a {hints[name]}")
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has the type that a field of CodecConfig asks for."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(each, get_args(hint)[0]) for each in value)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kinds = (int, float) if hint is float else hint
    # A boolean is an int to Python, and to nobody else.
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
