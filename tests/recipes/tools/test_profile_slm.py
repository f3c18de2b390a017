"""The speed of three ways to make batches: the same items and budget, and a table of it."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny_slm import STAMP, quiet, save_base, save_shard, tokenizer_of

from recipes.tools.profile_slm import (
    ProfileSLMConfig,
    Step,
    Way,
    main,
    nar_ways,
    num_tokens,
    table,
    ways,
)
from slm.config import ARConfig, BatchConfig, LoRAConfig, NARConfig, TaskConfig
from slm.models.ar import SpeechLM

pytestmark = quiet()


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    """Precision is a launch's, and accelerate's states are global."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


def test_all_ways_hold_all_items_within_one_budget(tmp_path: Path) -> None:
    save_shard(tmp_path / "a.parquet", 40, most_frames=150)
    (tmp_path / "a.txt").write_text("the cat sat on a mat\n\nfar away")
    config = ProfileSLMConfig(
        train=str(tmp_path / "a.parquet"),
        texts=str(tmp_path / "a.txt"),
        ar=ARConfig(
            base=str(save_base(tmp_path / "base")), lora=LoRAConfig(rank=2),
            tasks=TaskConfig(text=0.1),
        ),
        batch=BatchConfig(positions=1000),
    )  # fmt: skip
    lm = SpeechLM.create(config.ar, STAMP, seed=0)
    compared = ways(config, lm)
    assert list(compared) == ["plain padding", "bucketing", "packing, rows of 256"]
    for way in compared.values():
        rows = [row for batch in way.batches for row in batch]
        assert sorted(np.concatenate(rows)) == list(range(len(way.data.lengths)))
        for batch in way.batches:
            made = way.data.collate(batch)
            assert made.tokens.numel() <= 1000
            assert num_tokens(made) == sum(way.data.lengths[row].sum() for row in batch)
    plain, buckets, packs = (way.padding_share for way in compared.values())
    assert plain > 2 * max(buckets, packs)


def test_rows_may_be_longer_than_what_the_llm_holds(tmp_path: Path) -> None:
    """As in training: each item's positions begin anew. Texts without a weight are left out."""
    save_shard(tmp_path / "a.parquet", 40, most_frames=150)
    (tmp_path / "a.txt").write_text("the cat sat on a mat")
    config = ProfileSLMConfig(
        train=str(tmp_path / "a.parquet"), texts=str(tmp_path / "a.txt"),
        ar=ARConfig(base=str(save_base(tmp_path / "base", kind="gpt2")), lora=LoRAConfig(rank=2)),
        batch=BatchConfig(positions=1200, packed=600),
    )  # fmt: skip
    lm = SpeechLM.create(config.ar, STAMP, seed=0)
    compared = ways(config, lm)
    assert list(compared)[-1] == "packing, rows of 600"
    for way in compared.values():
        assert len(way.data.lengths) == 80
        assert lm(way.data.collate(way.batches[0])).targets.sum() > 0
    with pytest.raises(ValueError, match=r"ar\.tasks\.text needs texts"):
        ProfileSLMConfig(ar=ARConfig(tasks=TaskConfig(text=0.1)))


def test_the_nars_batches_are_the_trainers(tmp_path: Path) -> None:
    save_shard(tmp_path / "a.parquet", 40, most_frames=150)
    nar = NARConfig(codebook_sizes=STAMP.codebook_sizes)
    config = ProfileSLMConfig(
        part="nar", train=str(tmp_path / "a.parquet"), nar=nar, batch=BatchConfig(positions=800)
    )
    tokenizer = tokenizer_of(save_base(tmp_path / "base"))
    compared = nar_ways(config, tokenizer)
    (way,) = compared.values()
    assert 0 < way.padding_share < 0.2
    steps = list(itertools.islice(way.shares(2), 3))
    for step, shares in enumerate(steps):
        assert len(shares) == 2
        for micro, share in enumerate(shares):
            trained = way.data.share(step, micro, 0, 1, 2).batch
            assert torch.equal(share.batch.codes, trained.codes)
            # Codebook 2, and one of the rest: every position is seen twice.
            one = share.batch
            assert num_tokens(one) == 2 * int(one.text_mask.sum() + one.lengths.sum()) <= 1600
        asked = sum(int((one.batch.lengths - one.batch.prompt_lengths).sum()) for one in shares)
        assert round(sum(one.num_targets for one in shares)) == 2 * asked
    with pytest.raises(ValueError, match="only the AR's batches can be packed"):
        nar_ways(replace(config, batch=BatchConfig(positions=800, packed=400)), tokenizer)


def test_the_nar_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_shard(tmp_path / "a.parquet", 12)
    settings = [
        f"train={tmp_path / 'a.parquet'}", f"ar.base={save_base(tmp_path / 'base')}", "part=nar",
        "nar.num_layers=1", "nar.num_heads=2", "nar.width=16", "nar.feedforward=16",
    ]  # fmt: skip
    main([*settings, "batch.positions=400", "steps=2", "warmup=1", "peak_tflops=0.001"])
    printed = capsys.readouterr().out
    row = r"^\| bucketing \| ([\d.]+)% \| (\d+) \| (\d+) \| \d+ \|  \| ([\d.]+)% \|$"
    ((_, tokens, targets, share),) = re.findall(row, printed, re.MULTILINE)
    assert int(tokens) > int(targets) > 0
    assert float(share) > 0
    assert "12 items, 1 x 400 positions a step" in printed
    assert "a NAR of 1 layers, width 16, 2 of its 2 codebooks a step; 1 thread(s)" in printed


def test_medians_and_shares() -> None:
    class Lengths:
        lengths = np.array([3, 1, 4])

    way = Way(Lengths(), [[np.array([0]), np.array([1])], [np.array([2])]])  # pyright: ignore
    steps = [
        Step(0.5, 100, 50, 2**30, 10**12),
        Step(1.0, 100, 50, 2**31, 10**12),
        Step(0.25, 100, 50, 2**30, 10**12),
    ]
    lines = table({"a": way}, {"a": steps}, peak=10.0).splitlines()[2:]
    assert lines == ["| a | 20.0% | 200 | 100 | 500 | 2.00 GiB | 20.0% |"]
    unknown = [step._replace(memory=None, flops=None) for step in steps]
    lines = table({"a": way}, {"a": unknown}, peak=None).splitlines()[2:]
    assert lines == ["| a | 20.0% | 200 | 100 | 500 |  |  |"]


def test_the_program_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_shard(tmp_path / "a.parquet", 12)
    base = save_base(tmp_path / "base")
    settings = [f"train={tmp_path / 'a.parquet'}", f"ar.base={base}", "ar.lora.rank=2"]
    main([*settings, "batch.positions=400", "optim.accumulate=2", "steps=2", "warmup=1",
          "peak_tflops=0.001"])  # fmt: skip
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+)% \| (\d+) \| (\d+) \|", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["plain padding", "bucketing", "packing, rows of 256"]
    assert all(int(row[2]) > int(row[3]) > 0 for row in rows)
    assert "n = 2 steps after 1, by turns; 24 items, 2 x 400 positions a step, seed 0" in printed
    assert re.search(r"2 layers, LoRA of rank 2; 1 thread\(s\), precision no, cpu", printed)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        main([*settings, "steps=0"])
    with pytest.raises(ValueError, match="peak_tflops must be positive"):
        main([*settings, "peak_tflops=0"])
