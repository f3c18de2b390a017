"""eval/stats.py: intervals that hold the truth as often as they say."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from simulated_scores import coverage

from eval import stats
from eval.stats import (
    Sums,
    almost_stochastic_order,
    bonferroni,
    detectable_difference,
    paired_difference,
    spread,
    utterances_needed,
    violation_ratio,
)


def test_difference_of_rates_with_an_interval() -> None:
    errors, words = np.array([1.0, 0.0, 3.0, 2.0]), np.array([10.0, 5.0, 10.0, 5.0])
    found = paired_difference(Sums(errors, words), Sums(errors + words / 10, words))
    # Every unit is worse by the same share: nothing is uncertain.
    assert found == pytest.approx((0.1, 0.1, 0.1))
    assert found == paired_difference(Sums(errors, words), Sums(errors + words / 10, words))


@pytest.mark.parametrize("kind", ["means", "rates"])
def test_interval_covers_the_true_difference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/soak has 1,000 draws of the whole bootstrap."""
    monkeypatch.setattr(stats, "NUM_RESAMPLES", 1000)
    assert 0.9 <= coverage(kind, num_draws=200, number=50) <= 0.99


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


def test_violation_ratio_by_hand() -> None:
    """Quantile functions (1, 4) over halves and (0, 2, 3) over thirds: gaps 1, -1, 2, 1 on pieces
    of 1/3, 1/6, 1/6, 1/3, so 1/6 of 1/3 + 1/6 + 4/6 + 1/3."""
    first, second = np.array([4.0, 1.0]), np.array([2.0, 0.0, 3.0])
    assert violation_ratio(first, second) == pytest.approx(1 / 9)
    assert violation_ratio(second, first) == pytest.approx(8 / 9)
    assert violation_ratio(-second, -first) == pytest.approx(1 / 9)
    assert violation_ratio(first + 5, second) == 0
    assert violation_ratio(second, first + 5) == 1
    assert violation_ratio(first, np.repeat(first, 3)) == 0.5


def test_violation_ratio_by_brute_force() -> None:
    """Samples repeated to one size have the same quantile functions."""
    random = np.random.default_rng(0)
    for _ in range(200):
        sizes = random.integers(1, 8, 2)
        first, second = (random.integers(0, 6, size) / 2 for size in sizes)
        gaps = np.sort(np.repeat(first, sizes[1])) - np.sort(np.repeat(second, sizes[0]))
        total = (gaps**2).sum()
        expected = (gaps[gaps < 0] ** 2).sum() / total if total else 0.5
        assert violation_ratio(first, second) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shift", "scale"), [(0.0, 2.0), (0.3, 1.0), (0.5, 2.0), (-0.4, 1.5), (2.0, 1.2)]
)
def test_violation_ratio_of_normals(shift: float, scale: float) -> None:
    """Against the definition's integral over the normals' own quantile functions."""
    random = np.random.default_rng(0)
    levels = (np.arange(20_000) + 0.5) / 20_000
    standard = np.array([NormalDist().inv_cdf(level) for level in levels])
    gaps = shift + scale * standard - standard
    expected = (np.minimum(gaps, 0) ** 2).sum() / (gaps**2).sum()
    first, second = random.normal(shift, scale, 20_000), random.normal(size=15_000)
    assert violation_ratio(first, second) == pytest.approx(expected, abs=0.02)
    if shift == 0:
        assert expected == pytest.approx(0.5)
    if scale == 1:
        assert expected == 0


def test_corrected_epsilon_of_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near 0 if one dominates; at least 0.5 if neither does, whichever is first."""
    monkeypatch.setattr(stats, "NUM_RESAMPLES", 2000)
    random = np.random.default_rng(0)
    low, high, equal = random.normal(size=200), random.normal(1, 1, 200), random.normal(size=200)
    assert almost_stochastic_order(high, low) < 0.02
    assert almost_stochastic_order(low, high) > 0.98
    assert almost_stochastic_order(low, equal) > 0.5
    assert almost_stochastic_order(equal, low) > 0.5
    assert almost_stochastic_order(high + 20, low) == 0
    assert almost_stochastic_order(low, low) > 0.5


def test_correction_is_the_bootstraps_deviation_times_the_normal_quantile() -> None:
    """Against a plain loop with resamples of its own, for samples of different sizes."""
    random = np.random.default_rng(0)
    first, second = random.normal(0.5, 1, 25), random.normal(0, 1, 40)
    resampled = [
        violation_ratio(random.choice(first, 25), random.choice(second, 40)) for _ in range(2000)
    ]
    epsilon = violation_ratio(first, second)
    for alpha in (0.05, 0.01):
        found = almost_stochastic_order(first, second, alpha=alpha)
        assert 0.05 < found < 0.95
        deviation = (found - epsilon) / NormalDist().inv_cdf(1 - alpha)
        assert deviation == pytest.approx(np.std(resampled), rel=0.06)
    same = almost_stochastic_order(first, second, seed=3)
    assert same == almost_stochastic_order(first, second, seed=3)
    assert same != almost_stochastic_order(first, second)


def test_false_claims_of_almost_stochastic_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal distributions: an epsilon below 0.5 is no rare event, one below 0.2 is."""
    monkeypatch.setattr(stats, "NUM_RESAMPLES", 1000)
    random = np.random.default_rng(0)
    epsilons = np.array([
        almost_stochastic_order(random.normal(size=60), random.normal(size=60), seed=trial)
        for trial in range(150)
    ])  # fmt: skip
    assert 0.05 < (epsilons < 0.5).mean() < 0.25
    assert (epsilons < 0.2).mean() < 0.08


