"""Attention back-ends of training, and the block-diagonal masks of packed rows."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

BACKEND = "parlance_training"
"""Name in transformers' AttentionInterface."""
MAX_PLAIN_LENGTH = 512
"""Positions. On a CPU the backward pass of torch's fused attention is slower than that of plain
matrix products, five times at 68 positions and 1.4 times at 400 (LOG.md); their memory grows with
the square of the length."""


def use_training_attention(lm: Any) -> None:
    """Selects the attention back-end of a causal LM that is to be trained: `attend` for short rows
    on a CPU, else SDPA. To be called once, when the model is built.

    An LLM whose attention does not go through transformers' AttentionInterface keeps its own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BACKEND, _attention)
    AttentionMaskInterface.register(BACKEND, sdpa_mask)
    lm.set_attn_implementation(BACKEND)


def _attention(
    module: nn.Module,
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B G K D"],
    value: Float[Tensor, "B G K D"],
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Float[Tensor, "B L H D"], None]:
    """With the signature of transformers' attention functions; G heads of keys, K positions."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    biased = any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    if biased or query.shape[2] != key.shape[2] or not _plain_is_faster(query):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is None:
        length = query.shape[2]
        attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    dropout = options.get("dropout") or 0.0
    scale = options.get("scaling")
    attended = _plain_attention(query, key, value, attention_mask, scale, dropout)
    return attended.transpose(1, 2).contiguous(), None


def attend(
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B H L D"],
    value: Float[Tensor, "B H L D"],
    valid: Bool[Tensor, "B 1 1 L"],
) -> Float[Tensor, "B H L D"]:
    """Attention of all positions to the valid ones, of which a row has at least one: plain matrix
    products where their backward pass is faster, else fused attention."""
    if _plain_is_faster(query):
        return _plain_attention(query, key, value, valid)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=valid)


def _plain_is_faster(query: Float[Tensor, "B H L D"]) -> bool:
    on_cpu = query.device.type == "cpu"
    return on_cpu and torch.is_grad_enabled() and query.shape[2] <= MAX_PLAIN_LENGTH


def _plain_attention(
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B H L D"],
    value: Float[Tensor, "B H L D"],
    mask: Bool[Tensor, "... L"],
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H L D"]:
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return functional.dropout(weights, dropout).to(value.dtype) @ value


def packed_inputs(lm: Any, documents: Int[Tensor, "B L"]) -> dict[str, Tensor]:
    """Inputs of a causal LM that keep the documents of packed rows (0: padding) apart: a causal
    block-diagonal mask (B, 1, L, L), and positions that count from 0 in each document.

    Raises:
        ValueError: for an LLM with a sliding window shorter than the rows.
    """
    length = documents.shape[1]
    window = getattr(lm.config, "sliding_window", None)
    if window is not None and window < length:
        raise ValueError(
            f"this LLM attends to a sliding window of {window} positions, and packed rows have "
            f"{length}: batch.packed must be at most {window}, or null"
        )
    same = documents[:, :, None] == documents[:, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    index = torch.arange(length, device=documents.device).expand_as(documents)
    starts = functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    first = torch.where(starts, index, 0).cummax(1).values
    # A long padding would count beyond the positions that the LLM has.
    positions = torch.where(documents > 0, index - first, 0)
    return {"attention_mask": (same & causal)[:, None], "position_ids": positions}
