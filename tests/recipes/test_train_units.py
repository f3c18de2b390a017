"""Acoustic BPE from token shards: the file, its summary, and invalid input."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_slm import STAMP, save_shard

from codec.tokens import TokenShard, write_shard
from recipes import train_units
from recipes.train_units import AcousticBPETrainConfig, sample_utterances
from slm.tokenization.acoustic_bpe import AcousticBPE


def test_a_model_is_trained_and_summarized(tmp_path: Path, capsys) -> None:
    for name, count in (("train", 30), ("dev", 5)):
        save_shard(tmp_path / name / "a.parquet", count)
    train, dev, out = (tmp_path / name for name in ("train", "dev", "units.model"))
    train_units.main([f"tokens={train}", f"dev={dev}", f"out={out}", "size=20"])
    units, summary = AcousticBPE.load(out), json.loads(capsys.readouterr().out.splitlines()[0])
    assert units.num_merges == 20
    units.check_codec(STAMP)
    shards = {"train": TokenShard.open(train), "dev": TokenShard.open(dev)}
    ratios = {
        f"{name}_ratio": sum(len(units.encode(row.codes[0])) for row in shard)
        / shard.num_frames.sum()
        for name, shard in shards.items()
    }
    assert summary.pop("seconds") >= 0
    assert summary == {
        "out": str(out), "codes": 24, "merges": 20, "remove_runs": False,
        **{name: round(float(ratio), 4) for name, ratio in ratios.items()},
    }  # fmt: skip
    assert summary["train_ratio"] < 1


def test_runs_are_removed_and_a_warning_counts_the_merges(tmp_path: Path, capsys, caplog) -> None:
    shard = save_shard(tmp_path / "a.parquet", 1)
    train_units.main(
        [f"tokens={shard}", f"out={tmp_path / 'units'}", "size=500", "remove_runs=true"]
    )
    summary = json.loads(capsys.readouterr().out.splitlines()[0])
    assert summary["remove_runs"]
    assert "dev_ratio" not in summary
    assert summary["merges"] < 500
    assert "merges were found; give more tokens" in caplog.text


def test_a_sample_of_utterances_has_at_most_max_codes(tmp_path: Path) -> None:
    shard = TokenShard.open(save_shard(tmp_path / "a.parquet", 30))
    rows = sample_utterances(shard, 200, seed=0)
    assert 100 < shard.num_frames[rows].sum() <= 200
    assert np.array_equal(rows, sample_utterances(shard, 200, seed=0))
    assert not np.array_equal(rows, sample_utterances(shard, 200, seed=1))
    assert len(sample_utterances(shard, 1, seed=0)) == 1
    assert sample_utterances(shard, 10**6, seed=0).tolist() == list(range(30))


def test_invalid_input_is_refused(tmp_path: Path) -> None:
    shard = save_shard(tmp_path / "a.parquet")
    other = save_shard(tmp_path / "b.parquet", stamp=dataclasses.replace(STAMP, digest="f" * 16))
    out = tmp_path / "units.model"
    with pytest.raises(ValueError, match="export the tokens again"):
        train_units.main([f"tokens={shard}", f"dev={other}", f"out={out}"])
    with pytest.raises(ValueError, match="no such token shard"):
        train_units.main([f"tokens={tmp_path / 'none'}", f"out={out}"])
    write_shard(tmp_path / "c.parquet", [], STAMP)
    for given in ([f"tokens={tmp_path / 'c.parquet'}"],
                  [f"tokens={shard}", f"dev={tmp_path / 'c.parquet'}"]):  # fmt: skip
        with pytest.raises(ValueError, match=r"c\.parquet: no utterance with codes"):
            train_units.main([*given, f"out={out}"])
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        AcousticBPETrainConfig(seed=-1)
    for given in ({"size": 0}, {"most_codes": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            AcousticBPETrainConfig(**given)
    assert not out.exists()
