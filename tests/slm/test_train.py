"""slm/train.py: the loop learns, resumes to the bit, and means the same on one rank and on two."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT
from launched.tiny_voice import KINDS, Seen, first_logits, optim_of, parts, train_seen
from tiny_slm import quiet, save_base, save_shard

from codec.training.config import SupervisedOptimConfig
from codec.training.optim import adamw
from codec.training.run import start_run
from codec.training.schedule import learning_rate
from codec.training.supervised import dev_metrics, fit_supervised
from slm.models.ar import SpeechLM, load_base
from slm.train import gather

pytestmark = [
    *quiet(),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

LAUNCHED = ROOT / "tests" / "launched" / "tiny_voice.py"
TOLERANCE = 1e-5
"""Relative, of losses and gradient norms; what is measured stays below 1e-6."""


@contextmanager
def lone_accelerator() -> Iterator[Accelerator]:
    """Accelerate's global state is as new, before and after."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with lone_accelerator() as accelerator:
        yield accelerator


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    save_shard(tmp_path / "tokens.parquet", 16)
    return tmp_path


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


def train(
    kind: str, folder: Path, name: str, accelerator: Accelerator, die_at: int | None = None
) -> dict[str, torch.Tensor]:
    """Eight steps with a checkpoint every three; `die_at` stops before that step's update."""
    model, step, data = parts(kind, folder, dropout=0.1)
    optim = SupervisedOptimConfig(
        steps=8, warmup_steps=2, lr=1e-2, accumulate=2, save_every=3, eval_every=4, log_every=2
    )
    run = start_run(optim, folder / name, seed=0, accelerator=accelerator)
    calls = 0

    def dying(*args):
        nonlocal calls
        calls += 1
        if die_at is not None and calls > die_at * optim.accumulate:
            raise Killed
        return step(*args)

    try:
        engine = fit_supervised(model, dying, data, None, run, optim)
        return gather(accelerator, engine)
    finally:
        accelerator.free_memory()
        run._lock.close()


@pytest.mark.parametrize("kind", ["lora", "full", "nar"])
def test_a_resumed_run_ends_with_the_very_same_weights(
    kind: str, folder: Path, accelerator: Accelerator
) -> None:
    whole = train(kind, folder, "whole", accelerator)
    with pytest.raises(Killed):
        train(kind, folder, "killed", accelerator, die_at=5)
    torch.manual_seed(99)
    resumed = train(kind, folder, "killed", accelerator)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [[line["step"] for line in metrics(folder / name)] for name in ("whole", "killed")]
    assert steps[0] == steps[1] == [2, 4, 6, 8]
    # A run that is done only hands out its weights.
    again = train(kind, folder, "killed", accelerator)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("kind", ["lora", "full", "nar"])
def test_it_learns_by_heart(kind: str, folder: Path, accelerator: Accelerator) -> None:
    save_shard(folder / "tokens.parquet", 3, most_frames=14)
    model, step, data = parts(kind, folder, dropout=0.1)
    optim = SupervisedOptimConfig(
        steps=60, lr=3e-2 if kind == "lora" else 1e-2, log_every=5, save_every=1000
    )
    run = start_run(optim, folder / "run", seed=0, accelerator=accelerator)
    fit_supervised(model, step, data, None, run, optim)
    accelerator.free_memory()
    run._lock.close()
    lines = metrics(folder / "run")
    # Adapters beside random frozen weights have little to learn with.
    share = 0.8 if kind == "lora" else 0.6
    assert lines[-1]["train/loss"] < share * lines[0]["train/loss"]
    assert lines[-1]["train/lr"] < lines[1]["train/lr"]


def test_evaluation_counts_every_target_once(folder: Path, accelerator: Accelerator) -> None:
    lm, step, data = parts("full", folder)
    values = dev_metrics(lm, step, data, accelerator, 1000, lm.groups)
    with torch.no_grad():
        scores = [lm(data.share(i, 0, 0, 1, 1).batch) for i in range(data.num_steps(1, 1))]
    nll, targets = (sum(float(getattr(s, k).sum()) for s in scores) for k in ("nll", "targets"))
    assert values["dev/loss"] == pytest.approx(nll / targets, rel=1e-5)
    assert lm.training is False


