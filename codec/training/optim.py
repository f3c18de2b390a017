"""AdamW with and without weight decay, for the codec, its discriminators, the AR and the NAR."""

from collections.abc import Callable

import torch
from torch import nn

from codec.training.config import OptimConfig


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has at least two axes: weight decay of the AR and the NAR."""
    return parameter.ndim >= 2


def is_codec_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a codec's parameter decays: two axes longer than 1, and no codebook's entries.

    Snake's slopes and weight norm's gains are vectors with axes of length 1.
    """
    return sum(size > 1 for size in parameter.shape) >= 2 and name.split(".")[-1] != "entries"


def adamw(
    model: nn.Module,
    config: OptimConfig,
    *,
    lr: float | None = None,
    decays: Callable[[str, nn.Parameter], bool] = is_matrix,
) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient, in two groups: with and without weight
    decay.

    Args:
        lr: the peak learning rate; None: `config.lr`.
        decays: of a parameter and its name, whether `config.weight_decay` applies to it.
    """
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr if lr is None else lr, betas=config.betas, fused=True,
    )  # fmt: skip


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group; `optimizer` may be wrapped by accelerate or DeepSpeed."""
    for group in optimizer.param_groups:
        group["lr"] = rate
