"""How a step attends: apart in packed rows, and by plain products where they are faster."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

LONGEST_PLAIN = 512
"""Positions of a row. On a CPU, torch's fused attention goes back slower than plain products do,
five times at 68 positions and 1.4 times at 400 (LOG.md), whose memory grows with the square."""


@contextmanager
def attention_of(lm: Any, tokens: Int[Tensor, "B L"]) -> Iterator[None]:
    """Meanwhile a causal LM attends by plain products, where training is faster so.

    transformers' two ways give the same, but where an LLM has ALiBi: that one keeps its own.
    `kept_apart` must be called inside, since it asks which way is taken.
    """
    config, before = lm.config, lm.config._attn_implementation
    # What is computed again in the backward pass is so outside of this.
    once = not getattr(lm, "is_gradient_checkpointing", False)
    same = not getattr(config, "alibi", False)
    if before == "sdpa" and once and same and torch.is_grad_enabled() and _plain(tokens):
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B H L D"],
    value: Float[Tensor, "B H L D"],
    valid: Bool[Tensor, "B 1 1 L"],
) -> Float[Tensor, "B H L D"]:
    """Attention of all positions to the valid ones, of which a row has at least one; in training
    by plain products where those are faster."""
    if not (torch.is_grad_enabled() and _plain(query[:, 0, :, 0])):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=valid)
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    weights = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.to(value.dtype) @ value


def _plain(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.shape[1] <= LONGEST_PLAIN


def kept_apart(lm: Any, documents: Int[Tensor, "B L"]) -> dict[str, Tensor]:
    """Inputs that keep the items of packed rows apart. ValueError for an LLM that cannot."""
    inputs, length = separated(documents), documents.shape[1]
    window = getattr(lm.config, "sliding_window", None)
    if window is not None and window < length:
        raise ValueError(
            f"this LLM sees {window} positions back, which packed rows of {length} cannot "
            f"show: batch.packed must be at most {window}, or null"
        )
    if lm.config._attn_implementation != "sdpa":  # All others add the mask to the scores.
        dtype = next(lm.parameters()).dtype
        lowest = torch.finfo(dtype).min
        mask = torch.zeros_like(inputs["attention_mask"], dtype=dtype)
        inputs["attention_mask"] = mask.masked_fill(~inputs["attention_mask"], lowest)
    return inputs


def separated(documents: Int[Tensor, "B L"]) -> dict[str, Tensor]:
    """What keeps the items of packed rows apart: a mask (B, 1, L, L), and positions that begin anew
    with each item."""
    length = documents.shape[1]
    same = documents[:, :, None] == documents[:, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    index = torch.arange(length, device=documents.device).expand_as(documents)
    begins = functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    first = torch.where(begins, index, 0).cummax(1).values
    # A long padding would count beyond the positions that the LLM has.
    position = torch.where(documents > 0, index - first, 0)
    return {"attention_mask": (same & causal)[:, None], "position_ids": position}
