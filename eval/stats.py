"""Significance of differences: paired bootstrap confidence intervals (Efron 1979), almost
stochastic order (del Barrio et al. 2018), and the number of utterances that a difference needs.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
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


class Spread(NamedTuple):
    """Mean and sample standard deviation of utterances; None for a single one."""

    mean: float
    deviation: float | None
    number: int


def spread(values: Float[np.ndarray, " N"]) -> Spread:
    """Returns the mean and the standard deviation (divisor N - 1) of scores of utterances.

    Raises:
        ValueError: there is no score.
    """
    _check_scores(values)
    deviation = float(values.std(ddof=1)) if values.size > 1 else None
    return Spread(float(values.mean()), deviation, values.size)


def bonferroni(alpha: float, comparisons: int) -> float:
    """Returns the significance level of each of several comparisons (pairs times measures), with
    which the probability of any false one is at most alpha."""
    if not 0 < alpha < 1 or comparisons < 1:
        raise ValueError(f"alpha {alpha} must be within (0, 1) and comparisons {comparisons} >= 1")
    return alpha / comparisons


def violation_ratio(first: Float[np.ndarray, " N"], second: Float[np.ndarray, " M"]) -> float:
    """Returns epsilon, the share of the squared distance of the quantile functions where `first` is
    below `second` (del Barrio et al. 2018; Dror et al. 2019, section 3.3); high scores are better.

    0: `first` dominates stochastically; 1: `second` does; 0.5: equal samples. The integral over the
    step functions is exact, also for samples of different sizes.

    Raises:
        ValueError: a sample is empty or not finite.
    """
    _check_scores(first)
    _check_scores(second)
    steps = _QuantileSteps(first.size, second.size)
    return float(steps.violation(np.sort(first)[np.newaxis], np.sort(second)[np.newaxis])[0])


def almost_stochastic_order(
    first: Float[np.ndarray, " N"],
    second: Float[np.ndarray, " M"],
    *,
    alpha: float = 0.05,
    seed: int = 0,
) -> float:
    """Returns the confidence-corrected epsilon: with confidence 1 - alpha the violation ratio of
    `first` over `second` is at most this (Dror et al. 2019, section 3.3: epsilon_min). High scores
    are better, so negate error rates.

    0: `first` dominates; below 0.5: it is almost stochastically better (DM-Codec, arXiv 2410.15017,
    table 2); otherwise not shown. The standard deviation of epsilon is that of NUM_RESAMPLES
    bootstrap resamples of each sample by itself: that they are of the same utterances is not used.

    Args:
        alpha: significance level; for several comparisons that of `bonferroni`.

    Raises:
        ValueError: a sample is empty or not finite, or alpha is not within (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be within (0, 1), got {alpha}")
    epsilon = violation_ratio(first, second)
    random = np.random.default_rng(seed)
    steps = _QuantileSteps(first.size, second.size)
    ordered = np.sort(first), np.sort(second)
    found = []
    for _ in range(NUM_RESAMPLES // CHUNK):
        found.append(
            steps.violation(
                *(
                    sample[np.sort(random.integers(sample.size, size=(CHUNK, sample.size)), axis=1)]
                    for sample in ordered
                )
            )
        )
    corrected = epsilon - np.concatenate(found).std() * NormalDist().inv_cdf(alpha)
    return float(np.clip(corrected, 0, 1))


class _QuantileSteps:
    """The pieces of (0, 1) on which the quantile functions of two samples are constant."""

    def __init__(self, first_size: int, second_size: int) -> None:
        # In units of 1 / (N M), so that equal breakpoints are equal.
        ends = np.union1d(
            np.arange(1, first_size + 1) * second_size, np.arange(1, second_size + 1) * first_size
        )
        starts = np.concatenate([[0], ends[:-1]])
        self.widths = (ends - starts) / (first_size * second_size)
        self.first, self.second = starts // second_size, starts // first_size

    def violation(
        self, first: Float[np.ndarray, "R N"], second: Float[np.ndarray, "R M"]
    ) -> Float[np.ndarray, " R"]:
        """Returns the violation ratios of rows of sorted samples; of equal rows 0.5."""
        gaps = first[:, self.first] - second[:, self.second]  # (R, pieces)
        total = gaps**2 @ self.widths
        violated = np.minimum(gaps, 0) ** 2 @ self.widths
        return np.divide(violated, total, out=np.full_like(total, 0.5), where=total > 0)


def _check_scores(values: np.ndarray) -> None:
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"scores must be at least one finite number, got {values.size} scores")


def utterances_needed(
    first: Sums,
    second: Sums,
    difference: float | None = None,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
) -> int | None:
    """Returns how many utterances a two-sided paired test needs to find a difference with
    probability `power`, by the normal approximation: ((z_(1-alpha/2) + z_power) s / difference)^2.

    s is the standard deviation of the paired differences; for rates of sums, of the utterances'
    linearized contributions.

    Args:
        difference: of the rates; by default the observed one.

    Returns:
        None if the difference is 0.

    Raises:
        ValueError: fewer than 2 units, different ones, or no denominator.
    """
    if difference is None:
        difference = second.rate - first.rate
    if difference == 0:
        return None
    scale = _paired_deviation(first, second) * _normal_quantiles(power, alpha)
    return max(2, math.ceil((scale / difference) ** 2))


def detectable_difference(
    first: Sums, second: Sums, *, power: float = 0.8, alpha: float = 0.05
) -> float:
    """Returns the smallest difference that a two-sided paired test of these utterances finds with
    probability `power`: the inverse of `utterances_needed`."""
    scale = _paired_deviation(first, second) * _normal_quantiles(power, alpha)
    return scale / math.sqrt(len(first.numerators))


def _normal_quantiles(power: float, alpha: float) -> float:
    if not (0 < alpha < 1 and 0 < power < 1):
        raise ValueError(f"power {power} and alpha {alpha} must be within (0, 1)")
    return NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)


def _paired_deviation(first: Sums, second: Sums) -> float:
    """Returns the standard deviation s of one utterance's contribution to the difference of rates,
    whose standard error is s / sqrt(N)."""
    number = len(first.numerators)
    if number < 2 or number != len(second.numerators):
        raise ValueError(
            f"{number} and {len(second.numerators)} units; give the same ones, 2 or more"
        )
    if first.denominators.sum() <= 0 or second.denominators.sum() <= 0:
        raise ValueError("the denominators of a system are all 0")
    parts = [
        (one.numerators - one.rate * one.denominators) / one.denominators.mean()
        for one in (first, second)
    ]
    return float((parts[1] - parts[0]).std(ddof=1))
