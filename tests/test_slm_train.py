"""slm/train.py: the loop learns, resumes to the bit, and means the same on one rank and two."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny_slm import SIZES, STAMP, alphabet_of, quiet, save_base, save_shard

from codec.tokens import TokenShard
from recipes.common import start_run
from slm.ar import SpeechLM
from slm.config import ARConfig, BatchConfig, LoRAConfig, NARConfig, OptimConfig, TaskConfig
from slm.data import ARData
from slm.nar import NAR
from slm.nar_data import NARData
from slm.train import ar_step, evaluate, fit, gather, learning_rate, nar_step

pytestmark = [
    *quiet(),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

BATCH = BatchConfig(positions=250)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def parts(kind: str, base: Path, path: Path):
    """A model, its step and its data, always the same."""
    shard = TokenShard.open(path)
    if kind == "nar":
        config = NARConfig(
            codebook_sizes=SIZES, num_layers=1, num_heads=2, width=16, feedforward=32, dropout=0.1
        )
        torch.manual_seed(0)
        return NAR(config), nar_step, NARData.open(shard, alphabet_of(base), config, BATCH, 0)
    lora = LoRAConfig(rank=2, dropout=0.1) if kind == "lora" else None
    lm = SpeechLM.create(ARConfig(base=str(base), lora=lora), STAMP, seed=0)
    data = ARData.open(shard, lm.alphabet, TaskConfig(), BATCH, 0, longest=256)
    return lm, ar_step, data


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


def train(
    kind: str, base: Path, folder: Path, accelerator: Accelerator, die_at: int | None = None
) -> dict[str, torch.Tensor]:
    """Eight steps with a checkpoint every three; `die_at` stops before that step's update."""
    model, step, data = parts(kind, base, folder.parent / "a.parquet")
    optim = OptimConfig(
        steps=8, warmup_steps=2, lr=1e-2, accumulate=2, save_every=3, eval_every=4, log_every=2
    )
    run = start_run(optim, folder, seed=0, accelerator=accelerator)
    calls = 0

    def dying(*args):
        nonlocal calls
        calls += 1
        if die_at is not None and calls > die_at * optim.accumulate:
            raise Killed
        return step(*args)

    try:
        engine = fit(model, dying, data, None, run, optim)
        return gather(accelerator, engine)
    finally:
        accelerator.free_memory()
        run._lock.close()


@pytest.mark.parametrize("kind", ["lora", "full", "nar"])
def test_a_resumed_run_ends_with_the_very_same_weights(
    kind: str, tmp_path: Path, base: Path, accelerator: Accelerator
) -> None:
    save_shard(tmp_path / "a.parquet", 16)
    whole = train(kind, base, tmp_path / "whole", accelerator)
    with pytest.raises(Killed):
        train(kind, base, tmp_path / "killed", accelerator, die_at=5)
    torch.manual_seed(99)
    resumed = train(kind, base, tmp_path / "killed", accelerator)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [[line["step"] for line in metrics(tmp_path / name)] for name in ("whole", "killed")]
    assert steps[0] == steps[1] == [2, 4, 6, 8]
    # A run that is done only hands out its weights.
    again = train(kind, base, tmp_path / "killed", accelerator)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("kind", ["lora", "full", "nar"])
def test_it_learns_by_heart(
    kind: str, tmp_path: Path, base: Path, accelerator: Accelerator
) -> None:
    save_shard(tmp_path / "a.parquet", 3, most_frames=14)
    model, step, data = parts(kind, base, tmp_path / "a.parquet")
    optim = OptimConfig(steps=60, lr=3e-2 if kind == "lora" else 1e-2, log_every=5, save_every=1000)
    run = start_run(optim, tmp_path / "run", seed=0, accelerator=accelerator)
    fit(model, step, data, None, run, optim)
    accelerator.free_memory()
    run._lock.close()
    lines = metrics(tmp_path / "run")
    # Adapters beside random frozen weights have little to learn with.
    share = 0.8 if kind == "lora" else 0.6
    assert lines[-1]["train/loss"] < share * lines[0]["train/loss"]
    assert lines[-1]["train/lr"] < lines[1]["train/lr"]


def test_evaluation_counts_every_target_once(
    tmp_path: Path, base: Path, accelerator: Accelerator
) -> None:
    path = save_shard(tmp_path / "a.parquet", 10)
    lm, step, data = parts("full", base, path)
    optim = OptimConfig(eval_batches=1000)
    values = evaluate(lm, step, data, accelerator, optim, lm.groups)
    with torch.no_grad():
        scores = [lm(data.share(i, 0, 0, 1, 1).batch) for i in range(data.num_steps(1, 1))]
    nll, targets = (sum(float(getattr(s, k).sum()) for s in scores) for k in ("nll", "targets"))
    assert values["dev/loss"] == pytest.approx(nll / targets, rel=1e-5)
    assert lm.training is False


def test_accumulated_gradient_is_the_mean_over_the_steps_targets(
    tmp_path: Path, base: Path
) -> None:
    path = save_shard(tmp_path / "a.parquet", 10)
    lm, step, data = parts("full", base, path)
    for micro in range(3):
        share = data.share(1, micro, 0, 1, 3)
        (step(lm, share.batch, share.num_targets).total / 3).backward()
    accumulated = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    scores = [lm(data.share(1, micro, 0, 1, 3).batch) for micro in range(3)]
    targets = sum(float(one.targets.sum()) for one in scores)
    torch.stack([one.nll.sum() for one in scores]).sum().div(targets).backward()
    for name, parameter in lm.named_parameters():
        if name in accumulated:
            assert parameter.grad is not None
            torch.testing.assert_close(accumulated[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_learning_rate() -> None:
    config = OptimConfig(steps=100, warmup_steps=10, lr=1.0, final_lr_share=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert np.all(np.diff(rates[10:]) < 0)


def test_a_clip_norm_of_zero_means_never_and_a_negative_one_nothing() -> None:
    assert OptimConfig(clip_norm=0.0).clip_norm == 0
    with pytest.raises(ValueError, match="clip_norm must not be negative"):
        OptimConfig(clip_norm=-1.0)
