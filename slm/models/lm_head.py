"""Logits of selected vocabulary ids at selected positions.

Speech never competes with text ids, nor a transcript with codes, so only rows of the LM head that a
target can have are multiplied. With 50,000 text tokens and 1,000 codes the full head would take
most of a training step's time and memory.
"""

import functools
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from slm.tokenization.tokenizer import SpeechTextTokenizer

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Config fields of Gemma, RecurrentGemma and xLSTM: logits become cap * tanh(logits / cap)."""
CHECK_TOLERANCE = 0.02
"""Maximum difference of `check_head`, relative to the largest logit: rounding in bfloat16."""


class IdRange(NamedTuple):
    """Ids that a target may have: first .. stop - 1, and the end token."""

    first: int
    stop: int
    end: int | None
    """May lie within the range; None: no other id."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Bounds of the contiguous rows of the head, in the order of the logits' columns."""
        inside = self.end is None or self.first <= self.end < self.stop
        end = [] if self.end is None or inside else [(self.end, self.end + 1)]
        return [(self.first, self.stop), *end]

    def columns(self, ids: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """Columns of ids in logits of this range; an end token outside of it has the last one."""
        if len(self.spans) == 1:
            return ids - self.first
        return torch.where(ids == self.end, self.stop - self.first, ids - self.first)


class PositionGroup(NamedTuple):
    """Positions whose targets have the same range."""

    positions: Int[Tensor, " N"]
    """Indices into the flattened batch (B * L)."""
    ids: IdRange


def speech_ids(tokenizer: SpeechTextTokenizer) -> IdRange:
    """Ids of speech targets (tts, continuation) and <|/speech|>."""
    ids = tokenizer.speech_range("tts")
    return IdRange(ids.start, ids.stop, tokenizer.vocabulary.speech_end)


def text_ids(tokenizer: SpeechTextTokenizer, task: str) -> IdRange:
    """Ids of text targets (asr, text) and their end token."""
    ids = tokenizer.text_range(task)
    return IdRange(ids.start, ids.stop, tokenizer.vocabulary.eos)


def group_logits(
    lm: Any, groups: Sequence[PositionGroup], *, owner: nn.Module | None = None, **inputs: Tensor
) -> list[Float[Tensor, "_ _"]]:
    """One pass of a causal LM; logits (positions, columns) of each group.

    The rows of every group are in the graph, even where it has no position, so that the backward
    pass reaches the same parameters on all ranks.

    Args:
        lm: a causal LM of transformers, with or without peft's adapters.
        owner: the module whose `forward` makes this call. ZeRO-3 then gathers the head, whose own
            `forward` is not called, for the owner's backward pass too.
        inputs: of the LM, such as input_ids.
    """
    hidden = last_hidden_states(lm, use_cache=False, **inputs).flatten(0, 1)
    states = [hidden.index_select(0, group.positions) for group in groups]
    return _logits(lm, states, [group.ids for group in groups], owner)


def next_logits(lm: Any, ids: IdRange, cache: Any = None, **inputs: Any) -> Float[Tensor, "B _"]:
    """One pass of a causal LM, perhaps with a KV cache; logits of `ids` at the last position."""
    if cache is not None:
        inputs[_cache_argument(type(_causal_lm(lm).base_model))] = cache
    (logits,) = _logits(lm, [last_hidden_states(lm, **inputs)[:, -1]], [ids])
    return logits


def last_hidden_states(lm: Any, **inputs: Any) -> Float[Tensor, "B L D"]:
    """Output of a causal LM's last layer: the input of its head."""
    return _causal_lm(lm).base_model(**inputs).last_hidden_state


@functools.cache
def _cache_argument(model: type) -> str:
    """Its name in `forward`: transformers has renamed it in version 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _causal_lm(lm: Any) -> Any:
    """The model of transformers, without peft's wrapper; adapters within its layers stay active."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def _logits(
    lm: Any,
    states: Sequence[Float[Tensor, "_ D"]],
    ranges: Sequence[IdRange],
    owner: nn.Module | None = None,
) -> list[Float[Tensor, "_ _"]]:
    head = lm.get_output_embeddings()
    spans = [span for ids in ranges for span in ids.spans]
    with _gathered(head, owner):
        weights = _head_rows(head, spans)
        bias = getattr(head, "bias", None)
        biases = None if bias is None else _rows(bias, spans)
        found = []
        for hidden, ids in zip(states, ranges, strict=True):
            weight = _joined([weights[span].to(hidden) for span in ids.spans])
            added = None if biases is None else _joined([biases[span] for span in ids.spans])
            found.append(_scaled(functional.linear(hidden, weight, added), lm.config))
    return found


