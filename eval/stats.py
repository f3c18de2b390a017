"""How sure a difference is: paired bootstrap intervals (Efron 1979)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

NUM_RESAMPLES = 10_000
CHUNK = 1000
"""Resamples drawn at once: memory stays bounded."""


class Interval(NamedTuple):
    """A number and where it lies in `level` of the resamples; of a single unit nobody knows."""

    value: float
    low: float | None
    high: float | None


class Sums(NamedTuple):
    """Numerators and denominators of a rate by unit; for a mean the denominators are counts."""

    numerators: Float[np.ndarray, " N"]
    denominators: Float[np.ndarray, " N"]

    @property
    def rate(self) -> float:
        return float(self.numerators.sum() / self.denominators.sum())


def paired_difference(
    first: Sums, second: Sums, *, seed: int = 0, level: float = 0.95
) -> Interval:  # fmt: skip
    """The rate of `second` less that of `first`, both of the same units in the same order.

    Units (items, speakers, ...) are drawn with replacement, for both alike. One unit has no
    interval: it would be drawn every time, and pass for certain.
    """
    number = len(first.numerators)
    if number == 0 or number != len(second.numerators):
        raise ValueError(f"{number} and {len(second.numerators)} units: give the same ones, please")
    if number == 1:
        return Interval(second.rate - first.rate, None, None)
    random = np.random.default_rng(seed)
    parts = np.stack([*first, *second], axis=1).astype(np.float64)  # (N, 4)
    found = []
    for _ in range(NUM_RESAMPLES // CHUNK):
        counts = random.multinomial(number, np.full(number, 1 / number), size=CHUNK)
        sums = counts @ parts  # (CHUNK, 4)
        # A unit without references can be all that is drawn: its rate is no number, and left out.
        whole = (sums[:, 1] > 0) & (sums[:, 3] > 0)
        sums = sums[whole]
        found.append(sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1])
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(second.rate - first.rate, float(low), float(high))
