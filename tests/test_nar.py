"""slm/nar.py: what a stage sees, what it is judged on, and that padding is no matter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_slm import SIZES

from slm.config import NARConfig
from slm.nar import NAR
from slm.nar_data import NARBatch, nar_batch, text_bytes

CONFIG = NARConfig(
    codebook_sizes=SIZES, num_layers=2, num_heads=2, width=16, feedforward=32, dropout=0.0
)
TEXTS = ["a cat", "the dog ran far away", "x"]


@pytest.fixture
def nar() -> NAR:
    torch.manual_seed(0)
    model = NAR(CONFIG).eval()
    with torch.no_grad():  # strong enough that every path shows
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def random_codes(frames: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([random.integers(0, size, frames) for size in SIZES])


def batch(stages: list[int], lengths: tuple[int, ...] = (9, 14, 5)) -> NARBatch:
    codes = [random_codes(length, seed) for seed, length in enumerate(lengths)]
    prompts = [length // 3 for length in lengths]
    return nar_batch([text_bytes(text) for text in TEXTS[: len(lengths)]], codes, prompts, stages)


def changed(nar: NAR, one: NARBatch, other: NARBatch) -> float:
    with torch.no_grad():
        return float((nar(one).nll - nar(other).nll).abs().sum())


def with_codes(one: NARBatch, codebook: int, frames: slice) -> NARBatch:
    codes = one.codes.clone()
    codes[:, codebook, frames] = (codes[:, codebook, frames] + 1) % SIZES[codebook]
    return one._replace(codes=codes)


def test_a_stage_sees_lower_codebooks_and_the_whole_prompt(nar: NAR) -> None:
    one = batch([1])
    behind = slice(8, 9)  # behind every prompt
    assert changed(nar, one, with_codes(one, 0, behind)) > 1e-3
    assert changed(nar, one, with_codes(one, 2, behind)) == 0.0
    assert changed(nar, one, with_codes(one, 2, slice(0, 1))) > 1e-3
    two = batch([2])
    assert changed(nar, two, with_codes(two, 1, behind)) > 1e-3


def test_the_target_itself_is_not_seen(nar: NAR) -> None:
    one = batch([1])
    hidden = nar._hidden(one, 1)
    moved = nar._hidden(with_codes(one, 1, slice(5, None)), 1)
    assert torch.equal(hidden, moved)


def test_loss_counts_the_frames_behind_the_prompt(nar: NAR) -> None:
    one = batch([1, 2])
    expected = float((one.lengths - one.prompt_lengths).sum())
    assert nar(one).targets.tolist() == [expected, expected]
    assert nar(batch([2])).targets.tolist() == [0.0, expected]


def test_gradient_reaches_every_parameter_at_every_step(nar: NAR) -> None:
    nar(batch([1])).nll.sum().backward()
    assert all(parameter.grad is not None for parameter in nar.parameters())


def test_gradient_of_a_stage_stays_in_its_rows(nar: NAR) -> None:
    nar(batch([2])).nll.sum().backward()
    gradient = nar.head.weight.grad
    assert gradient is not None
    touched = gradient.abs().sum(1) > 0
    first = SIZES[0] + SIZES[1]
    assert touched[first:].all()
    assert not touched[:first].any()
    stages = nar.stages.weight.grad
    assert stages is not None
    assert (stages.abs().sum(1) > 0).tolist() == [False, False, True]


def test_the_stage_embedding_is_used(nar: NAR) -> None:
    one = batch([1])
    before = nar(one).nll
    with torch.no_grad():
        nar.stages.weight[1] += 1.0
    assert not torch.allclose(nar(one).nll, before)


def test_padded_batch_equals_single_items(nar: NAR) -> None:
    nar = nar.double()
    lengths = (9, 14, 5)
    codes = [random_codes(length, seed) for seed, length in enumerate(lengths)]
    text = [text_bytes(text) for text in TEXTS]
    together = nar(nar_batch(text, codes, [3, 4, 0], [1, 2])).nll
    alone = [
        nar(nar_batch([t], [c], [p], [1, 2])).nll
        for t, c, p in zip(text, codes, [3, 4, 0], strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_a_batch_equals_single_items(nar: NAR, temperature: float) -> None:
    prompts = [random_codes(3, 7), random_codes(0, 8), random_codes(6, 9)]
    first = [random_codes(length, seed)[0] for seed, length in enumerate((9, 14, 5))]
    kwargs = {"temperature": temperature}
    together = nar.decode(TEXTS, prompts, first, seeds=[1, 2, 3], **kwargs)
    for row in range(3):
        (alone,) = nar.decode([TEXTS[row]], [prompts[row]], [first[row]], seeds=[row + 1], **kwargs)
        assert np.array_equal(together[row], alone)
        assert np.array_equal(alone[0], first[row])
        assert alone.shape == (len(SIZES), len(first[row]))


def test_greedy_decoding_goes_codebook_by_codebook(nar: NAR) -> None:
    prompt, first = random_codes(3, 7), random_codes(6, 1)[0]
    (made,) = nar.decode(["a cat"], [prompt], [first])
    joined = np.concatenate([prompt, made], axis=1)
    for stage in (1, 2):
        one = nar_batch([text_bytes("a cat")], [joined], [3], [stage])
        scores = nar(one)
        assert scores.correct[stage - 1] == scores.targets[stage - 1]


def test_nothing_to_fill_in(nar: NAR) -> None:
    (made,) = nar.decode(["a"], [random_codes(3)], [np.zeros(0, np.int64)])
    assert made.shape == (len(SIZES), 0)


def test_save_and_load(nar: NAR, tmp_path: Path) -> None:
    nar.save_pretrained(tmp_path)
    loaded = NAR.load(tmp_path)
    assert loaded.config == CONFIG
    assert torch.equal(loaded(batch([1])).nll, nar(batch([1])).nll)
    again = NAR.from_pretrained(tmp_path)
    assert torch.equal(again(batch([1])).nll, nar(batch([1])).nll)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_damaged_folders_are_named(nar: NAR, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        NAR.load(tmp_path)
    nar.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lacking = {key: value for key, value in tensors.items() if key != "head.weight"}
    save_file(lacking, file)
    for load in (NAR.load, NAR.from_pretrained):
        with pytest.raises(ValueError, match=r"head\.weight"):
            load(tmp_path)
    save_file({**tensors, "head.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match=r"head\.weight"):
        NAR.load(tmp_path)
    file.write_bytes(b"cut")
    with pytest.raises(ValueError, match="not a whole NAR"):
        NAR.load(tmp_path)


@pytest.mark.parametrize("config", ["[]", "{}", "{", '{"width": "x"}', "7"])
def test_a_damaged_configuration_is_named(nar: NAR, tmp_path: Path, config: str) -> None:
    nar.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=str(tmp_path)):
        NAR.load(tmp_path)


def test_one_codebook_needs_no_nar() -> None:
    with pytest.raises(ValueError, match="two codebooks or more"):
        NAR(NARConfig(codebook_sizes=(8,)))
