"""Caches of keys and values for any decoder of transformers.

    dynamic   a layer's keys and values are copied into longer ones with every token
    static    they have their full size from the start, and new ones are written in place

Both hold left-padded batches, from which items leave when they are done. Layers that attend to a
window only, or not at all, keep the kind that the LLM's configuration names: they do not grow.
"""

from collections.abc import Sequence
from functools import cache as once
from typing import Any, Literal

import torch
from torch import Tensor

CacheKind = Literal["dynamic", "static"]


def make_cache(kind: CacheKind, config: Any, capacity: int) -> Any:
    """An empty cache for an LLM of this `config`; `capacity`: positions of the longest sequence
    that will be in it, which a static one must not exceed."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=config)
    if kind == "static":
        cache.layers = [
            _static_layer()(capacity) if type(layer) is DynamicLayer else layer
            for layer in cache.layers
        ]
    return cache


def keep_rows(cache: Any, rows: Sequence[int], device: torch.device) -> None:
    """Only these items stay, `rows` in rising order."""
    cache.batch_select_indices(torch.tensor(rows, device=device))


@once
def _static_layer() -> type:
    """The layer of a static cache; made here because transformers is imported late."""
    from transformers.cache_utils import DynamicLayer

    class StaticLayer(DynamicLayer):
        """What is attended to are views of the filled part, so that no mask has to hide the rest
        (transformers' own StaticLayer returns the whole, and lets no item leave)."""

        def __init__(self, capacity: int):
            super().__init__()
            self.capacity = capacity

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            start = self.get_seq_length()
            stop = start + key_states.shape[2]
            assert stop <= self.capacity, f"{stop} positions in a cache of {self.capacity}"
            if start == 0:
                self.lazy_initialization(key_states, value_states)
                self.all_keys = _room(key_states, self.capacity)
                self.all_values = _room(value_states, self.capacity)
            self.all_keys[:, :, start:stop] = key_states
            self.all_values[:, :, start:stop] = value_states
            return self._show(stop)

        def batch_select_indices(self, indices: Tensor) -> None:
            length, count = self.get_seq_length(), len(indices)
            for whole in (self.all_keys, self.all_values):
                # The right side is a copy: rows may be read and written at once.
                whole[:count, :, :length] = whole[indices, :, :length]
            self.all_keys, self.all_values = self.all_keys[:count], self.all_values[:count]
            self._show(length)

        def _show(self, length: int) -> tuple[Tensor, Tensor]:
            self.keys = self.all_keys[:, :, :length]
            self.values = self.all_values[:, :, :length]
            return self.keys, self.values

    return StaticLayer


def _room(states: Tensor, capacity: int) -> Tensor:
    batch, heads, _, width = states.shape
    return states.new_empty(batch, heads, capacity, width)