def test_evaluating_and_saving_do_not_slow_training_down(
    folder: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens per second are those of the steps: a step takes a second here, an evaluation ten."""
    model, step, data = parts("full", folder)
    now = 0.0

    def stepping(*args):
        nonlocal now
        now += 1.0 if torch.is_grad_enabled() else 10.0
        return step(*args)

    monkeypatch.setattr("codec.training.loop.time.monotonic", lambda: now)
    optim = SupervisedOptimConfig(
        steps=4, log_every=2, eval_every=1, eval_batches=1, save_every=1000
    )
    run = start_run(optim, folder / "timed", seed=0, accelerator=accelerator)
    fit_supervised(model, stepping, data, data, run, optim)
    accelerator.free_memory()
    run._lock.close()
    speeds = [
        line["train/tokens_per_s"] for line in metrics(folder / "timed") if "train/lr" in line
    ]
    targets = [data.share(index, 0, 0, 1, 1).num_targets for index in range(4)]
    assert speeds == pytest.approx([sum(targets[:2]) / 2, sum(targets[2:]) / 2])


def test_accumulated_gradient_is_the_mean_over_the_steps_targets(folder: Path) -> None:
    lm, step, data = parts("full", folder)
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


class Trained(NamedTuple):
    lines: list[dict[str, float]]
    seen: Seen


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trained]]:
    """A folder with base/ and tokens.parquet, and what one rank makes of them."""
    folder = tmp_path_factory.mktemp("one")
    save_base(folder / "base")
    save_shard(folder / "tokens.parquet", 17)
    trained = {}
    with lone_accelerator() as accelerator:
        for kind in KINDS:
            made = parts(kind, folder)
            seen = train_seen(made, folder / kind, accelerator, optim_of(kind, ranks=1))
            trained[kind] = Trained(metrics(folder / kind), seen)
    return folder, trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "engine"),
    [
        ("ddp", "DistributedDataParallel"),
        ("zero2", "DeepSpeedEngine"),
        ("zero3", "DeepSpeedEngine"),
    ],
)
def test_two_ranks_train_as_one_that_has_their_batches(
    config: str,
    engine: str,
    one_rank: tuple[Path, dict[str, Trained]],
    tmp_path: Path,
    launch: Callable[..., Any],
) -> None:
    folder, expected = one_rank
    done = launch(config, LAUNCHED, str(folder), str(tmp_path))
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        seen = Seen(**torch.load(tmp_path / kind / "seen.pt"))
        assert seen.engine == engine
        assert seen.share_held == (0.0 if config == "zero3" else 1.0)
        check_equal(expected[kind], Trained(metrics(tmp_path / kind), seen), kind)
        if kind != "nar":
            check_table(seen, folder / "base", tmp_path / kind / "ar")


def check_equal(one: Trained, two: Trained, name: str) -> None:
    """Losses, gradient norms and weights."""
    assert len(one.lines) == len(two.lines) == 8
    for key in ("train/loss", "train/grad_norm"):
        wanted, got = ([line[key] for line in each.lines] for each in (one, two))
        assert got == pytest.approx(wanted, rel=TOLERANCE), f"{name}: {key}"
    before, after = one.seen.before, one.seen.after
    assert before.keys() == two.seen.before.keys() == after.keys() == two.seen.after.keys()
    for key, weight in after.items():
        assert torch.equal(before[key], two.seen.before[key]), f"{name}: {key}"
        if torch.equal(weight, before[key]):
            assert torch.equal(two.seen.after[key], weight), f"{name}: frozen {key}"
        # AdamW takes steps of up to 0.01 whatever the gradient, even where it is all rounding: the
        # bias of a key changes no attention.
        torch.testing.assert_close(two.seen.after[key], weight, rtol=0, atol=2e-4)


def check_table(seen: Seen, base: Path, saved: Path) -> None:
    """The table of tokens that an engine had, and the folder that came out of it."""
    text = load_base(base).lm.get_input_embeddings().weight
    loaded = SpeechLM.load(saved, base)
    vocabulary, table = loaded.vocabulary, loaded.lm.get_input_embeddings().weight
    (name,) = [name for name, part in seen.before.items() if len(part) == vocabulary.size]
    assert "embed_tokens" in name  # And no second one for the head.
    assert loaded.lm.get_output_embeddings().weight is table
    assert seen.before[name].shape == table.shape == (vocabulary.size, text.shape[1])
    assert torch.equal(seen.before[name][: vocabulary.text_size], text)
    before = seen.before[name][vocabulary.text_size :]
    if loaded.origin["adapter"]:
        assert torch.equal(table[: vocabulary.text_size], text)
    assert (table[vocabulary.text_size :] != before).any(dim=1).all()
    assert seen.logits is not None
    batch = parts("full-packed" if "packed" in str(saved) else "full", base.parent).data
    logits = first_logits(loaded, batch)
    torch.testing.assert_close(logits, seen.logits, rtol=0, atol=1e-4)


def test_each_target_weighs_the_same_whichever_rank_has_it(
    one_rank: tuple[Path, dict[str, Trained]],
) -> None:
    """What the test of two ranks rests on: a rank that divided by its own number would fail it."""
    folder, trained = one_rank
    model, _, data = parts("lora", folder)
    scores = [model(data.share(0, 0, rank, 2, 1).batch) for rank in range(2)]
    numbers = [one.targets.sum() for one in scores]
    assert numbers[0] > 1.5 * numbers[1]
    sums = torch.stack([one.nll.sum() for one in scores])

    def norm(loss: torch.Tensor) -> float:
        model.zero_grad()
        loss.backward(retain_graph=True)
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())

    logged = trained["lora"].lines[0]["train/grad_norm"]
    assert logged == pytest.approx(norm(sums.sum() / sum(numbers)), rel=TOLERANCE)
    assert logged != pytest.approx(norm((sums / torch.stack(numbers)).mean()), rel=100 * TOLERANCE)


def test_learning_rate() -> None:
    config = SupervisedOptimConfig(steps=100, warmup_steps=10, lr=1.0, final_lr_share=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert np.all(np.diff(rates[10:]) < 0)


def test_a_clip_norm_of_zero_means_never_and_a_negative_one_nothing() -> None:
    assert SupervisedOptimConfig(clip_norm=0.0).clip_norm == 0
    with pytest.raises(ValueError, match=r"optim\.clip_norm must be at least 0"):
        SupervisedOptimConfig(clip_norm=-1.0)


def test_matrices_alone_decay_and_the_step_is_fused() -> None:
    matrices, vectors = adamw(torch.nn.Linear(2, 3), SupervisedOptimConfig()).param_groups
    assert [p.shape for p in matrices["params"]] == [(3, 2)]
    assert [p.shape for p in vectors["params"]] == [(3,)]
    assert (
        matrices["weight_decay"]
        == SupervisedOptimConfig().weight_decay
        > vectors["weight_decay"]
        == 0
    )
    assert matrices["fused"]
    assert vectors["fused"]


@pytest.mark.parametrize("kind", ["lora", "full", "nar"])
def test_an_absurd_learning_rate_ends_with_an_error_and_no_useless_checkpoint(
    kind: str, folder: Path, accelerator: Accelerator
) -> None:
    model, step, data = parts(kind, folder)
    optim = SupervisedOptimConfig(
        steps=6, lr=1e30, clip_norm=0.0, save_every=2, log_every=2, max_skipped_steps=3
    )
    run = start_run(optim, folder / "run", seed=0, accelerator=accelerator)
    with pytest.raises(ValueError, match=r"the training diverged before step \d"):
        fit_supervised(model, step, data, None, run, optim)
    accelerator.free_memory()
    run.close()
    assert not list((folder / "run" / "checkpoints").glob("step-*"))
    assert "NaN" not in (folder / "run" / "metrics.jsonl").read_text()
