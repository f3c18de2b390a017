"""The 95 % intervals of eval/stats.py cover the true difference in 93 to 97 % of 1,000 draws."""

import pytest
from simulated_scores import coverage


@pytest.mark.parametrize("kind", ["means", "rates"])
def test_bootstrap_intervals_cover(kind: str) -> None:
    found = coverage(kind, num_draws=1000, number=300)
    print(f"{kind}: {found:.3f}")  # noqa: T201
    assert 0.93 <= found <= 0.97
