"""slm/data/ar.py: masks cover exactly the target; batches are a pure function of the step."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_slm import SIZES, STAMP, make_rows, quiet, save_base, save_shard

from codec.tokens import TokenShard, write_shard
from slm.config import BatchConfig, NARConfig, TaskConfig
from slm.data.ar import IGNORE, ARData, Start
from slm.data.corpus import usable
from slm.data.nar import NARData
from slm.data.sequences import ASR, CONTINUATION, TASKS, TEXT, TTS, layout
from slm.models.ar import load_base
from slm.tokenization.tokenizer import SpeechTextTokenizer
from slm.tokenization.vocabulary import Vocabulary

pytestmark = quiet()

BATCH = BatchConfig(positions=300)
PACKED = BatchConfig(positions=480, packed=160)
ALL = TaskConfig(tts=1.0, asr=1.0, continuation=1.0, text=1.0)
TEXTS = ["the cat sat on a mat", "far away from " * 20]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    return load_base(save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def vocabulary(base) -> Vocabulary:
    return Vocabulary.of(base.lm, base.tokenizer, STAMP)


def ar_data(path: Path, base, vocabulary: Vocabulary, **kwargs) -> ARData:
    settings = {"tasks": TaskConfig(), "batch": BATCH, "seed": 0, "longest": 256}
    tokenizer = SpeechTextTokenizer(vocabulary, base.tokenizer)
    return ARData.open(TokenShard.open(path), tokenizer, **{**settings, **kwargs})


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
        target = codes if task == TTS else data.tokenizer.text_ids("asr", data.corpus.texts)[item]
        # The end is labelled although the padding has the same id.
        assert labels == [*target, end]
        where = np.flatnonzero(batch.labels[row] != IGNORE)
        assert np.array_equal(batch.tokens[row][where[1:]], labels[:-1])


def test_packed_items_have_the_targets_of_their_layouts(tmp_path, base, vocabulary) -> None:
    path = save_shard(tmp_path / "a.parquet", 12)
    data = ar_data(path, base, vocabulary, batch=PACKED, tasks=ALL, texts=TEXTS)
    seen = np.zeros(len(data.lengths), dtype=int)
    for step in range(data.num_steps(1, 1)):
        (batch,), _ = data._plan.group(step, 1)
        made = data.collate(batch)
        assert made.documents is not None
        assert made.tokens.shape[1] <= 160
        for row, items in enumerate(batch):
            documents = made.documents[row]
            assert documents.max() == len(items)
            assert (made.labels[row][documents == 0] == IGNORE).all()
            for number, item in enumerate(items, start=1):
                seen[item] += 1
                where = (documents == number).nonzero()[:, 0]
                one = data.layout(item)
                assert made.tokens[row][where].tolist() == one.tokens.tolist()
                # The last token of an item has no label, nor has what stands before its target.
                labels = made.labels[row][where].tolist()
                target = one.tokens[one.num_context :].tolist()
                assert labels == [*[IGNORE] * (one.num_context - 1), *target, IGNORE]
                assert target[-1] in (vocabulary.eos, vocabulary.speech_end) or len(target) > 50
                assert (made.tasks[row][where] == data._tasks[item]).all()
    assert (seen[: 3 * 12] == 1).all()


def test_every_layout_is_its_utterances(tmp_path, base, vocabulary) -> None:
    rows = make_rows(12)
    write_shard(tmp_path / "a.parquet", rows, STAMP)
    data = ar_data(tmp_path / "a.parquet", base, vocabulary, tasks=ALL, texts=TEXTS)
    for place, task in enumerate((TTS, ASR, CONTINUATION)):
        for index, row in enumerate(rows):
            (text,) = data.tokenizer.text_ids(TASKS[task], [row.text])
            speech = vocabulary.encode_speech(row.codes[0])
            one, expected = data.layout(12 * place + index), layout(task, vocabulary, text, speech)
            assert one.tokens.tolist() == expected.tokens.tolist()
            assert one.num_context == expected.num_context
            assert data.lengths[12 * place + index] == len(one.tokens)
            targets = data._targets[12 * place + index]
            assert targets == len(one.tokens) - one.num_context


@pytest.mark.parametrize("packed", [True, False])
def test_texts_come_in_pieces_that_fit(tmp_path, base, vocabulary, packed: bool) -> None:
    path = save_shard(tmp_path / "a.parquet", 12)
    batch = PACKED if packed else BATCH
    data = ar_data(path, base, vocabulary, batch=batch, tasks=ALL, texts=TEXTS)
    pieces = [data.layout(item) for item in range(36, len(data.lengths))]
    longest = 160 if packed else 256
    assert all(one.num_context == 1 and len(one.tokens) <= longest for one in pieces)
    ids = data.tokenizer.text_ids("text", TEXTS)
    whole = [token for text in ids for token in (*text, vocabulary.eos)]
    assert np.concatenate([one.tokens for one in pieces]).tolist() == whole
    assert [len(one.tokens) for one in pieces] == data.lengths[36:].tolist()


def test_the_weight_of_texts_is_in_positions(tmp_path, base, vocabulary) -> None:
    path = save_shard(tmp_path / "a.parquet", 30)
    texts = ["the cat sat on a mat"] * 50
    tasks = TaskConfig(tts=1.0, asr=0.0, text=0.5)
    data = ar_data(path, base, vocabulary, tasks=tasks, texts=texts)
    drawn = np.concatenate([row for batch in data._plan.epoch(0) for row in batch])
    positions = [data.lengths[drawn[data._tasks[drawn] == task]].sum() for task in (TTS, TEXT)]
    assert positions[1] / positions[0] == pytest.approx(0.5, rel=0.05)


def test_texts_and_their_weight_belong_together(tmp_path, base, vocabulary) -> None:
    path = save_shard(tmp_path / "a.parquet")
    for settings in ({"texts": TEXTS}, {"tasks": ALL}):
        with pytest.raises(ValueError, match=r"ar\.tasks\.text and texts belong together"):
            ar_data(path, base, vocabulary, **settings)
    with pytest.raises(ValueError, match="no piece of two tokens"):
        ar_data(path, base, vocabulary, tasks=ALL, texts=[""])


@pytest.mark.parametrize("packed", [True, False])
def test_a_task_of_half_the_weight_has_every_item_once_in_two_epochs(
    tmp_path, base, vocabulary, packed: bool
) -> None:
    path = save_shard(tmp_path / "a.parquet", 30)
    tasks, batch = TaskConfig(tts=1.0, asr=0.5), PACKED if packed else BATCH
    data = ar_data(path, base, vocabulary, tasks=tasks, batch=batch)
    counts = np.zeros(60, dtype=int)
    for epoch in range(2):
        drawn = [row for rows in data._plan.epoch(epoch) for row in rows]
        counts += np.bincount(np.concatenate(drawn), minlength=60)
    assert (counts[:30] == 2).all()
    assert (counts[30:] == 1).all()


def test_the_first_epochs_are_of_the_chosen_rows_and_the_texts(tmp_path, base, vocabulary) -> None:
    path = save_shard(tmp_path / "a.parquet", 10)
    rows = np.arange(10) >= 6
    tokenizer, corpus = (
        SpeechTextTokenizer(vocabulary, base.tokenizer),
        usable(TokenShard.open(path)),
    )

    def begun(chosen: np.ndarray, epochs: float = 2.0) -> ARData:
        start = Start(chosen, epochs)
        return ARData(corpus, tokenizer, ALL, BATCH, 0, longest=256, texts=TEXTS, start=start)

    data = begun(rows)
    number, forms = 10, 3  # tts, asr, continuation
    frames = data.corpus.num_frames
    for epoch in range(4):
        items = np.concatenate([row for rows in data._plan.epoch(epoch) for row in rows])
        spoken = items[items < forms * number] % number
        assert set(spoken) == set(range(6 if epoch < 2 else 0, 10))
        assert (items >= forms * number).any()
        if epoch == 0:
            assert data.num_frames == frames[spoken].sum()
    sizes = [[sum(map(len, rows)) for rows in begun(rows, 1.5)._plan.epoch(k)] for k in range(3)]
    clips, half, whole = map(sum, sizes)
    assert half == round(clips / 2)
    assert whole > clips
    short = begun(rows, 0.5)
    items = np.concatenate([row for rows in short._plan.epoch(0) for row in rows])
    spoken = items[items < forms * number] % number
    assert len(items) == half
    assert set(spoken) <= set(range(6, 10))
    assert short.num_frames == frames[spoken].sum()
    with pytest.raises(ValueError, match="no clip is usable"):
        begun(np.zeros(10, dtype=bool))


def test_same_step_same_batch_whatever_came_before(tmp_path, base, vocabulary) -> None:
    path = save_shard(tmp_path / "a.parquet", 30)
    one, other = (ar_data(path, base, vocabulary) for _ in range(2))
    for step in range(7):
        one.share(step, 0, 0, 1, 1)
    for step in (11, 3):  # another epoch, and back
        a, b = one.share(step, 0, 0, 1, 1), other.share(step, 0, 0, 1, 1)
        assert a.num_targets == b.num_targets
        assert same(a.batch, b.batch)


@pytest.mark.parametrize("kind", ["ar", "packed", "nar"])
def test_two_ranks_see_what_one_rank_accumulates(tmp_path, base, vocabulary, kind: str) -> None:
    path = save_shard(tmp_path / "a.parquet", 30)
    if kind == "nar":
        config, tokenizer = (
            NARConfig(codebook_sizes=SIZES),
            SpeechTextTokenizer(vocabulary, base.tokenizer),
        )
        data = NARData.open(TokenShard.open(path), tokenizer, config, BATCH, 0)
    else:
        data = ar_data(path, base, vocabulary, batch=PACKED if kind == "packed" else BATCH)
    for step in range(5):
        for slot in range(2):
            alone = data.share(step, slot, 0, 1, 2)
            shared = data.share(step, 0, slot, 2, 1)
            assert alone.num_targets == shared.num_targets
            assert same(alone.batch, shared.batch)


@pytest.mark.parametrize("packed", [True, False])
def test_num_targets_is_the_steps_mean(tmp_path, base, vocabulary, packed: bool) -> None:
    path = save_shard(tmp_path / "a.parquet", 30)
    settings = {"tasks": ALL, "texts": TEXTS, "batch": PACKED if packed else BATCH}
    data = ar_data(path, base, vocabulary, **settings)
    shares = [data.share(2, 0, rank, 2, 1) for rank in range(2)]
    targets = sum(int((share.batch.labels != IGNORE).sum()) for share in shares)
    assert shares[0].num_targets == targets / 2


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
    assert "skipped 1 item without words: item-1" in caplog.text
    assert "skipped 1 item longer than 256 positions: item-2" in caplog.text


def test_nothing_usable_is_an_error(tmp_path, base, vocabulary) -> None:
    path = save_shard(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"at most 5 positions, the minimum of batch\.positions"):
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
    data = NARData.open(shard, SpeechTextTokenizer(vocabulary, base.tokenizer), config, BATCH, 0)
    stages = set()
    for step in range(20):
        batch = data.share(step, 0, 0, 1, 1).batch
        assert batch.stages[0] == 1
        stages.add(tuple(batch.stages.tolist()))
        assert (batch.prompt_lengths < batch.lengths).all()
        assert (batch.prompt_lengths <= 6).all()
    assert stages == {(1, 2)}
