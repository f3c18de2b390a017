"""The released LM-SPT's tensors, written down by rule, and its networks, computed from them.

Nothing of the mapping in codec/interop/lmspt.py and of our layers is used here: this is what they
are checked against.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]

RELEASED: dict[str, Any] = {
    "sample_rate": 24_000, "encoder_rates": [4, 5, 6, 8, 2], "decoder_rates": [2, 8, 6, 5, 4],
    "encoder_dim": 32, "latent_dim": 1024, "decoder_dim": 1536, "n_codebooks": 8,
    "n_semantic_codebooks": 1, "quantizer_dropout": 0.5, "semantic_codebook_size": 16_384,
    "acoustic_codebook_size": 4096, "semantic_codebook_dim": 8, "acoustic_codebook_dim": 8,
    "semantic_quantizer": "rvq", "use_shared_encoder": False, "semantic_subtraction": True,
    "aux_decoder": {
        "input_channel": 1024, "channels": 128, "rates": [8, 8, 5, 4], "sample_rate": 16_000
    },
}  # fmt: skip
TINY: dict[str, Any] = {
    "sample_rate": 8000, "encoder_rates": [2, 3], "decoder_rates": [3, 2], "encoder_dim": 2,
    "latent_dim": 8, "decoder_dim": 12, "n_codebooks": 3, "codebook_size": 16, "codebook_dim": 4,
    "quantizer_dropout": 0.5,
    "aux_decoder": {"input_channel": 8, "channels": 4, "rates": [3], "sample_rate": 4000},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "causal, aux too": {"is_causal": True, "aux_decoder": None, "encoder_rates": [3, 2]},
    "causal, a rate of 1": {
        "is_causal": True, "aux_decoder": None, "encoder_rates": [2, 1, 3],
        "decoder_rates": [3, 1, 2],
    },
    "shared": {"use_shared_encoder": True, "semantic_encoder_dim": 3, "acoustic_encoder_dim": 9},
    "parallel": {"semantic_subtraction": False, "semantic_encoder_dim": 3},
    "strides": {
        "encoder_rates": [4, 2, 5], "decoder_rates": [5, 8], "latent_dim": None,
        "aux_decoder": {
            "input_channel": 16, "channels": 9, "rates": [5, 4], "sample_rate": 4000,
            "dilation": [2, 1, 1], "residual_kernel_size": 3, "is_causal": True,
        },
    },
    "lists": {
        "acoustic_codebook_size": [16, 8], "acoustic_codebook_dim": [4, 2],
        "semantic_codebook_size": 32, "semantic_codebook_dim": 3, "dilation": [1, 2, 4],
        "residual_kernel_size": 5, "aux_decoder": None,
    },
}  # fmt: skip


def other(name: str) -> dict[str, Any]:
    return TINY | OTHERS[name]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def state_of(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors; codebook use is a share, as in the original."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes_of(config).items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith("alpha"):
            tensor = tensor.exp()
        if name.endswith("weight_g"):
            tensor = tensor.abs() / 2
        if name.endswith("usage"):
            tensor = tensor.softmax(-1)
        state[name] = tensor
    sizes = config.get("acoustic_codebook_size")
    for level, size in enumerate(sizes if isinstance(sizes, list) else ()):
        state["quantizer.acoustic_vocab_usage"][level, size:] = 0
    if config.get("use_shared_encoder"):
        for name in [name for name in state if name.startswith("semantic_encoder")]:
            state[name.replace("semantic", "acoustic", 1)] = state[name].clone()
    return state


def shapes_of(config: dict[str, Any]) -> Shapes:
    width, rates = config["encoder_dim"], config["encoder_rates"]
    latent = config["latent_dim"] or width * 2 ** len(rates)
    semantic = config.get("semantic_encoder_dim") or width
    acoustic = config.get("acoustic_encoder_dim") or width
    acoustic = semantic if config.get("use_shared_encoder") else acoustic
    shapes = encoder("semantic_encoder.block", semantic, latent, config)
    shapes |= encoder("acoustic_encoder.block", acoustic, latent, config)
    main = {
        "channels": config["decoder_dim"], "rates": config["decoder_rates"],
        "is_causal": config.get("is_causal", False),
    }  # fmt: skip
    kernel = config.get("residual_kernel_size", 7)
    shapes |= decoder("decoder.model", latent, main | {"residual_kernel_size": kernel})
    shapes |= decoder("aux_decoder.model", latent, config["aux_decoder"] or main)
    size = [config["codebook_size"]] * config["n_codebooks"]
    lookup = [config["codebook_dim"]] * config["n_codebooks"]
    for numbers, key in ((size, "size"), (lookup, "dim")):
        if f"semantic_codebook_{key}" in config:
            numbers[0] = config[f"semantic_codebook_{key}"]
        if f"acoustic_codebook_{key}" in config:
            numbers[1:] = config[f"acoustic_codebook_{key}"]
    for index in range(config["n_codebooks"]):
        name = f"quantizer.rvq_rest.quantizers.{index - 1}"
        name = name if index else "quantizer.rvq_first.quantizers.0"
        shapes |= conv(f"{name}.in_proj", lookup[index], latent, 1)
        shapes |= conv(f"{name}.out_proj", latent, lookup[index], 1)
        shapes[f"{name}.codebook.weight"] = (size[index], lookup[index])
    shapes["quantizer.semantic_vocab_usage"] = (1, size[0])
    shapes["quantizer.acoustic_vocab_usage"] = (len(size) - 1, max(size[1:]))
    return shapes


def conv(name: str, channels_out: int, channels_in: int, kernel: int) -> Shapes:
    return {
        f"{name}.bias": (channels_out,),
        f"{name}.weight_g": (channels_out, 1, 1),
        f"{name}.weight_v": (channels_out, channels_in, kernel),
    }


def unit(name: str, channels: int, kernel: int, inner: str) -> Shapes:
    return {
        f"{name}.block.0.alpha": (1, channels, 1),
        **conv(f"{name}.block.1{inner}", channels, channels, kernel),
        f"{name}.block.2.alpha": (1, channels, 1),
        **conv(f"{name}.block.3{inner}", channels, channels, 1),
    }


def encoder(name: str, width: int, latent: int, config: dict[str, Any]) -> Shapes:
    inner = ".conv" if config.get("is_causal") else ""
    kernel = config.get("residual_kernel_size", 7)
    shapes = conv(f"{name}.0{inner}", width, 1, 7)
    number = 0
    for number, stride in enumerate(config["encoder_rates"], 1):
        for index in range(3):
            shapes |= unit(f"{name}.{number}.block.{index}", width, kernel, inner)
        shapes[f"{name}.{number}.block.3.alpha"] = (1, width, 1)
        shapes |= conv(f"{name}.{number}.block.4{inner}", 2 * width, width, 2 * stride)
        width *= 2
    shapes[f"{name}.{number + 1}.alpha"] = (1, width, 1)
    return shapes | conv(f"{name}.{number + 2}{inner}", latent, width, 3)


def decoder(name: str, latent: int, config: dict[str, Any]) -> Shapes:
    inner = ".conv" if config.get("is_causal") else ""
    kernel, width = config.get("residual_kernel_size", 7), config["channels"]
    shapes = conv(f"{name}.0{inner}", width, latent, 7)
    number = 0
    for number, stride in enumerate(config["rates"], 1):
        half, up = width // 2, f"{name}.{number}.block.1{inner}"
        shapes[f"{name}.{number}.block.0.alpha"] = (1, width, 1)
        shapes[f"{up}.bias"], shapes[f"{up}.weight_g"] = (half,), (width, 1, 1)
        shapes[f"{up}.weight_v"] = (width, half, 2 * stride)
        for index in range(2, 5):
            shapes |= unit(f"{name}.{number}.block.{index}", half, kernel, inner)
        width = half
    shapes[f"{name}.{number + 1}.alpha"] = (1, width, 1)
    return shapes | conv(f"{name}.{number + 2}{inner}", 1, width, 7)


class ByNumber:
    """The original's networks, computed from its tensors with explicit zeros around them."""

    def __init__(self, state: dict[str, Tensor], dilations: list[int]) -> None:
        self.state, self.dilations = state, dilations

    def encode(self, side: str, wave: Tensor) -> Tensor:
        name, last = f"{side}_encoder.block", self.last(f"{side}_encoder.block")
        x = self.conv(f"{name}.0", wave)
        for number in range(1, last - 1):
            for index in range(3):
                x = self.unit(f"{name}.{number}.block.{index}", x, self.dilations[index])
            x = self.snake(f"{name}.{number}.block.3", x)
            x = self.conv(f"{name}.{number}.block.4", x, strided=True)
        return self.conv(f"{name}.{last}", self.snake(f"{name}.{last - 1}", x))

    def decode(self, side: str, latent: Tensor) -> Tensor:
        name, last = f"{side}.model", self.last(f"{side}.model")
        x = self.conv(f"{name}.0", latent)
        for number in range(1, last - 1):
            x = self.transposed(
                f"{name}.{number}.block.1", self.snake(f"{name}.{number}.block.0", x)
            )
            for index in range(3):
                x = self.unit(f"{name}.{number}.block.{index + 2}", x, self.dilations[index])
        return self.conv(f"{name}.{last}", self.snake(f"{name}.{last - 1}", x)).tanh()

    def quantize(self, name: str, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B,T) and the value that is taken off."""
        name = f"quantizer.{name}"
        looked_up = self.conv(f"{name}.in_proj", residual).transpose(1, 2)
        table = self.state[f"{name}.codebook.weight"]
        codes = (functional.normalize(looked_up, dim=-1) @ functional.normalize(table).T).argmax(-1)
        return codes, self.conv(f"{name}.out_proj", table[codes].transpose(1, 2))

    def last(self, name: str) -> int:
        depth = name.count(".") + 1
        return max(int(key.split(".")[depth]) for key in self.state if key.startswith(f"{name}."))

    def weight(self, name: str) -> Tensor:
        direction = self.state[f"{name}.weight_v"]
        norm = direction.square().sum((1, 2), keepdim=True).sqrt()
        return self.state[f"{name}.weight_g"] * direction / norm

    def snake(self, name: str, x: Tensor) -> Tensor:
        alpha = self.state[f"{name}.alpha"]
        return x + (alpha * x).sin() ** 2 / alpha

    def conv(self, name: str, x: Tensor, *, strided: bool = False, dilation: int = 1) -> Tensor:
        causal = f"{name}.conv.bias" in self.state
        name = f"{name}.conv" if causal else name
        weight, bias = self.weight(name), self.state[f"{name}.bias"]
        stride = weight.shape[-1] // 2 if strided else 1
        before = after = (weight.shape[-1] - 1) * dilation // 2
        if strided:
            before = after = (stride + 1) // 2
        if causal:
            before, after = (weight.shape[-1] - 1) * dilation + 1 - stride, -x.shape[-1] % stride
        padded = functional.pad(x, (before, after))
        return functional.conv1d(padded, weight, bias, stride=stride, dilation=dilation)

    def transposed(self, name: str, x: Tensor) -> Tensor:
        causal = f"{name}.conv.bias" in self.state
        name = f"{name}.conv" if causal else name
        weight, bias = self.weight(name), self.state[f"{name}.bias"]
        stride = weight.shape[-1] // 2
        if causal:
            y = functional.conv_transpose1d(x, weight, bias, stride=stride)
            return y[..., : x.shape[-1] * stride]
        side = (stride + 1) // 2
        return functional.conv_transpose1d(x, weight, bias, stride=stride, padding=side)

    def unit(self, name: str, x: Tensor, dilation: int) -> Tensor:
        y = self.conv(f"{name}.block.1", self.snake(f"{name}.block.0", x), dilation=dilation)
        return x + self.conv(f"{name}.block.3", self.snake(f"{name}.block.2", y))
