"""batching.py: every item in its turn, under the budget, as a pure function of the step."""

import math
from itertools import pairwise

import numpy as np
import pytest

from slm.config import BatchConfig
from slm.data.batching import Draw, Plan, bucketed, packed

LENGTHS = np.random.default_rng(0).integers(5, 200, size=500)
CONFIGS = {
    "bucketed": BatchConfig(positions=1000, max_items=20),
    "packed": BatchConfig(positions=1000, packed=250),
}


def flat(batches: list[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([row for batch in batches for row in batch])


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_epoch_has_every_item_once_under_the_budget(kind: str) -> None:
    config = CONFIGS[kind]
    plan = Plan(LENGTHS, config, seed=0)
    for epoch in range(3):
        batches = plan.epoch(epoch)
        assert sorted(flat(batches)) == list(range(500))
        for batch in batches:
            rows = [LENGTHS[row].sum() for row in batch]
            assert max(rows) * len(rows) <= config.positions
            if config.packed is None:
                assert len(batch) <= config.max_items
                assert all(len(row) == 1 for row in batch)
            else:
                assert max(rows) <= config.packed
    assert not np.array_equal(flat(plan.epoch(0)), flat(plan.epoch(1)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_group_depends_on_nothing_but_its_step(kind: str) -> None:
    one, other = (Plan(LENGTHS, CONFIGS[kind], seed=3) for _ in range(2))
    for step in (0, 1, 60, 7, 200, 0):  # Epochs later, and back.
        group, fill = one.group(step, 3)
        again, fill_again = other.group(step, 3)
        assert np.array_equal(flat(group), flat(again))
        assert fill == fill_again
    different = Plan(LENGTHS, CONFIGS[kind], seed=4)
    assert not np.array_equal(flat(one.epoch(0)), flat(different.epoch(0)))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", [1, 4, 7])
def test_groups_are_the_epochs_one_after_the_other(kind: str, size: int) -> None:
    plan = Plan(LENGTHS, CONFIGS[kind], seed=0)
    step = 0
    for epoch in range(3):
        batches = plan.epoch(epoch)
        seen: list[np.ndarray] = []
        while len(seen) < len(batches):
            group, fill = plan.group(step, size)
            seen += [flat([batch]) for batch in group[: size - fill]]
            step += 1
        # What fills up the last step is the epoch's own beginning.
        assert np.array_equal(np.concatenate(seen), flat(batches))
        assert fill == -len(batches) % size
    assert plan.num_groups(size) == math.ceil(len(plan) / size)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_padding_is_what_the_rows_do_not_hold(kind: str) -> None:
    plan = Plan(LENGTHS, CONFIGS[kind], seed=0)
    held, positions = LENGTHS.sum(), 0
    for batch in plan.epoch(0):
        positions += max(LENGTHS[row].sum() for row in batch) * len(batch)
    assert plan.padding_share == pytest.approx(1 - held / positions)


def test_bucketing_and_packing_waste_little_where_random_batches_waste_much() -> None:
    lengths = np.random.default_rng(0).integers(50, 500, size=4000)
    shares = {
        "bucketed": Plan(lengths, BatchConfig(positions=8000), seed=0).padding_share,
        "packed": Plan(lengths, BatchConfig(positions=8192, packed=2048), seed=0).padding_share,
    }
    assert max(shares.values()) < 0.05
    random = np.random.default_rng(0)
    batches = bucketed(
        np.arange(4000), lengths, BatchConfig(positions=8000), random, growth=math.inf
    )
    assert sorted(flat(batches)) == list(range(4000))
    padded = sum(max(lengths[row].max() for row in batch) * len(batch) for batch in batches)
    assert 1 - lengths.sum() / padded > 0.3


def test_a_batch_takes_what_fits_and_no_less() -> None:
    """Item by item: the next one would break the budget of positions or of items."""
    config = BatchConfig(positions=700, max_items=9)
    batches = bucketed(np.arange(500), LENGTHS, config, np.random.default_rng(0))
    for batch, following in pairwise(batches):
        grown = LENGTHS[np.concatenate([*batch, following[0]])]
        assert len(batch) == config.max_items or grown.max() * len(grown) > config.positions
    assert {len(batch) == 9 for batch in batches} == {True, False}
    # What is longer than the budget has a batch to itself.
    alone = bucketed(np.arange(3), np.array([800, 5, 900]), config, np.random.default_rng(0))
    assert [len(batch) for batch in alone] == [1, 1, 1]
    assert bucketed(np.arange(0), np.arange(0), config, np.random.default_rng(0)) == []


def test_a_seed_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        Plan(LENGTHS, CONFIGS["packed"], seed=-1)


def test_packing_splits_no_item_and_fills_rows() -> None:
    config = BatchConfig(positions=100, packed=10)
    lengths = np.array([6, 4, 7, 3, 10, 5, 5])
    batches = packed(np.arange(10, 17), lengths, config, np.random.default_rng(0))
    assert sorted(flat(batches)) == list(range(10, 17))
    (rows,) = batches
    assert len(rows) <= 5  # Four rows would hold all.
    assert all(lengths[row - 10].sum() <= 10 for row in rows)


def test_many_open_rows_are_bounded() -> None:
    # Nothing fits beside anything else.
    lengths = np.full(2000, 6)
    batches = packed(
        np.arange(2000), lengths, BatchConfig(positions=10, packed=10), np.random.default_rng(0)
    )
    assert len(batches) == 2000


def test_shares_of_tasks_are_exact_over_epochs() -> None:
    pools = [np.arange(10), np.arange(10, 20), np.arange(20, 23)]
    draw = Draw(pools, [10, 5, 7], seed=0)
    counts = np.zeros(23, dtype=int)
    for epoch in range(6):
        counts += np.bincount(draw(epoch), minlength=23)
        assert (counts[:10] == epoch + 1).all()
        assert counts[10:20].sum() == 5 * (epoch + 1)
        assert counts[20:].sum() == 7 * (epoch + 1)
        # No item comes again before all others of its task have come.
        assert counts[10:20].max() - counts[10:20].min() <= 1
        assert counts[20:].max() - counts[20:].min() <= 1
    assert (counts[10:20] == 3).all()
    assert np.array_equal(draw(5), Draw(pools, [10, 5, 7], seed=0)(5))


def test_the_fullest_of_too_many_open_rows_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.data.batching.OPEN_ROWS", 1)
    config = BatchConfig(positions=100, packed=10)
    order = np.random.default_rng(0).permutation(4)
    lengths = np.zeros(4, int)
    # 7 opens a second row and closes it, so that 4 joins 6, and 3 has no room beside 7.
    lengths[order] = (6, 7, 4, 3)
    (rows,) = packed(np.arange(4), lengths, config, np.random.default_rng(0))
    assert [lengths[row].tolist() for row in rows] == [[6, 4], [7], [3]]


def test_epochs_of_a_seed_are_pinned() -> None:
    """Resumed runs of older versions have the same batches."""
    draw = Draw([np.arange(6), np.arange(6, 9)], [4, 2], seed=3)
    assert [draw(epoch).tolist() for epoch in (0, 1)] == [[0, 1, 3, 5, 6, 8], [4, 2, 3, 2, 7, 7]]
    plan = Plan(np.array([5, 5, 9, 9, 20]), BatchConfig(positions=20), seed=3)
    assert [np.concatenate(batch).tolist() for batch in plan.epoch(1)] == [[0, 1], [4], [2, 3]]
