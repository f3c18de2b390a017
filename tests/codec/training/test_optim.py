"""Optimizer steps that skip gradients that are not finite, without waiting for the device."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from codec.training.config import OptimConfig
from codec.training.optim import (
    GuardedSteps,
    SkippedSteps,
    adamw,
    is_codec_matrix,
    is_matrix,
    nan_unless_finite,
    set_learning_rate,
)


def trained(gradients: list[float], *, guarded: GuardedSteps | None) -> list[torch.Tensor]:
    """Weights and AdamW's state after steps with these gradients, those of a plain AdamW if there
    is no `guarded`."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = adamw(model, OptimConfig(weight_decay=0.1))
    for number, gradient in enumerate(gradients):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * number)
        model.bias.grad[0] = gradient
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if guarded is None:
            optimizer.step()
        else:
            guarded.step(optimizer, norm)
    state = [each for states in optimizer.state.values() for each in states.values()]
    return [*model.parameters(), *state]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    guarded = GuardedSteps()
    found = trained([1.0, 2.0, bad, bad], guarded=guarded)
    expected = trained([1.0, 2.0], guarded=None)
    assert len(found) == len(expected) > 6
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert guarded.read() == SkippedSteps(last_in_row=2, most_in_row=2, total=2)


def test_finite_steps_are_those_of_the_plain_optimizer() -> None:
    found, expected = (trained([1.0, 2.0, 3.0], guarded=each) for each in (GuardedSteps(), None))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_skipped_steps_are_counted_in_a_row_and_per_optimizer() -> None:
    guarded = GuardedSteps()
    assert guarded.read() == SkippedSteps(0, 0, 0)
    good, bad = (
        torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], fused=True) for _ in range(2)
    )
    for norm in (math.nan, math.inf, 1.0, math.nan):
        guarded.step(good, 1.0)
        guarded.step(bad, norm)  # DeepSpeed's is a number.
    assert guarded.read() == SkippedSteps(last_in_row=1, most_in_row=2, total=3)
    assert guarded.read() == SkippedSteps(last_in_row=1, most_in_row=0, total=0)
    guarded.step(bad, math.nan)
    assert guarded.read() == SkippedSteps(last_in_row=2, most_in_row=2, total=1)
    guarded.step(bad, None)
    assert guarded.read() == SkippedSteps(0, 0, 0)


class NoSynchronization(TorchDispatchMode):
    """Fails where Python asks for a tensor's value, for which it would wait for the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device() -> None:
    model, guarded = torch.nn.Linear(3, 2), GuardedSteps()
    optimizer = adamw(model, OptimConfig())
    with NoSynchronization():
        for factor in (1.0, math.nan, 1.0):
            nan_unless_finite(factor * model(torch.ones(3)).sum()).backward()
            guarded.step(optimizer, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    with pytest.raises(AssertionError), NoSynchronization():
        torch.ones(()).item()


@pytest.mark.parametrize("constant", [math.inf, math.nan, -math.inf])
def test_a_loss_that_is_not_finite_has_a_gradient_of_nan(constant: float) -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    plain = (weight.square() + constant).sum()
    (gradient,) = torch.autograd.grad(plain, weight, retain_graph=True)
    assert gradient.item() == 4.0  # Which other ranks would not notice.
    (gradient,) = torch.autograd.grad(nan_unless_finite(plain), weight)
    assert math.isnan(gradient.item())


def test_a_finite_loss_keeps_its_bits() -> None:
    weight = torch.nn.Parameter(torch.randn(100))
    loss = weight.exp().sum() / 3
    assert torch.equal(nan_unless_finite(loss), loss)
    gradients = [
        torch.autograd.grad(each, weight, retain_graph=True)[0]
        for each in (loss, nan_unless_finite(loss))
    ]
    assert torch.equal(*gradients)


def test_weight_decay_is_for_matrices() -> None:
    model = torch.nn.Module()
    for name, shape in (
        ("weight", (3, 2)),
        ("slope", (1, 5, 1)),
        ("entries", (4, 2)),
        ("bias", (3,)),
    ):
        model.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
    model.register_parameter("frozen", torch.nn.Parameter(torch.ones(3, 2), requires_grad=False))
    config = OptimConfig(lr=0.25, weight_decay=0.5, betas=(0.7, 0.8))
    for decays, expected in (
        (is_matrix, ["weight", "slope", "entries"]),
        (is_codec_matrix, ["weight"]),
    ):
        with_decay, without = adamw(model, config, decays=decays).param_groups
        names = {id(each): name for name, each in model.named_parameters()}
        assert [names[id(each)] for each in with_decay["params"]] == expected
        assert [names[id(each)] for each in without["params"]] == [
            name for name in ("weight", "slope", "entries", "bias") if name not in expected
        ]
        assert (with_decay["weight_decay"], without["weight_decay"]) == (0.5, 0)
        assert (with_decay["lr"], with_decay["betas"]) == (0.25, (0.7, 0.8))
    only = adamw(torch.nn.Linear(2, 2, bias=False), config, lr=0.0)
    assert [group["lr"] for group in only.param_groups] == [0]
    set_learning_rate(only, 0.125)
    assert [group["lr"] for group in only.param_groups] == [0.125]