def _gathered(head: nn.Module, owner: nn.Module | None) -> Any:
    """Gathers the head's parameters that ZeRO-3 has partitioned. Once they are known as external
    parameters of the owner, DeepSpeed gathers them before the owner's passes."""
    partitioned: list[Any] = [each for each in head.parameters() if hasattr(each, "ds_id")]
    if not partitioned:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    lacking = [each for each in partitioned if each.ds_status != ZeroParamStatus.AVAILABLE]
    return GatheredParameters(lacking, fwd_module=owner, enabled=bool(lacking))


def _head_rows(head: Any, spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
    """Rows of the head by their bounds. Those that peft trains (`trainable_token_indices`) replace
    the base rows here, within the spans: `weight` of peft's wrapper copies the table for that, 2 to
    14 % of a step's time on a CPU (LOG.md). At least one span holds trained rows.
    """
    adapter = getattr(head, "token_adapter", None)
    if adapter is None or adapter.disable_adapters or adapter.merged:
        return _rows(head.weight, spans)
    rows = _rows(adapter.get_base_layer().weight, spans)
    for name in adapter.active_adapters:
        ids, trained = (
            torch.tensor(adapter.token_indices[name]),
            adapter.trainable_tokens_delta[name],
        )
        for (first, stop), table in rows.items():
            places = ((ids >= first) & (ids < stop)).nonzero()[:, 0]
            if len(places):
                targets, places = (ids[places] - first).to(table.device), places.to(table.device)
                rows[first, stop] = table.index_copy(0, targets, trained[places].to(table))
    return rows


def _rows(table: Tensor, spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
    """Rows of a table by their bounds: one split, whose gradient is written once, where each slice
    would write one of the table's size."""
    bounds = sorted({0, len(table), *(bound for span in spans for bound in span)})
    sizes = [stop - start for start, stop in pairwise(bounds)]
    parts = dict(zip(bounds, table.split(sizes), strict=False))
    return {
        span: _joined([parts[bound] for bound in bounds if span[0] <= bound < span[1]])
        for span in spans
    }


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenated; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _scaled(logits: Float[Tensor, "_ _"], config: Any) -> Float[Tensor, "_ _"]:
    """Logits with the scales and soft caps of the LM's configuration."""
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite divides, HyperCLOVA X multiplies
        logits = logits * scale if config.model_type == "hyperclovax" else logits / scale
    for name in SOFT_CAPS:
        if cap := getattr(config, name, None):
            logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_head(lm: Any, name: str) -> None:
    """Raises ValueError for a causal LM whose logits are not those of `group_logits`: they
    are changed by an unknown rule."""
    device = lm.get_input_embeddings().weight.device
    tokens = torch.arange(2, device=device)[None]
    expected = lm(input_ids=tokens, use_cache=False).logits[0].float()
    every = PositionGroup(torch.arange(2, device=device), IdRange(0, expected.shape[1], None))
    (found,) = group_logits(lm, [every], input_ids=tokens)
    if not (found.float() - expected).abs().max() <= CHECK_TOLERANCE * expected.abs().max():
        raise ValueError(
            f"{name}: changes the logits of its head in a way that is not supported; use an LLM of "
            "another architecture"
        )
