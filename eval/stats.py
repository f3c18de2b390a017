"""Significance of differences: paired bootstrap confidence intervals (Efron 1979)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

NUM_RESAMPLES = 10_000
CHUNK = 1000
"""Resamples computed at once, which bounds memory."""


class Interval(NamedTuple):
    """A value and its confidence interval; None for a single unit."""

    value: float
    low: float | None
    high: float | None


class Sums(NamedTuple):
    """Numerator and denominator of a rate for each unit; for a mean the denominators are counts."""

    numerators: Float[np.ndarray, " N"]
    denominators: Float[np.ndarray, " N"]

    @property
    def rate(self) -> float:
        """Sum of numerators over sum of denominators."""
        return float(self.numerators.sum() / self.denominators.sum())


def paired_difference(
    first: Sums, second: Sums, *, seed: int = 0, level: float = 0.95
) -> Interval:  # fmt: skip
    """Returns the rate of `second` minus that of `first`, with a percentile bootstrap interval.

    Units (items, speakers, ...) are resampled with replacement, the same for both. A single unit
    has no interval.

    Args:
        first, second: the same units in the same order.
        level: confidence level of the interval.

    Raises:
        ValueError: the numbers of units differ, or are 0.
    """
    number = len(first.numerators)
    if number == 0 or number != len(second.numerators):
        raise ValueError(f"{number} and {len(second.numerators)} units; give the same ones")
    if number == 1:
        return Interval(second.rate - first.rate, None, None)
    random = np.random.default_rng(seed)
    parts = np.stack([*first, *second], axis=1).astype(np.float64)  # (N, 4)
    found = []
    for _ in range(NUM_RESAMPLES // CHUNK):
        counts = random.multinomial(number, np.full(number, 1 / number), size=CHUNK)
        sums = counts @ parts  # (CHUNK, 4)
        # A resample of units with empty references alone has no rate.
        defined = (sums[:, 1] > 0) & (sums[:, 3] > 0)
        sums = sums[defined]
        found.append(sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1])
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(second.rate - first.rate, float(low), float(high))


def resampled_rates(columns: Sequence[Sums], *, seed: int = 0) -> Float[np.ndarray, "R C"]:
    """Returns the rates (R,C) of columns that have the same units, in each of `NUM_RESAMPLES`
    bootstrap resamples of the units; NaN where a resample has no denominator.

    Raises:
        ValueError: the numbers of units differ, or are 0.
    """
    sizes = {len(column.numerators) for column in columns}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"columns of {sorted(sizes)} units; give the same ones")
    (number,) = sizes
    random = np.random.default_rng(seed)
    numerators = np.stack([column.numerators for column in columns], axis=1).astype(np.float64)
    denominators = np.stack([column.denominators for column in columns], axis=1)
    found = []
    for _ in range(NUM_RESAMPLES // CHUNK):
        chosen = random.integers(number, size=(CHUNK, number))
        flat = (chosen + np.arange(CHUNK)[:, None] * number).ravel()
        counts = np.bincount(flat, minlength=CHUNK * number).reshape(CHUNK, number)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append((counts @ numerators) / (counts @ denominators.astype(np.float64)))
    return np.concatenate(found)


def crossed_interval(
    scores: Float[np.ndarray, "R N"], *, seed: int = 0, level: float = 0.95
) -> Interval:  # fmt: skip
    """Returns the mean of scores by R raters of N items, with a percentile bootstrap interval that
    resamples both raters and items (Owen 2007, "The pigeonhole bootstrap").

    Raises:
        ValueError: there is no score.
    """
    if not scores.size:
        raise ValueError("there are no scores")
    mean = float(scores.mean())
    if scores.size == 1:
        return Interval(mean, None, None)
    random = np.random.default_rng(seed)
    raters, items = (
        random.multinomial(number, np.full(number, 1 / number), size=NUM_RESAMPLES) / number
        for number in scores.shape
    )
    tail = (1 - level) / 2
    low, high = np.quantile(((raters @ scores) * items).sum(axis=1), [tail, 1 - tail])
    return Interval(mean, float(low), float(high))
