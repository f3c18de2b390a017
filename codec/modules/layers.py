"""Layers: convolutions for padded batches, Snake, LSTM, Transformer, ConvNeXt blocks.

With `lengths` or a mask, each item of a padded batch gets the output that it gets alone.
"""

from typing import TypeVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

Lengths = Int[Tensor, " B"]
Integers = TypeVar("Integers", int, Tensor)


def length_mask(lengths: Lengths, size: int) -> Float[Tensor, "B 1 T"]:
    """1 inside each item, 0 in its padding."""
    inside = torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)
    return inside.unsqueeze(1).float()


def ceil_div(a: Integers, b: int) -> Integers:
    """The quotient rounded up, of integers or integer tensors."""
    return -(-a // b)


def reflect_pad(
    x: Float[Tensor, "B C S"], left: int, right: int, stride: int, lengths: Lengths | None = None
) -> Float[Tensor, "B C P"]:
    """Pads both ends of every item by reflection and completes its last stride.

    An item too short for reflection is first extended with zeros, as in EnCodec's code. Values
    beyond an item's own padding are undefined.
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
    """Weight-normed convolution, padded by reflection to ceil(S / stride) output frames.

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
    """Weight-normed transposed convolution of kernel 2 * stride: T frames to T * stride samples."""

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


class ZeroPaddedConv1d(nn.Module):
    """Weight-normed convolution with zero padding, as in DAC (arXiv 2306.06546).

    For a stride the kernel is two strides long; S samples give floor(S / stride) frames, or
    floor((S + 1) / stride) for an odd stride. Causal: zeros are padded on the left (on the right
    only to complete the last stride), which gives ceil(S / stride) frames.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.causal = stride, causal
        self.padding = (kernel - 1) * dilation + 1 - stride
        self.conv = weight_norm(
            nn.Conv1d(channels_in, channels_out, kernel, stride=stride, dilation=dilation)
        )

    def forward(
        self, x: Float[Tensor, "B C S"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B D T"]:
        if lengths is not None:
            x = x * length_mask(lengths, x.shape[-1])
        if self.causal:
            return self.conv(functional.pad(x, (self.padding, -x.shape[-1] % self.stride)))
        side = ceil_div(self.padding, 2)
        return self.conv(functional.pad(x, (side, side)))

    def out_lengths(self, lengths: Lengths | None) -> Lengths | None:
        """Output frames for items of `lengths` input samples."""
        if lengths is None or self.stride == 1:
            return lengths
        if self.causal:
            return ceil_div(lengths, self.stride)
        return (lengths + self.stride % 2) // self.stride


class ZeroPaddedConvTranspose1d(nn.Module):
    """Weight-normed transposed convolution of kernel 2 * stride, as in DAC (arXiv 2306.06546).

    T frames give T * stride samples, one fewer for an odd stride unless causal.
    """

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, *, causal: bool = False
    ) -> None:
        super().__init__()
        self.stride, self.causal = stride, causal
        self.conv = weight_norm(
            nn.ConvTranspose1d(channels_in, channels_out, 2 * stride, stride=stride)
        )

    def forward(
        self, x: Float[Tensor, "B C T"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B D S"]:
        if lengths is not None:
            x = x * length_mask(lengths, x.shape[-1])
        y = self.conv(x)
        if self.causal:
            return y[..., : -self.stride]
        side = ceil_div(self.stride, 2)
        return y[..., side:-side]

    def out_lengths(self, lengths: Lengths | None) -> Lengths | None:
        """Output samples for items of `lengths` input frames."""
        if lengths is None:
            return None
        return lengths * self.stride - (0 if self.causal else self.stride % 2)


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha with one alpha per channel (arXiv 2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Float[Tensor, "B C S"]) -> Float[Tensor, "B C S"]:
        return x + (self.alpha * x).sin().square() / (self.alpha + 1e-9)


def activation(name: str, channels: int) -> nn.Module:
    """The activation function `elu` or `snake`."""
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
    """LSTM over frames with a skip connection; bidirectional, it doubles the channels."""

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
    """Layer normalization over the channels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B C T"]:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution and a pointwise MLP with a scaled residual (arXiv 2201.03545, 1-D).

    `mask` is 0 in padding.
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


class TransformerLayer(nn.Module):
    """Pre-norm self-attention with rotary positions (arXiv 2104.09864) and an MLP, each with a
    LayerScale residual (2103.17239)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.project_out = nn.Linear(width, width, bias=False)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale_attention = nn.Parameter(torch.full((width,), 0.01))
        self.scale_mlp = nn.Parameter(torch.full((width,), 0.01))

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        angles: Float[Tensor, "T F"],
        mask: Bool[Tensor, "*B 1 T T"],
    ) -> Float[Tensor, "B T C"]:
        query, key, value = rearrange(
            self.project_in(self.norm_attention(x)),
            "b t (n h c) -> n b h t c",
            n=3,
            h=self.num_heads,
        )
        query, key = _rotate(query, angles), _rotate(key, angles)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = rearrange(attended, "b h t c -> b t (h c)")
        x = x + self.scale_attention * self.project_out(attended)
        return x + self.scale_mlp * self.narrow(functional.gelu(self.widen(self.norm_mlp(x))))


class Transformer(nn.Module):
    """Transformer with windowed attention: `context` frames on each side (causal: before only).

    Positions are relative: the output of a chunk equals that of the full recording, except for
    frames near its ends that lack context.
    """

    def __init__(
        self, width: int, *, num_layers: int, num_heads: int, context: int, causal: bool
    ) -> None:
        super().__init__()
        self.context, self.causal, self.num_angles = context, causal, width // num_heads // 2
        self.layers = nn.ModuleList(TransformerLayer(width, num_heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width)

    def forward(
        self, x: Float[Tensor, "B C T"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B C T"]:
        position = torch.arange(x.shape[-1], device=x.device)
        rates = 10_000 ** -(torch.arange(self.num_angles, device=x.device) / self.num_angles)
        angles = position.unsqueeze(1) * rates
        distance = position.unsqueeze(1) - position
        mask = (distance <= self.context) & (distance >= (0 if self.causal else -self.context))
        mask = mask[None, None]
        if lengths is not None:
            # Padding frames attend to themselves: a softmax over no frame would be NaN.
            inside = (position < lengths.unsqueeze(1))[:, None, None]
            mask = (mask & inside) | (distance == 0)
        frames = x.transpose(1, 2)
        for layer in self.layers:
            frames = layer(frames, angles, mask)
        return self.norm_out(frames).transpose(1, 2)


def _rotate(x: Float[Tensor, "B H T C"], angles: Float[Tensor, "T F"]) -> Float[Tensor, "B H T C"]:
    """Rotary position embedding: rotates pairs of features by an angle proportional to time."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
