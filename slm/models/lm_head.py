"""The LLM's head at the positions and rows that are asked for, and nowhere else.

A table of 50,000 text tokens and 1,000 codes spends most of a training step's time and memory on
logits that no one looks at: speech never chooses a text token, nor a transcript a code.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from slm.tokenization.tokenizer import SpeechTextTokenizer

Forward = Callable[..., Tensor]


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


def speech_rows(tokenizer: SpeechTextTokenizer) -> Rows:
    """What a target of speech may be."""
    made = tokenizer.speech_range("tts")  # Speech that goes on by itself is made of the same.
    return Rows(made.start, made.stop, tokenizer.vocabulary.speech_end)


def text_rows(tokenizer: SpeechTextTokenizer, task: str) -> Rows:
    """What a target of text may be: a transcript (asr), or text alone."""
    made = tokenizer.text_range(task)
    return Rows(made.start, made.stop, tokenizer.vocabulary.eos)


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
    shapes: list[torch.Size] = []

    # The head is called by the LM, so that what the LM does to logits afterwards is done to ours,
    # and what an engine does before and after a module's forward (ZeRO-3 gathers weights) happens.
    def forward(whole: Forward, hidden: Float[Tensor, "B L D"]) -> Float[Tensor, "1 1 M"]:
        flat = hidden.flatten(0, 1)
        states = [flat.index_select(0, where) for where, _ in asked]
        parts = _logits(head, whole, states, [rows for _, rows in asked])
        shapes.extend(part.shape for part in parts)
        return torch.cat([part.flatten() for part in parts])[None, None]

    with _replaced(head, forward):
        flat = lm(use_cache=False, **inputs).logits.flatten()
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def next_logits(lm: Any, rows: Rows, **inputs: Any) -> Float[Tensor, "B _"]:
    """One pass of a causal LM, which may have a cache; its last position's logits of `rows`."""
    head = lm.get_output_embeddings()

    def forward(whole: Forward, hidden: Float[Tensor, "B _ D"]) -> Float[Tensor, "B 1 _"]:
        (logits,) = _logits(head, whole, [hidden[:, -1]], [rows])
        return logits[:, None]

    with _replaced(head, forward):
        return lm(logits_to_keep=1, **inputs).logits[:, -1]


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_making_a_lock = threading.Lock()


def _lock_of(head: nn.Module) -> Any:
    """Re-entrant. Kept apart from the module, which can be copied and pickled as it is."""
    with _making_a_lock:
        return _locks.setdefault(head, threading.RLock())


@contextmanager
def _replaced(head: nn.Module, forward: Callable[[Forward, Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, the head computes `forward`, which is given its own; its hooks stay.

    Other threads wait: they share the head.
    """
    with _lock_of(head):
        before, whole = vars(head).get("forward"), head.forward
        head.forward = partial(forward, whole)
        try:
            yield
        finally:
            del head.forward
            if before is not None:
                head.forward = before


def _logits(
    head: nn.Module,
    whole: Forward,
    hidden: Sequence[Float[Tensor, "_ D"]],
    chosen: Sequence[Rows],
) -> list[Float[Tensor, "_ _"]]:
    taken = _taken(head, [span for rows in chosen for span in rows.spans])
    logits = []
    for states, rows in zip(hidden, chosen, strict=True):
        if taken is None:
            # A head of another kind, such as one with an adapter of its own: all of it is computed.
            every = whole(states[None])[0]
            logits.append(torch.cat([every[:, first:stop] for first, stop in rows.spans], dim=1))
            continue
        own = [taken[span] for span in rows.spans]
        weight = _joined([weight.to(states) for weight, _ in own])
        biases = [bias for _, bias in own if bias is not None]
        logits.append(functional.linear(states, weight, _joined(biases) if biases else None))
    return logits


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """A single stretch is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


Span = tuple[int, int]


def _taken(
    head: nn.Module, spans: Sequence[Span]
) -> dict[Span, tuple[Tensor, Tensor | None]] | None:
    """Weight and bias of stretches of rows; None where the head does more than to multiply."""
    if type(head) is nn.Linear:
        weights = _stretches(head.weight, spans)
        biases = [None] * len(spans) if head.bias is None else _stretches(head.bias, spans)
        return dict(zip(spans, zip(weights, biases, strict=True), strict=True))
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
    start = ids[0]
    if ids[-1] + 1 != start + len(ids) or any(a < start < b or b > ids[-1] + 1 for a, b in spans):
        return None
    weight, trained = adapter.base_layer.weight, adapter.trainable_tokens_delta[name]
    return {
        (first, stop): (
            weight[first:stop] if stop <= start else trained[first - start : stop - start],
            None,
        )
        for first, stop in spans
    }


def _stretches(table: Tensor, spans: Sequence[Span]) -> list[Tensor]:
    """Rows of a table that is trained whole: one split, whose gradient is written once, where
    each slice would write one of the table's size."""
    bounds = sorted({0, len(table), *(bound for span in spans for bound in span)})
    sizes = [stop - start for start, stop in pairwise(bounds)]
    parts = dict(zip(bounds, table.split(sizes), strict=False))
    return [
        _joined([parts[bound] for bound in bounds if first <= bound < stop])
        for first, stop in spans
    ]
