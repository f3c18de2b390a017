"""SpeechTokenizer's tensors, written down by hand, and its networks, computed from them by number.

Nothing of the mapping in codec/interop/speechtokenizer.py is used here: this is what it is checked
against.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]

SNAKE: dict[str, Any] = {
    "n_filters": 4, "strides": [3, 2], "dimension": 8, "semantic_dimension": 8,
    "bidirectional": False, "dilation_base": 3, "residual_kernel_size": 5, "n_residual_layers": 2,
    "lstm_layers": 1, "activation": "Snake", "codebook_size": 16, "n_q": 2, "sample_rate": 24000,
}  # fmt: skip
# What the original takes for keys that are not there: no LSTM, one direction.
PLAIN: dict[str, Any] = {
    "n_filters": 4, "strides": [4], "dimension": 8, "semantic_dimension": 6, "dilation_base": 2,
    "residual_kernel_size": 3, "n_residual_layers": 1, "activation": "ELU", "codebook_size": 16,
    "n_q": 1, "sample_rate": 16000,
}  # fmt: skip


def conv(name: str, channels_out: int, channels_in: int, kernel: int) -> Shapes:
    return {
        f"{name}.conv.conv.bias": (channels_out,),
        f"{name}.conv.conv.weight_g": (channels_out, 1, 1),
        f"{name}.conv.conv.weight_v": (channels_out, channels_in, kernel),
    }


def transposed(name: str, channels_in: int, channels_out: int, kernel: int) -> Shapes:
    return {
        f"{name}.convtr.convtr.bias": (channels_out,),
        f"{name}.convtr.convtr.weight_g": (channels_in, 1, 1),
        f"{name}.convtr.convtr.weight_v": (channels_in, channels_out, kernel),
    }


def unit(name: str, channels: int, kernel: int, *, snake: bool) -> Shapes:
    half = channels // 2
    shapes = conv(f"{name}.block.1", half, channels, kernel)
    shapes |= conv(f"{name}.block.3", channels, half, 1)
    shapes |= conv(f"{name}.shortcut", channels, channels, 1)
    if snake:
        shapes |= {f"{name}.block.0.alpha": (1, channels, 1), f"{name}.block.2.alpha": (1, half, 1)}
    return shapes


def lstm(name: str, channels: int) -> Shapes:
    weights = {f"{name}.lstm.weight_{kind}_l0": (4 * channels, channels) for kind in ("ih", "hh")}
    return weights | {f"{name}.lstm.bias_{kind}_l0": (4 * channels,) for kind in ("ih", "hh")}


def codebook(index: int, size: int, dimension: int) -> Shapes:
    name = f"quantizer.vq.layers.{index}._codebook"
    return {
        f"{name}.inited": (1,),
        f"{name}.cluster_size": (size,),
        f"{name}.embed": (size, dimension),
        f"{name}.embed_avg": (size, dimension),
    }


SNAKE_SHAPES: Shapes = {
    **conv("encoder.model.0", 4, 1, 7),
    **unit("encoder.model.1", 4, 5, snake=True),
    **unit("encoder.model.2", 4, 5, snake=True),
    "encoder.model.3.alpha": (1, 4, 1),
    **conv("encoder.model.4", 8, 4, 4),
    **unit("encoder.model.5", 8, 5, snake=True),
    **unit("encoder.model.6", 8, 5, snake=True),
    "encoder.model.7.alpha": (1, 8, 1),
    **conv("encoder.model.8", 16, 8, 6),
    **lstm("encoder.model.9", 16),
    "encoder.model.10.alpha": (1, 16, 1),
    **conv("encoder.model.11", 8, 16, 7),
    **codebook(0, 16, 8),
    **codebook(1, 16, 8),
    **conv("decoder.model.0", 16, 8, 7),
    **lstm("decoder.model.1", 16),
    "decoder.model.2.alpha": (1, 16, 1),
    **transposed("decoder.model.3", 16, 8, 6),
    **unit("decoder.model.4", 8, 5, snake=True),
    **unit("decoder.model.5", 8, 5, snake=True),
    "decoder.model.6.alpha": (1, 8, 1),
    **transposed("decoder.model.7", 8, 4, 4),
    **unit("decoder.model.8", 4, 5, snake=True),
    **unit("decoder.model.9", 4, 5, snake=True),
    "decoder.model.10.alpha": (1, 4, 1),
    **conv("decoder.model.11", 1, 4, 7),
}
PLAIN_SHAPES: Shapes = {
    **conv("encoder.model.0", 4, 1, 7),
    **unit("encoder.model.1", 4, 3, snake=False),
    **conv("encoder.model.3", 8, 4, 8),
    **conv("encoder.model.5", 8, 8, 7),
    "transform.weight": (6, 8),
    "transform.bias": (6,),
    **codebook(0, 16, 8),
    **conv("decoder.model.0", 8, 8, 7),
    **transposed("decoder.model.2", 8, 4, 8),
    **unit("decoder.model.3", 4, 3, snake=False),
    **conv("decoder.model.5", 1, 4, 7),
}


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in state:
        if name.endswith("alpha"):
            state[name] = state[name].exp()
        if name.endswith(("cluster_size", "weight_g")):
            state[name] = state[name].abs()
        if name.endswith("inited"):
            state[name] = torch.ones(1)
    return state


class ByNumber:
    """The original's networks, computed from its tensors: one module after the other."""

    def __init__(self, config: dict[str, Any], state: dict[str, Tensor]) -> None:
        self.config, self.state = config, state

    def run(self, side: str, x: Tensor) -> Tensor:
        numbers = {int(name.split(".")[2]) for name in self.state if name.startswith(side)}
        for number in range(max(numbers) + 1):
            name, layer = f"{side}.model.{number}", 0
            while f"{side}.model.{number - 1 - layer}.shortcut.conv.conv.bias" in self.state:
                layer += 1
            if f"{name}.shortcut.conv.conv.bias" in self.state:
                x = self.unit(name, x, self.config["dilation_base"] ** layer)
            elif f"{name}.lstm.bias_ih_l0" in self.state:
                x = self.lstm(name, x)
            elif f"{name}.convtr.convtr.bias" in self.state:
                x = self.transposed(name, x)
            elif f"{name}.conv.conv.bias" in self.state:
                # 7 samples wide at both ends, two strides wide between them.
                kernel = self.state[f"{name}.conv.conv.weight_v"].shape[-1]
                x = self.conv(name, x, stride=1 if kernel == 7 else kernel // 2)
            else:
                x = self.activation(name, x)
        return x

    def weight(self, name: str) -> Tensor:
        direction = self.state[f"{name}.weight_v"]
        norm = direction.square().sum((1, 2), keepdim=True).sqrt()
        return self.state[f"{name}.weight_g"] * direction / norm

    def activation(self, name: str, x: Tensor) -> Tensor:
        alpha = self.state.get(f"{name}.alpha")
        return functional.elu(x) if alpha is None else x + (alpha * x).sin() ** 2 / alpha

    def conv(self, name: str, x: Tensor, *, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = self.weight(f"{name}.conv.conv")
        padding = (weight.shape[-1] - 1) * dilation + 1 - stride
        x = functional.pad(x, (padding - padding // 2, padding // 2), mode="reflect")
        bias = self.state[f"{name}.conv.conv.bias"]
        return functional.conv1d(x, weight, bias, stride=stride, dilation=dilation)

    def transposed(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (
            self.weight(f"{name}.convtr.convtr"),
            self.state[f"{name}.convtr.convtr.bias"],
        )
        stride = weight.shape[-1] // 2
        y = functional.conv_transpose1d(x, weight, bias, stride=stride)
        return y[..., stride - stride // 2 :][..., : x.shape[-1] * stride]

    def lstm(self, name: str, x: Tensor) -> Tensor:
        channels = x.shape[1]
        network = torch.nn.LSTM(channels, channels)
        start = f"{name}.lstm."
        network.load_state_dict(
            {key.removeprefix(start): self.state[key] for key in self.state if start in key}
        )
        return x + network(x.permute(2, 0, 1))[0].permute(1, 2, 0)

    def unit(self, name: str, x: Tensor, dilation: int) -> Tensor:
        y = self.conv(f"{name}.block.1", self.activation(f"{name}.block.0", x), dilation=dilation)
        y = self.conv(f"{name}.block.3", self.activation(f"{name}.block.2", y))
        return self.conv(f"{name}.shortcut", x) + y