@pytest.mark.parametrize("values", [np.zeros(0), np.array([1.0, np.nan])])
def test_scores_that_cannot_be_compared(values: np.ndarray) -> None:
    for refused in (
        lambda: violation_ratio(values, np.ones(2)),
        lambda: almost_stochastic_order(np.ones(2), values),
        lambda: spread(values),
    ):
        with pytest.raises(ValueError, match="at least one finite number"):
            refused()


def test_levels_and_spreads() -> None:
    assert bonferroni(0.05, 10) == pytest.approx(0.005)
    for alpha, comparisons in ((0.0, 1), (1.0, 1), (0.05, 0)):
        with pytest.raises(ValueError, match="alpha"):
            bonferroni(alpha, comparisons)
    with pytest.raises(ValueError, match="alpha"):
        almost_stochastic_order(np.ones(2), np.ones(2), alpha=1.0)
    assert spread(np.array([1.0, 2.0, 6.0])) == (3.0, pytest.approx(math.sqrt(7)), 3)
    assert spread(np.array([2.0])) == (2.0, None, 1)


def test_utterances_needed_by_hand() -> None:
    """Differences (0, 2) have a deviation of sqrt(2): (2.8016 sqrt(2) / d)^2 utterances."""
    ones = np.ones(2)
    first, second = Sums(np.array([5.0, 7.0]), ones), Sums(np.array([5.0, 9.0]), ones)
    assert utterances_needed(first, second) == math.ceil(2 * 2.801585**2)
    assert utterances_needed(first, second, 0.1) == math.ceil(200 * 2.801585**2)
    assert utterances_needed(second, first, -0.1) == math.ceil(200 * 2.801585**2)
    assert utterances_needed(first, second, 100.0) == 2
    assert utterances_needed(first, second, power=0.5) == math.ceil(2 * 1.95996**2)
    assert detectable_difference(first, second) == pytest.approx(2.801585)
    assert utterances_needed(first, first) is None
    with pytest.raises(ValueError, match="2 or more"):
        utterances_needed(Sums(ones[:1], ones[:1]), Sums(2 * ones[:1], ones[:1]))
    with pytest.raises(ValueError, match="denominators"):
        detectable_difference(Sums(ones, 0 * ones), first)
    with pytest.raises(ValueError, match="power"):
        detectable_difference(first, second, power=1.0)


def test_utterances_needed_have_the_power() -> None:
    """Of samples of that size, 80 % have a mean beyond 1.96 standard errors."""
    random = np.random.default_rng(0)
    pilot = random.normal(size=5000)
    needed = utterances_needed(Sums(0 * pilot, pilot * 0 + 1), Sums(pilot, pilot * 0 + 1), 0.3)
    assert needed == pytest.approx((2.80158 / 0.3) ** 2, rel=0.06)
    draws = 0.3 + random.normal(size=(4000, needed))
    found = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(needed)) > 1.96
    assert found.mean() == pytest.approx(0.8, abs=0.03)


def test_detectable_difference_of_rates_is_that_of_the_interval() -> None:
    """2.8016 standard errors, as the bootstrap's interval has 2 times 1.96 of them."""
    random = np.random.default_rng(0)
    words = random.integers(2, 30, 400)
    first, second = (Sums(random.binomial(words, rate) * 1.0, words * 1.0) for rate in (0.1, 0.2))
    found = paired_difference(first, second)
    error = (found.high - found.low) / (2 * 1.95996)
    assert detectable_difference(first, second) == pytest.approx(2.80158 * error, rel=0.03)
