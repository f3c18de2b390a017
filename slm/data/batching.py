"""Length-bucketed and packed batches, as a function of (seed, step, rank, world).

A run resumes without sampler state, and one rank that accumulates two batches gets what two ranks
get. A batch is a list of rows; a row is one item, or several packed ones.
"""

from bisect import bisect_left, insort
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from slm.config import BatchConfig

BUCKET_GROWTH = 1.04
"""Ratio of the longest to the shortest length in a bucket: bounds padding."""
OPEN_ROWS = 256
"""Maximum number of rows that still take items; beyond it, the fullest is closed."""

Batch = list[np.ndarray]
"""Rows, each the indices of its items."""


class Plan:
    """The batches of all epochs."""

    def __init__(
        self,
        lengths: Int[np.ndarray, " N"],
        config: BatchConfig,
        seed: int,
        draw: Callable[[int], Int[np.ndarray, " _"]] | None = None,
    ):
        """
        Args:
            lengths: of all items, in positions.
            draw: the items of an epoch; None: all.
        """
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self._lengths, self._config, self._seed = lengths, config, seed
        self._draw = draw or (lambda epoch: np.arange(len(lengths)))
        self._counts: list[int] = []
        self._cache: tuple[int, list[Batch]] | None = None
        self.epoch(0)

    def __len__(self) -> int:
        """Number of batches in the first epoch."""
        return self._counts[0]

    def epoch(self, epoch: int) -> list[Batch]:
        """The batches of an epoch, in order."""
        if self._cache is None or self._cache[0] != epoch:
            random = np.random.default_rng((self._seed, epoch))
            items = self._draw(epoch)
            if self._config.packed is None:
                batches = bucketed(items, self._lengths[items], self._config, random)
            else:
                batches = packed(items, self._lengths[items], self._config, random)
            self._cache = (epoch, [batches[i] for i in random.permutation(len(batches))])
            if epoch == len(self._counts):
                self._counts.append(len(batches))
        return self._cache[1]

    def group(self, step: int, size: int) -> tuple[list[Batch], int]:
        """The `size` batches of a step, and how many of them only fill it up: an epoch's last step
        is filled with the epoch's first batches.

        Epochs differ in their number of batches, so the first call for a late step plans all
        epochs before it once: about a second per million items.
        """
        epoch, index = 0, step
        while index >= (groups := self._num_groups(epoch, size)):
            epoch, index = epoch + 1, index - groups
        batches = self.epoch(epoch)
        first = index * size
        chosen = [batches[(first + i) % len(batches)] for i in range(size)]
        return chosen, max(0, first + size - len(batches))

    def num_groups(self, size: int) -> int:
        """Number of steps in the first epoch."""
        return self._num_groups(0, size)

    def _num_groups(self, epoch: int, size: int) -> int:
        if epoch == len(self._counts):
            self.epoch(epoch)
        return -(-self._counts[epoch] // size)

    def _sums(self, batch: Batch) -> Int[np.ndarray, " _"]:
        """Positions of each row, without padding."""
        starts = np.cumsum([0, *map(len, batch[:-1])])
        return np.add.reduceat(self._lengths[np.concatenate(batch)], starts)

    @property
    def padding_share(self) -> float:
        """Share of padding in the first epoch's positions."""
        held = positions = 0
        for batch in self.epoch(0):
            rows = self._sums(batch)
            held += int(rows.sum())
            positions += int(rows.max()) * len(rows)
        return 1 - held / max(1, positions)


def bucketed(
    items: np.ndarray, lengths: np.ndarray, config: BatchConfig, random: np.random.Generator,
    growth: float = BUCKET_GROWTH,
) -> list[Batch]:  # fmt: skip
    """Batches of items of similar lengths, one per row, shuffled within their bucket.

    With infinite `growth` there is one bucket: random batches.
    """
    bucket = np.ceil(np.log(np.maximum(lengths, 1)) / np.log(growth)).astype(int)
    order = np.lexsort((random.random(len(items)), bucket))
    rows, lengths = items[order][:, None], lengths[order]
    # Vectorized per batch: a loop over a million items would take seconds per epoch.
    numbers = np.arange(1, config.max_items + 1)
    batches: list[Batch] = []
    start = 0
    while start < len(rows):
        longest = np.maximum.accumulate(lengths[start : start + config.max_items])
        fitting = np.searchsorted(longest * numbers[: len(longest)], config.positions, "right")
        stop = start + max(1, int(fitting))
        batches.append(list(rows[start:stop]))
        start = stop
    return batches


def packed(
    items: np.ndarray, lengths: np.ndarray, config: BatchConfig, random: np.random.Generator
) -> list[Batch]:
    """Batches of rows of at most `config.packed` positions: best-fit packing of the items in random
    order into the open rows. `max_items` limits rows, and does not apply here."""
    assert config.packed is not None
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of open rows, and which; sorted
    shortest = int(lengths.min(initial=config.packed))
    order = random.permutation(len(items))
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(room, (length, 0))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = config.packed, len(rows)
            rows.append([])
        rows[row].append(index)
        if left - length >= shortest:
            insort(room, (left - length, row))
        if len(room) > OPEN_ROWS:
            room.pop(0)
    arrays = [items[row] for row in rows]
    per_batch = config.positions // config.packed
    return [arrays[i : i + per_batch] for i in range(0, len(arrays), per_batch)]


class Draw:
    """The items of each epoch by task, in proportion to the task weights over all epochs."""

    def __init__(self, pools: list[np.ndarray], counts: list[int], seed: int):
        """
        Args:
            pools: item indices of each task.
            counts: items that an epoch takes of each pool, in turn.
        """
        self._pools, self._counts, self._seed = pools, counts, seed

    def __call__(self, epoch: int) -> Int[np.ndarray, " _"]:
        parts = []
        for number, (pool, count) in enumerate(zip(self._pools, self._counts, strict=True)):
            taken: list[np.ndarray] = []
            start = epoch * count
            while count:  # A count larger than the pool uses it more than once.
                turn, offset = divmod(start, len(pool))
                random = np.random.default_rng((self._seed, number, turn, 1))
                part = random.permutation(pool)[offset : offset + count]
                taken.append(part)
                start, count = start + len(part), count - len(part)
            parts += taken
        return np.concatenate(parts)
