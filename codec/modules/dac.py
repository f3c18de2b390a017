"""Encoder and decoder of DAC (arXiv 2306.06546, appendix A), which the released LM-SPT also has."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from codec.modules.layers import (
    Lengths,
    Snake,
    ZeroPaddedConv1d,
    ZeroPaddedConvTranspose1d,
    length_mask,
)

EDGE_KERNEL, LATENT_KERNEL = 7, 3


class ConvEncoder(nn.Module):
    """wave (B,1,S) -> latent (B,D,T), T = S / product of strides if that is an integer.

    For other lengths the last frame may be missing (see `ZeroPaddedConv1d`): pad the wave first.
    """

    def __init__(
        self,
        width: int,
        strides: tuple[int, ...],
        dimension: int,
        *,
        dilations: tuple[int, ...] = (1, 3, 9),
        kernel: int = 7,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.embed = ZeroPaddedConv1d(1, width, EDGE_KERNEL, causal=causal)
        self.stages = nn.ModuleList(
            _Down(width * 2**index, stride, dilations, kernel, causal)
            for index, stride in enumerate(strides)
        )
        width *= 2 ** len(strides)
        self.activation = Snake(width)
        self.project = ZeroPaddedConv1d(width, dimension, LATENT_KERNEL, causal=causal)

    def forward(
        self, wave: Float[Tensor, "B 1 S"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B D T"]:
        x = self.embed(wave, lengths)
        for stage in self.stages:
            assert isinstance(stage, _Down)
            x = stage(x, lengths)
            lengths = stage.down.out_lengths(lengths)
        return self.project(self.activation(x), lengths)


class ConvDecoder(nn.Module):
    """quantized (B,D,T) -> wave (B,1,S) in [-1, 1], S = T * product of strides.

    With odd strides the last few samples of the last frame are zeros (4 of 1920 in the released
    LM-SPT).
    """

    def __init__(
        self,
        dimension: int,
        width: int,
        strides: tuple[int, ...],
        *,
        dilations: tuple[int, ...] = (1, 3, 9),
        kernel: int = 7,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.hop_length = torch.Size(strides).numel()
        self.embed = ZeroPaddedConv1d(dimension, width, EDGE_KERNEL, causal=causal)
        self.stages = nn.ModuleList(
            _Up(width // 2**index, stride, dilations, kernel, causal)
            for index, stride in enumerate(strides)
        )
        width //= 2 ** len(strides)
        self.activation = Snake(width)
        self.project = ZeroPaddedConv1d(width, 1, EDGE_KERNEL, causal=causal)

    def forward(
        self, quantized: Float[Tensor, "B D T"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B 1 S"]:
        x = self.embed(quantized, lengths)
        for stage in self.stages:
            assert isinstance(stage, _Up)
            x = stage(x, lengths)
            lengths = stage.up.out_lengths(lengths)
        wave = self.project(self.activation(x), lengths).tanh()
        if lengths is not None:
            wave = wave * length_mask(lengths, wave.shape[-1])
        return functional.pad(wave, (0, quantized.shape[-1] * self.hop_length - wave.shape[-1]))


class ResidualConv(nn.Module):
    """Snake, dilated convolution, Snake, pointwise convolution, plus the input."""

    def __init__(self, channels: int, *, kernel: int, dilation: int, causal: bool) -> None:
        super().__init__()
        self.activation_in, self.activation_out = Snake(channels), Snake(channels)
        self.conv_in = ZeroPaddedConv1d(
            channels, channels, kernel, dilation=dilation, causal=causal
        )
        self.conv_out = ZeroPaddedConv1d(channels, channels, 1, causal=causal)

    def forward(
        self, x: Float[Tensor, "B C S"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B C S"]:
        hidden = self.conv_in(self.activation_in(x), lengths)
        return x + self.conv_out(self.activation_out(hidden))


class _Down(nn.Module):
    def __init__(
        self, channels: int, stride: int, dilations: tuple[int, ...], kernel: int, causal: bool
    ) -> None:
        super().__init__()
        self.units = _units(channels, dilations, kernel, causal)
        self.activation = Snake(channels)
        self.down = ZeroPaddedConv1d(
            channels, 2 * channels, 2 * stride, stride=stride, causal=causal
        )

    def forward(self, x: Tensor, lengths: Lengths | None) -> Tensor:
        for unit in self.units:
            x = unit(x, lengths)
        return self.down(self.activation(x), lengths)


class _Up(nn.Module):
    def __init__(
        self, channels: int, stride: int, dilations: tuple[int, ...], kernel: int, causal: bool
    ) -> None:
        super().__init__()
        self.activation = Snake(channels)
        self.up = ZeroPaddedConvTranspose1d(channels, channels // 2, stride, causal=causal)
        self.units = _units(channels // 2, dilations, kernel, causal)

    def forward(self, x: Tensor, lengths: Lengths | None) -> Tensor:
        x = self.up(self.activation(x), lengths)
        lengths = self.up.out_lengths(lengths)
        for unit in self.units:
            x = unit(x, lengths)
        return x


def _units(channels: int, dilations: tuple[int, ...], kernel: int, causal: bool) -> nn.ModuleList:
    return nn.ModuleList(
        ResidualConv(channels, kernel=kernel, dilation=dilation, causal=causal)
        for dilation in dilations
    )
