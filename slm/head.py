"""The LLM's head at the positions and rows that are asked for, and nowhere else.

A table of 50,000 text tokens and 1,000 codes spends most of a training step's time and memory on
logits that no one looks at: speech never chooses a text token, nor a transcript a code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from slm.alphabet import Alphabet
from slm.vocab import Vocabulary


class Rows(NamedTuple):
    """Which ids may be chosen: first .. stop - 1, and the end token."""

    first: int
    stop: int
    end: int | None
    """It may be one of them; None: there is no other."""

    def columns(self, ids: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """Where ids that may be chosen stand in logits over these rows: the end, if it is not one
        of the others, comes last."""
        if self._end_apart is None:
            return ids - self.first
        return torch.where(ids == self.end, self.stop - self.first, ids - self.first)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Bounds of their stretches in the head, in the order of the columns."""
        end = self._end_apart
        return [(self.first, self.stop), *([(end, end + 1)] if end is not None else [])]

    @property
    def _end_apart(self) -> int | None:
        inside = self.end is None or self.first <= self.end < self.stop
        return None if inside else self.end


def speech_rows(alphabet: Alphabet) -> Rows:
    """What a target of speech may be."""
    made = alphabet.speech_range("tts")  # Speech that goes on by itself is made of the same.
    return Rows(made.start, made.stop, alphabet.vocabulary.speech_end)


def text_rows(vocabulary: Vocabulary) -> Rows:
    """What a target of text may be."""
    return Rows(0, vocabulary.num_text, vocabulary.eos)


class Asked(NamedTuple):
    """Positions that choose from the same rows."""

    where: Int[Tensor, " N"]
    """Indices of the positions, row after row of the batch."""
    rows: Rows


def logits_of(lm: Any, asked: Sequence[Asked], **inputs: Tensor) -> list[Float[Tensor, "_ _"]]:
    """One pass of a causal LM; logits (positions, rows) of every group of positions.

    Every group's rows are in the graph, even where it has no position, so that all ranks that share
    the gradients go back through the same parameters.
    """
    head = lm.get_output_embeddings()
    whole = head.forward
    shapes: list[torch.Size] = []

    # The head is called by the LM, so that what the LM does to logits afterwards is done to ours,
    # and what an engine does before and after a module's forward (ZeRO-3 gathers weights) happens.
    def forward(hidden: Float[Tensor, "B L D"]) -> Float[Tensor, "1 1 M"]:
        flat = hidden.flatten(0, 1)
        parts = [_logits(head, whole, flat.index_select(0, where), rows) for where, rows in asked]
        shapes.extend(part.shape for part in parts)
        return torch.cat([part.flatten() for part in parts])[None, None]

    with _replaced(head, forward):
        flat = lm(use_cache=False, **inputs).logits.flatten()
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@contextmanager
def _replaced(head: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While it lasts, the head computes `forward`; its hooks stay."""
    before = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def _logits(
    head: nn.Module, whole: Callable[..., Tensor], hidden: Float[Tensor, "N D"], rows: Rows
) -> Float[Tensor, "N _"]:
    taken = [each for span in rows.spans if (each := _taken(head, *span)) is not None]
    if len(taken) < len(rows.spans):
        # A head of another kind, such as one with an adapter of its own: all of it is computed.
        logits = whole(hidden[None])[0]
        return torch.cat([logits[:, first:stop] for first, stop in rows.spans], dim=1)
    weight = _joined([weight.to(hidden) for weight, _ in taken])
    biases = [bias for _, bias in taken if bias is not None]
    return functional.linear(hidden, weight, _joined(biases) if biases else None)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """A single stretch is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _taken(head: nn.Module, first: int, stop: int) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a stretch of rows; None where the head does more than to multiply."""
    if type(head) is nn.Linear:
        return head.weight[first:stop], None if head.bias is None else head.bias[first:stop]
    from peft.utils.other import TrainableTokensWrapper

    if not isinstance(head, TrainableTokensWrapper):
        return None
    adapter = head.token_adapter
    if type(adapter.base_layer) is not nn.Linear or adapter.base_layer.bias is not None:
        return None
    if adapter.disable_adapters or adapter.merged or len(adapter.active_adapters) != 1:
        return None
    (name,) = adapter.active_adapters
    ids = adapter.token_indices[name]
    if stop <= ids[0]:
        return adapter.base_layer.weight[first:stop], None
    if ids[0] <= first and stop <= ids[-1] + 1 == ids[0] + len(ids):
        return adapter.trainable_tokens_delta[name][first - ids[0] : stop - ids[0]], None
    return None
