"""slm/data.py: masks cover exactly the target; batches are a pure function of the step."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_slm import SIZES, STAMP, make_rows, quiet, save_base, save_shard

from codec.tokens import TokenShard, write_shard
from slm.alphabet import Alphabet
from slm.ar import load_base
from slm.config import BatchConfig, NARConfig, TaskConfig
from slm.data import IGNORE, ARData, Plan
from slm.nar_data import NARData
from slm.prompts import ASR, TTS
from slm.vocab import Vocabulary

pytestmark = quiet()

BATCH = BatchConfig(positions=300)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    return load_base(save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def vocabulary(base) -> Vocabulary:
    return Vocabulary.of(base.lm, base.tokenizer, STAMP)


def ar_data(path: Path, base, vocabulary: Vocabulary, **kwargs) -> ARData:
    settings = {"tasks": TaskConfig(), "batch": BATCH, "seed": 0, "longest": 256}
    alphabet = Alphabet(vocabulary, base.tokenizer)
    return ARData.open(TokenShard.open(path), alphabet, **{**settings, **kwargs})


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all((x is None and y is None) or bool((x == y).all()) for x, y in pairs)


@pytest.mark.parametrize("task", [TTS, ASR])
def test_labels_cover_exactly_the_target_and_its_end(
    tmp_path: Path, base, vocabulary: Vocabulary, task: int
) -> None:
    data = ar_data(save_shard(tmp_path / "a.parquet", 4), base, vocabulary)
    items = np.arange(3)
    batch = data.collate([np.array([item + 4 * task]) for item in items])
    end = vocabulary.speech_end if task == TTS else vocabulary.eos
    for row, item in enumerate(items):
        labels = batch.labels[row][batch.labels[row] != IGNORE].tolist()
        codes = vocabulary.encode_speech(data.corpus.codes(item)[0]).tolist()
        target = codes if task == TTS else data.alphabet.text_ids("asr", data.corpus.texts)[item]
        # The end is labelled although the padding has the same id.
        assert labels == [*target, end]
        where = np.flatnonzero(batch.labels[row] != IGNORE)
        assert np.array_equal(batch.tokens[row][where[1:]], labels[:-1])


def test_same_step_same_batch_whatever_came_before(tmp_path, base, vocabulary) -> None:
    path = save_shard(tmp_path / "a.parquet", 30)
    one, other = (ar_data(path, base, vocabulary) for _ in range(2))
    for step in range(7):
        one.share(step, 0, 0, 1, 1)
    for step in (11, 3):  # another epoch, and back
        a, b = one.share(step, 0, 0, 1, 1), other.share(step, 0, 0, 1, 1)
        assert a.num_targets == b.num_targets
        assert same(a.batch, b.batch)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_two_ranks_see_what_one_rank_accumulates(tmp_path, base, vocabulary, kind: str) -> None:
    path = save_shard(tmp_path / "a.parquet", 30)
    if kind == "ar":
        data = ar_data(path, base, vocabulary)
    else:
        config, alphabet = NARConfig(codebook_sizes=SIZES), Alphabet(vocabulary, base.tokenizer)
        data = NARData.open(TokenShard.open(path), alphabet, config, BATCH, 0)
    for step in range(5):
        for slot in range(2):
            alone = data.share(step, slot, 0, 1, 2)
            shared = data.share(step, 0, slot, 2, 1)
            assert alone.num_targets == shared.num_targets
            assert same(alone.batch, shared.batch)


def test_num_targets_is_the_steps_mean(tmp_path, base, vocabulary) -> None:
    data = ar_data(save_shard(tmp_path / "a.parquet", 30), base, vocabulary)
    shares = [data.share(2, 0, rank, 2, 1) for rank in range(2)]
    targets = sum(int((share.batch.labels != IGNORE).sum()) for share in shares)
    assert shares[0].num_targets == targets / 2


def test_an_epoch_has_every_item_once_under_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, size=500)
    plan = Plan(lengths, BatchConfig(positions=1000, max_items=20), seed=0)
    for epoch in range(3):
        batches = plan.epoch(epoch)
        items = [np.concatenate(batch) for batch in batches]
        assert sorted(np.concatenate(items)) == list(range(500))
        assert all(len(batch) <= 20 for batch in batches)
        assert max(lengths[rows].max() * len(rows) for rows in items) <= 1000
    assert not np.array_equal(plan.epoch(0)[0], plan.epoch(1)[0])


def test_padding_waste_is_small() -> None:
    lengths = np.random.default_rng(0).integers(50, 500, size=4000)
    plan = Plan(lengths, BatchConfig(positions=8000), seed=0)
    rows = [np.concatenate(batch) for batch in plan.epoch(0)]
    padded = sum(lengths[items].max() * len(items) for items in rows)
    assert plan.padding_share == pytest.approx(1 - lengths.sum() / padded)
    assert plan.padding_share < 0.05


def test_the_last_group_begins_again_and_weighs_nothing_twice(tmp_path, base, vocabulary) -> None:
    data = ar_data(save_shard(tmp_path / "a.parquet", 30), base, vocabulary)
    num_batches = data.num_steps(1, 1)
    world = num_batches - 1
    weights = [
        data.share(step, 0, rank, world, 1).weight for step in range(2) for rank in range(world)
    ]
    assert sum(weights) == num_batches


def test_useless_items_are_skipped_counted_and_listed(
    tmp_path, base, vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows(6)
    rows[1] = rows[1]._replace(text=" ... ")
    rows[2] = rows[2]._replace(text="far " * 100)
    write_shard(tmp_path / "a.parquet", rows, STAMP)
    with caplog.at_level(logging.WARNING):
        data = ar_data(tmp_path / "a.parquet", base, vocabulary)
    assert data.corpus.items.tolist() == [0, 3, 4, 5]
    assert "skipped 1 items without words: item-1" in caplog.text
    assert "skipped 1 items longer than 256 positions: item-2" in caplog.text


def test_nothing_usable_is_an_error(tmp_path, base, vocabulary) -> None:
    path = save_shard(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"as few as 5 positions; raise batch\.positions"):
        ar_data(path, base, vocabulary, batch=BatchConfig(positions=5))


def test_a_shard_of_another_codec_is_refused(tmp_path, base, vocabulary) -> None:
    write_shard(tmp_path / "a.parquet", make_rows(3), dataclasses.replace(STAMP, digest="e" * 16))
    with pytest.raises(ValueError, match="eeeeeeeeeeeeeeee"):
        ar_data(tmp_path / "a.parquet", base, vocabulary)


def test_task_weights(tmp_path, base, vocabulary) -> None:
    path = save_shard(tmp_path / "a.parquet", 30)
    data = ar_data(path, base, vocabulary, tasks=TaskConfig(tts=0.0, asr=1.0))
    for step in range(4):
        assert (data.share(step, 0, 0, 1, 1).batch.tasks[:, 0] == ASR).all()
    both = ar_data(path, base, vocabulary)
    drawn = np.concatenate([both.share(s, 0, 0, 1, 1).batch.tasks[:, 0] for s in range(20)])
    assert 0.3 < drawn.mean() < 0.7


def test_nar_stages_and_prompts(tmp_path, base, vocabulary) -> None:
    config = NARConfig(codebook_sizes=SIZES, prompt_share=(0.2, 0.4), prompt_frames=6)
    shard = TokenShard.open(save_shard(tmp_path / "a.parquet", 30))
    data = NARData.open(shard, Alphabet(vocabulary, base.tokenizer), config, BATCH, 0)
    stages = set()
    for step in range(20):
        batch = data.share(step, 0, 0, 1, 1).batch
        assert batch.stages[0] == 1
        stages.add(tuple(batch.stages.tolist()))
        assert (batch.prompt_lengths < batch.lengths).all()
        assert (batch.prompt_lengths <= 6).all()
    assert stages == {(1, 2)}
