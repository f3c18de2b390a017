"""Learning rates at the corners of warm-up, cosine and decay."""

import pytest

from codec.training.config import OptimConfig
from codec.training.schedule import learning_rate


def rates(steps: list[int], **changes) -> list[float]:
    config = OptimConfig(lr=0.8, warmup_steps=4, steps=12, **changes)
    return [learning_rate(step, config) for step in steps]


def test_warm_up_is_linear_and_the_cosine_ends_at_its_share() -> None:
    found = rates([0, 1, 3, 4, 6, 8, 12, 99], final_lr_share=0.25)
    quarter = 0.25 + 0.75 * (2 + 2**0.5) / 4
    expected = [0.2, 0.4, 0.8, 0.8, 0.8 * quarter, 0.8 * (0.25 + 0.75 * 0.5), 0.2, 0.2]
    assert found == pytest.approx(expected)


def test_decay_is_a_staircase() -> None:
    found = rates([3, 4, 6, 7, 9, 10], schedule="decay", decay=0.5, decay_steps=3)
    assert found == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.4, 0.2])


def test_a_run_may_lack_a_warm_up_and_have_another_peak() -> None:
    config = OptimConfig(lr=0.8, warmup_steps=0, steps=0, final_lr_share=0.25)
    assert learning_rate(0, config, peak=0.0) == 0
    assert learning_rate(0, config, peak=2.0) == 2
    assert learning_rate(1, config) == pytest.approx(0.2)
