"""AdamW for the codec, its discriminators, the AR and the NAR, and steps that skip what is not
finite."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

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


def nan_unless_finite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The same loss; where it is not finite, a NaN whose gradient is NaN.

    After the reduction over ranks each of them thus has a NaN in its gradient if one has such a
    loss. A finite loss and its gradient are multiplied by exactly 1.
    """
    return loss * (0 * loss.detach() + 1)


class SkippedSteps(NamedTuple):
    """Steps that were skipped, of the optimizer that skipped most."""

    last_in_row: int
    """Up to the last step, without one between them that was not skipped."""
    most_in_row: int
    """Since the last reading."""
    total: int
    """Since the last reading."""


class GuardedSteps:
    """Optimizer steps, without those whose gradient is not finite.

    The decision and its counts stay on the device (`found_inf` of fused optimizers, made for
    gradient scalers), so that no step waits for it: about ten kernels of one number each. All ranks
    have the same norm and decide alike. DeepSpeed skips such steps itself and returns an infinite
    norm.
    """

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}

    def step(self, optimizer: Any, norm: Tensor | float | None) -> None:
        """Steps an optimizer if `norm`, the norm of its gradient over all ranks, is finite."""
        bad = (~torch.as_tensor(0.0 if norm is None else norm).isfinite()).float()
        raw = getattr(optimizer, "optimizer", optimizer)
        if getattr(raw, "_step_supports_amp_scaling", False):
            raw.found_inf = bad
        optimizer.step()
        row, most, total = self._counts.get(id(optimizer), bad.new_zeros(3))
        row = (row + 1) * bad
        self._counts[id(optimizer)] = torch.stack([row, torch.maximum(most, row), total + bad])

    def read(self) -> SkippedSteps:
        """The counts, which then start again; waits for the device."""
        if not self._counts:
            return SkippedSteps(0, 0, 0)
        counts = torch.stack(list(self._counts.values())).amax(0).tolist()
        for each in self._counts.values():
            each[1:] = 0
        return SkippedSteps(*map(int, counts))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group; `optimizer` may be wrapped by accelerate or DeepSpeed."""
    for group in optimizer.param_groups:
        group["lr"] = rate
