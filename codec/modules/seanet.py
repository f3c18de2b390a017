"""Encoder and decoder of SpeechTokenizer (arXiv 2308.16692) and DM-Codec: SEANet with LSTMs."""

from jaxtyping import Float
from torch import Tensor, nn

from codec.config import SEANetConfig
from codec.modules.layers import (
    Lengths,
    PaddedConv1d,
    PaddedConvTranspose1d,
    ResidualUnit,
    SkipLSTM,
    activation,
    ceil_div,
)

EDGE_KERNEL = 7


class SEANetEncoder(nn.Module):
    """wave (B,1,S) -> latent (B,D,T), T = ceil(S / hop_length)."""

    def __init__(self, config: SEANetConfig) -> None:
        super().__init__()
        channels = config.num_filters
        self.conv_in = PaddedConv1d(1, channels, EDGE_KERNEL)
        self.stages = nn.ModuleList()
        for stride in reversed(config.strides):
            self.stages.append(_EncoderStage(config, channels, stride))
            channels *= 2
        self.lstm = (
            SkipLSTM(
                channels, num_layers=config.num_lstm_layers, bidirectional=config.bidirectional
            )
            if config.num_lstm_layers
            else None
        )
        if self.lstm is not None and config.bidirectional:
            channels *= 2
        self.activation = activation(config.activation, channels)
        self.conv_out = PaddedConv1d(channels, config.dimension, EDGE_KERNEL)

    def forward(
        self, wave: Float[Tensor, "B 1 S"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B D T"]:
        x = self.conv_in(wave, lengths)
        for stage in self.stages:
            assert isinstance(stage, _EncoderStage)
            x = stage(x, lengths)
            lengths = None if lengths is None else ceil_div(lengths, stage.down.stride)
        if self.lstm is not None:
            x = self.lstm(x, lengths)
        return self.conv_out(self.activation(x), lengths)


class SEANetDecoder(nn.Module):
    """quantized (B,D,T) -> wave (B,1,T * hop_length); its LSTM is causal."""

    def __init__(self, config: SEANetConfig) -> None:
        super().__init__()
        channels = config.num_filters * 2 ** len(config.strides)
        self.conv_in = PaddedConv1d(config.dimension, channels, EDGE_KERNEL)
        self.lstm = (
            SkipLSTM(channels, num_layers=config.num_lstm_layers, bidirectional=False)
            if config.num_lstm_layers
            else None
        )
        self.stages = nn.ModuleList()
        for stride in config.strides:
            self.stages.append(_DecoderStage(config, channels, stride))
            channels //= 2
        self.activation = activation(config.activation, channels)
        self.conv_out = PaddedConv1d(channels, 1, EDGE_KERNEL)

    def forward(
        self, quantized: Float[Tensor, "B D T"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B 1 S"]:
        x = self.conv_in(quantized, lengths)
        if self.lstm is not None:
            x = self.lstm(x, lengths)
        for stage in self.stages:
            assert isinstance(stage, _DecoderStage)
            x = stage(x, lengths)
            lengths = None if lengths is None else lengths * stage.up.stride
        return self.conv_out(self.activation(x), lengths)


def _residual_units(config: SEANetConfig, channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResidualUnit(
            channels,
            kernel=config.residual_kernel_size,
            dilation=config.dilation_base**layer,
            nonlinearity=config.activation,
        )
        for layer in range(config.num_residual_layers)
    )


class _EncoderStage(nn.Module):
    """Residual units, activation, and a strided convolution."""

    def __init__(self, config: SEANetConfig, channels: int, stride: int) -> None:
        super().__init__()
        self.units = _residual_units(config, channels)
        self.activation = activation(config.activation, channels)
        self.down = PaddedConv1d(channels, 2 * channels, 2 * stride, stride=stride)

    def forward(self, x: Tensor, lengths: Lengths | None) -> Tensor:
        for unit in self.units:
            x = unit(x, lengths)
        return self.down(self.activation(x), lengths)


class _DecoderStage(nn.Module):
    """Activation, upsampling by `stride`, residual units."""

    def __init__(self, config: SEANetConfig, channels: int, stride: int) -> None:
        super().__init__()
        self.activation = activation(config.activation, channels)
        self.up = PaddedConvTranspose1d(channels, channels // 2, stride)
        self.units = _residual_units(config, channels // 2)

    def forward(self, x: Tensor, lengths: Lengths | None) -> Tensor:
        x = self.up(self.activation(x), lengths)
        lengths = None if lengths is None else lengths * self.up.stride
        for unit in self.units:
            x = unit(x, lengths)
        return x


def semantic_head(dimension: int, semantic_dimension: int) -> nn.Module:
    """Projection of codebook 1 to the features of a semantic teacher, for distillation."""
    if dimension == semantic_dimension:
        return nn.Identity()
    return nn.Linear(dimension, semantic_dimension)
