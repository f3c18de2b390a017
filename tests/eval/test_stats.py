"""eval/stats.py: intervals that hold the truth as often as they say."""

import numpy as np
import pytest

from eval import stats
from eval.stats import Sums, paired_difference


def test_difference_of_rates_with_an_interval() -> None:
    errors, words = np.array([1.0, 0.0, 3.0, 2.0]), np.array([10.0, 5.0, 10.0, 5.0])
    found = paired_difference(Sums(errors, words), Sums(errors + words / 10, words))
    # Every unit is worse by the same share: nothing is uncertain.
    assert found == pytest.approx((0.1, 0.1, 0.1))
    assert found == paired_difference(Sums(errors, words), Sums(errors + words / 10, words))


def test_interval_covers_the_true_difference() -> None:
    random, hits, ones = np.random.default_rng(0), 0, np.ones(40)
    for trial in range(60):
        first = random.normal(size=40)
        second = first + 0.3 + random.normal(size=40)
        found = paired_difference(Sums(first, ones), Sums(second, ones), seed=trial)
        hits += found.low <= 0.3 <= found.high
    assert 52 <= hits <= 60


def test_units_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="2 and 3 units"):
        paired_difference(Sums(np.ones(2), np.ones(2)), Sums(np.ones(3), np.ones(3)))


def test_single_unit_has_no_interval() -> None:
    one = np.ones(1)
    assert paired_difference(Sums(one, one), Sums(2 * one, one)) == (1.0, None, None)
    both = np.ones(2)
    assert paired_difference(Sums(both, both), Sums(2 * both, both)) == (1.0, 1.0, 1.0)


def test_the_interval_is_pinned() -> None:
    """By default of 95 % and with seed 0."""
    random = np.random.default_rng(0)
    words = random.integers(1, 20, 30)
    first, second = (Sums(random.binomial(words, rate) * 1.0, words * 1.0) for rate in (0.1, 0.2))
    for given, low, high in (
        ({}, 0.011940, 0.118841),
        ({"level": 0.5}, 0.044510, 0.081818),
        ({"seed": 1}, 0.010417, 0.119266),
    ):
        found = paired_difference(first, second, **given)
        assert found == pytest.approx((second.rate - first.rate, low, high), abs=1e-6)


def test_resamples_without_a_reference_do_not_count() -> None:
    """Of two units, one without a reference: a resample has the other once or twice."""
    one, zero = np.array([1.0, 3.0]), np.zeros(2)
    some, every = Sums(one, np.array([1.0, 0.0])), Sums(zero, np.ones(2))
    assert paired_difference(some, every) == (-4, -4, -1)
    assert paired_difference(every, some) == (4, 1, 4)


def test_resampled_rates_are_paired_and_agree_with_paired_difference() -> None:
    random = np.random.default_rng(0)
    words = random.integers(1, 20, 60).astype(float)
    first = Sums(random.integers(0, 4, 60).astype(float), words)
    second = Sums(first.numerators + words / 10, words)
    rates = stats.resampled_rates([first, second])
    assert rates.shape == (stats.NUM_RESAMPLES, 2)
    assert np.allclose(rates[:, 1] - rates[:, 0], 0.1)
    alone = paired_difference(Sums(np.zeros(60), np.ones(60)), first)
    assert np.quantile(rates[:, 0], [0.025, 0.975]) == pytest.approx(alone[1:], abs=0.004)
    with pytest.raises(ValueError, match=r"columns of \[59, 60\] units"):
        stats.resampled_rates([first, Sums(words[1:], words[1:])])


def test_crossed_interval_has_the_variance_of_raters_and_items() -> None:
    random = np.random.default_rng(0)
    raters, items = random.normal(0, 3, 40), random.normal(0, 1, 50)
    found = stats.crossed_interval(50 + raters[:, None] + items[None])
    assert found.value == pytest.approx(50 + raters.mean() + items.mean())
    assert found.low is not None
    assert found.high is not None
    expected = 1.96 * np.sqrt(raters.var() / 40 + items.var() / 50)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.05)
    assert stats.crossed_interval(np.array([[3.0]])) == (3.0, None, None)
    with pytest.raises(ValueError, match="no scores"):
        stats.crossed_interval(np.zeros((0, 3)))
