"""Building blocks: convolutions that know lengths, residual units, Snake, LSTM, ConvNeXt blocks."""

from typing import TypeVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

Lengths = Int[Tensor, " B"]
Integers = TypeVar("Integers", int, Tensor)


def length_mask(lengths: Lengths, size: int) -> Float[Tensor, "B 1 T"]:
    """1 where a position lies inside its item, 0 in its padding."""
    inside = torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)
    return inside.unsqueeze(1).float()


def ceil_div(a: Integers, b: int) -> Integers:
    """The quotient rounded up, of integers or integer tensors."""
    return -(-a // b)


def reflect_pad(
    x: Float[Tensor, "B C S"], left: int, right: int, stride: int, lengths: Lengths | None = None
) -> Float[Tensor, "B C P"]:
    """Reflect both ends of every item at its own length, completing its last stride.

    An item too short to be reflected is first extended with zeros, as EnCodec does. What lies
    beyond an item's own padding is undefined.
    """
    size = x.shape[-1]
    if lengths is None:
        right += -size % stride
        short = max(0, max(left, right) + 1 - size)
        padded = functional.pad(functional.pad(x, (0, short)), (left, right), mode="reflect")
        return padded[..., : size + left + right]
    shortest = (right + -lengths % stride).clamp(min=left) + 1
    last = (torch.maximum(lengths, shortest) - 1).unsqueeze(1)
    extended = functional.pad(x * length_mask(lengths, size), (0, left + right + stride))
    position = torch.arange(-left, size + right + stride - 1, device=x.device).abs().unsqueeze(0)
    position = torch.where(position > last, 2 * last - position, position).clamp(min=0)
    return extended.gather(-1, position.unsqueeze(1).expand(-1, x.shape[1], -1))


class PaddedConv1d(nn.Module):
    """Weight-normed convolution whose output has ceil(S / stride) frames, padded by reflection.

    Source: SEANet as in EnCodec (arXiv 2210.13438, section 3.1), non-causal.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (kernel - 1) * dilation + 1 - stride
        self.conv = weight_norm(
            nn.Conv1d(channels_in, channels_out, kernel, stride=stride, dilation=dilation)
        )

    def forward(
        self, x: Float[Tensor, "B C S"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B D T"]:
        right = self.padding // 2
        padded = reflect_pad(x, self.padding - right, right, self.stride, lengths)
        return self.conv(padded)[..., : ceil_div(x.shape[-1], self.stride)]


class PaddedConvTranspose1d(nn.Module):
    """Weight-normed transposed convolution of kernel 2 strides: T frames to T * stride samples."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = weight_norm(
            nn.ConvTranspose1d(channels_in, channels_out, 2 * stride, stride=stride)
        )

    def forward(
        self, x: Float[Tensor, "B C T"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B D S"]:
        if lengths is not None:
            x = x * length_mask(lengths, x.shape[-1])
        y = self.conv(x)
        left = self.stride - self.stride // 2
        return y[..., left : left + x.shape[-1] * self.stride]


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha with one alpha per channel (arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Float[Tensor, "B C S"]) -> Float[Tensor, "B C S"]:
        return x + (self.alpha * x).sin().square() / (self.alpha + 1e-9)


def activation(name: str, channels: int) -> nn.Module:
    """`elu` or `snake`."""
    return nn.ELU() if name == "elu" else Snake(channels)


class ResidualUnit(nn.Module):
    """Activation, dilated convolution, activation, pointwise convolution, plus a 1x1 shortcut."""

    def __init__(self, channels: int, *, kernel: int, dilation: int, nonlinearity: str) -> None:
        super().__init__()
        hidden = channels // 2
        self.activation_in = activation(nonlinearity, channels)
        self.conv_in = PaddedConv1d(channels, hidden, kernel, dilation=dilation)
        self.activation_out = activation(nonlinearity, hidden)
        self.conv_out = PaddedConv1d(hidden, channels, 1)
        self.shortcut = PaddedConv1d(channels, channels, 1)

    def forward(
        self, x: Float[Tensor, "B C S"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B C S"]:
        hidden = self.conv_in(self.activation_in(x), lengths)
        return self.shortcut(x, lengths) + self.conv_out(self.activation_out(hidden), lengths)


class SkipLSTM(nn.Module):
    """LSTM over frames with a skip connection; both directions double the channels."""

    def __init__(self, channels: int, *, num_layers: int, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.lstm = nn.LSTM(
            channels, channels, num_layers, batch_first=True, bidirectional=bidirectional
        )

    def forward(
        self, x: Float[Tensor, "B C T"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B D T"]:
        frames = rearrange(x, "b c t -> b t c")
        if lengths is None or not self.bidirectional:
            y, _ = self.lstm(frames)
        else:
            packed = nn.utils.rnn.pack_padded_sequence(
                frames, lengths.cpu(), batch_first=True, enforce_sorted=False
            )
            y, _ = nn.utils.rnn.pad_packed_sequence(
                self.lstm(packed)[0], batch_first=True, total_length=frames.shape[1]
            )
        skip = x.repeat(1, 2, 1) if self.bidirectional else x
        return rearrange(y, "b t c -> b c t") + skip


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B C T"]:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution and a pointwise MLP with a scaled residual (arXiv 2201.03545, 1-D).

    `mask` (B,1,T) is 0 in padding; with it every item comes out as it does alone.
    """

    def __init__(self, channels: int, *, kernel: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.widen = nn.Linear(channels, 3 * channels)
        self.narrow = nn.Linear(3 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(
        self, x: Float[Tensor, "B C T"], mask: Float[Tensor, "B 1 T"] | None = None
    ) -> Float[Tensor, "B C T"]:
        y = self.depthwise(x if mask is None else x * mask).transpose(1, 2)
        y = self.scale * self.narrow(functional.gelu(self.widen(self.norm(y))))
        return x + y.transpose(1, 2)
