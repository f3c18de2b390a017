"""Simulated scores of two systems on the same utterances, for the statistics' tests."""

import numpy as np

from eval.stats import Sums, paired_difference

DIFFERENCE = {"means": 0.3, "rates": 0.02}


def draw(kind: str, number: int, random: np.random.Generator) -> tuple[Sums, Sums]:
    """Returns means of correlated normals, or word errors whose rates vary between utterances."""
    if kind == "means":
        ones, shared = np.ones(number), random.normal(size=number)
        first = shared + random.normal(size=number)
        second = shared + random.normal(size=number) + DIFFERENCE[kind]
        return Sums(first, ones), Sums(second, ones)
    words = random.integers(3, 30, number)
    hardness = random.gamma(1.0, 1.0, number)
    errors = (random.poisson(words * rate * hardness) for rate in (0.05, 0.05 + DIFFERENCE[kind]))
    first, second = (Sums(counts.astype(np.float64), words.astype(np.float64)) for counts in errors)
    return first, second


def coverage(kind: str, *, num_draws: int, number: int) -> float:
    """Returns the share of draws whose 95 % interval covers the true difference."""
    random, hits = np.random.default_rng(0), 0
    for seed in range(num_draws):
        found = paired_difference(*draw(kind, number, random), seed=seed)
        hits += found.low <= DIFFERENCE[kind] <= found.high
    return hits / num_draws
