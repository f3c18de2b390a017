"""slm/data/nar.py: prompts, stages and texts, and that ranks see what one rank accumulates."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_slm import SIZES, STAMP, make_rows, quiet, save_base, save_shard, tokenizer_of

from codec.tokens import TokenShard, write_shard
from slm.config import BatchConfig, NARConfig
from slm.data.nar import NARBatch, NARData, text_bytes
from slm.models.nar import NAR
from slm.tokenization.tokenizer import SpeechTextTokenizer

pytestmark = quiet()

CONFIG = NARConfig(codebook_sizes=SIZES, num_layers=1, num_heads=2, width=16, feedforward=16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SpeechTextTokenizer:
    return tokenizer_of(save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> TokenShard:
    return TokenShard.open(save_shard(tmp_path_factory.mktemp("shard") / "a.parquet", 30))


def nar_data(
    shard: TokenShard, tokenizer: SpeechTextTokenizer, seed: int = 0, **changes
) -> NARData:
    config = dataclasses.replace(CONFIG, **changes)
    return NARData.open(shard, tokenizer, config, BatchConfig(positions=250), seed)


def equal(one: NARBatch, other: NARBatch, *without: str) -> bool:
    return all(
        torch.equal(part, getattr(other, name))
        for name, part in one._asdict().items()
        if name not in without and part is not None
    )


def test_draws_are_a_function_of_seed_and_step(shard, tokenizer) -> None:
    one, again = (nar_data(shard, tokenizer, text_dropout=0.5) for _ in range(2))
    again.share(5, 0, 0, 1, 1)
    assert equal(one.share(3, 0, 0, 1, 1).batch, again.share(3, 0, 0, 1, 1).batch)
    other = nar_data(shard, tokenizer, seed=1).share(3, 0, 0, 1, 1).batch
    assert not torch.equal(one.share(3, 0, 0, 1, 1).batch.lengths, other.lengths)


def test_ranks_see_what_one_rank_accumulates(shard, tokenizer) -> None:
    data = nar_data(shard, tokenizer, text_dropout=0.3)
    for step in range(6):  # over the end of an epoch
        ranks = [data.share(step, 0, rank, 3, 1) for rank in range(3)]
        micros = [data.share(step, micro, 0, 1, 3) for micro in range(3)]
        for one, other in zip(ranks, micros, strict=True):
            assert equal(one.batch, other.batch)
            assert one.num_targets == other.num_targets
            assert one.weight == other.weight


def test_the_divisor_is_the_mean_of_targets_over_ranks_and_micro_steps(shard, tokenizer) -> None:
    nar = NAR(CONFIG).eval()
    data = nar_data(shard, tokenizer)
    for step in range(3):
        shares = [data.share(step, micro, rank, 2, 2) for micro in range(2) for rank in range(2)]
        with torch.no_grad():
            targets = sum(float(nar(share.batch).targets.sum()) for share in shares)
        assert [share.num_targets for share in shares] == [targets / 4] * 4


def test_dropped_texts_change_nothing_else(shard, tokenizer) -> None:
    plain = nar_data(shard, tokenizer)
    silent = nar_data(shard, tokenizer, text_dropout=0.5)
    num_dropped = num_items = 0
    for step in range(8):
        one, two = (data.share(step, 0, 0, 1, 1).batch for data in (plain, silent))
        assert equal(one, two, "text", "text_mask")
        dropped = two.text_mask.sum(1) == 1
        kept = ~dropped
        assert torch.equal(two.text_mask[kept].sum(1), one.text_mask[kept].sum(1))
        assert two.text[dropped, 0].tolist() == text_bytes("") * int(dropped.sum())
        num_dropped, num_items = num_dropped + int(dropped.sum()), num_items + len(dropped)
    assert 0.25 < num_dropped / num_items < 0.75


@pytest.mark.parametrize(
    ("share", "most", "expected"),
    [(0.999, 1000, lambda frames: frames - 1), (0.5, 1000, lambda frames: frames // 2),
     (0.5, 7, lambda frames: (frames // 2).clamp(max=7))],
)  # fmt: skip
def test_prompts_leave_a_frame_and_have_a_maximum(shard, tokenizer, share, most, expected) -> None:
    data = nar_data(shard, tokenizer, prompt_share=(share, share), prompt_frames=most)
    for step in range(3):
        batch = data.share(step, 0, 0, 1, 1).batch
        assert torch.equal(batch.prompt_lengths, expected(batch.lengths))


def test_batches_keep_to_their_positions(shard, tokenizer) -> None:
    data = nar_data(shard, tokenizer)
    assert data.num_steps(1, 1) > data.num_steps(2, 2) > 0
    for step in range(data.num_steps(1, 1)):
        batch = data.share(step, 0, 0, 1, 1).batch
        longest = int((batch.text_mask.sum(1) + batch.lengths).max())
        assert len(batch.lengths) * longest <= 250
        assert batch.lengths.max() == batch.codes.shape[2]


def test_draws_of_a_seed_are_pinned(shard, tokenizer) -> None:
    """Resumed runs of older versions have the same batches."""
    batch = nar_data(shard, tokenizer, text_dropout=0.5).share(3, 0, 0, 1, 1).batch
    assert batch.stages.tolist() == [1, 2]
    assert batch.prompt_lengths.tolist() == [5, 16, 9, 11, 4]
    assert (batch.text_mask.sum(1) == 1).tolist() == [True, True, False, False, False]


def test_tokens_that_are_not_the_models_are_refused(tmp_path: Path, shard, tokenizer) -> None:
    other = dataclasses.replace(STAMP, digest="e" * 16)
    path = save_shard(tmp_path / "a.parquet", stamp=other)
    with pytest.raises(ValueError, match=r"a\.parquet: codec tiny \(e{16}\) is not the one"):
        nar_data(TokenShard.open(path), tokenizer)
    for sizes in (SIZES[:2], (*SIZES, 16), ()):
        with pytest.raises(ValueError, match=r"codebooks \(24, 16, 16\) are not the NAR's"):
            nar_data(shard, tokenizer, codebook_sizes=sizes)
    alone = dataclasses.replace(STAMP, codebook_sizes=(24,), num_codebooks=1)
    path = save_shard(tmp_path / "b.parquet", stamp=alone)
    with pytest.raises(ValueError, match="one codebook: set nar=null"):
        nar_data(TokenShard.open(path), tokenizer, codebook_sizes=(24,))


def test_two_codebooks_have_one_stage(tmp_path: Path, tokenizer) -> None:
    stamp = dataclasses.replace(STAMP, num_codebooks=2, codebook_sizes=SIZES[:2])
    two = TokenShard.open(save_shard(tmp_path / "a.parquet", 8, stamp))
    data = nar_data(two, tokenizer, codebook_sizes=SIZES[:2])
    assert data.share(0, 0, 0, 1, 1).batch.stages.tolist() == [1]


@pytest.mark.parametrize(("decay", "shares"), [(1.0, (1, 1, 1)), (0.5, (4, 2, 1))])
def test_upper_codebooks_are_drawn_seldomer(tmp_path: Path, tokenizer, decay, shares) -> None:
    sizes = (*SIZES, 16, 16)
    stamp = dataclasses.replace(STAMP, num_codebooks=5, codebook_sizes=sizes)
    five = TokenShard.open(save_shard(tmp_path / "a.parquet", 8, stamp))
    vocabulary = dataclasses.replace(tokenizer.vocabulary, codec=stamp)
    data = nar_data(
        five,
        SpeechTextTokenizer(vocabulary, tokenizer.text_tokenizer),
        codebook_sizes=sizes,
        stage_decay=decay,
    )
    stages = [data.share(step, 0, 0, 1, 1).batch.stages.tolist() for step in range(700)]
    assert {first for first, _ in stages} == {1}
    counts = np.bincount([second for _, second in stages], minlength=5)[2:]
    expected = 700 * np.array(shares) / sum(shares)
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected.max())


NUM_VOICES = 4


def rule_codes(random: np.random.Generator) -> np.ndarray:
    """Codebook 2 tells the parity of codebook 1, and a voice: any one, but the same throughout."""
    first = random.integers(0, 4, 12)
    return np.stack([first, 2 * random.integers(0, NUM_VOICES) + first % 2])


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, tokenizer: SpeechTextTokenizer) -> NAR:
    """A NAR that was trained on the rule, without texts."""
    random = np.random.default_rng(1)
    sizes = (4, 2 * NUM_VOICES)
    stamp = dataclasses.replace(STAMP, num_codebooks=2, codebook_sizes=sizes)
    path = tmp_path_factory.mktemp("rule") / "a.parquet"
    rows = [
        row._replace(codes=rule_codes(random).astype(np.uint16), text="a")
        for row in make_rows(400, most_frames=13, sizes=sizes)
    ]
    write_shard(path, rows, stamp)
    config = dataclasses.replace(
        CONFIG, codebook_sizes=sizes, feedforward=32, dropout=0.0, prompt_share=(0.0, 0.9),
        text_dropout=1.0,
    )  # fmt: skip
    data = NARData.open(TokenShard.open(path), tokenizer, config, BatchConfig(positions=230), 0)
    torch.manual_seed(1)
    nar = NAR(config)
    optimizer = torch.optim.AdamW(nar.parameters(), lr=2e-2)
    for step in range(200):
        share = data.share(step, 0, 0, 1, 1)
        optimizer.zero_grad()
        (nar(share.batch).nll.sum() / share.num_targets).backward()
        optimizer.step()
    return nar.eval()


def obedience(made: list[np.ndarray]) -> float:
    """Share of frames of the commonest voice, and of the right parity."""
    shares = []
    for first, second in made:
        voice = np.bincount(second // 2).argmax()
        shares.append(np.mean((second // 2 == voice) & (second % 2 == first % 2)))
    return float(np.mean(shares))


def test_what_grows_piece_by_piece_fits_what_is_finished(taught: NAR) -> None:
    random = np.random.default_rng(3)
    first = [rule_codes(random)[0] for _ in range(32)]
    done = [np.zeros((2, 0), np.int64)] * 32
    for start, end in ((0, 1), (1, 4), (4, 12)):
        new = taught.decode(
            [""] * 32, done, [row[start:end] for row in first], temperature=1.0, seeds=range(32)
        )
        done = [np.concatenate(pair, axis=1) for pair in zip(done, new, strict=True)]
    assert obedience(done) > 0.75
