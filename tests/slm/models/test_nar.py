"""slm/models/nar.py: inputs and losses of a stage, decoding, saving and loading."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_slm import SIZES

from slm.config import NARConfig
from slm.data.nar import NARBatch, nar_batch, text_bytes
from slm.models.nar import NAR

CONFIG = NARConfig(
    codebook_sizes=SIZES, num_layers=2, num_heads=2, width=16, feedforward=32, dropout=0.0
)
TEXTS = ["a cat", "the dog ran far away", "x"]


def make_nar(config: NARConfig) -> NAR:
    torch.manual_seed(0)
    model, random = NAR(config).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():  # strong enough that every path shows
        for name, parameter in model.named_parameters():
            if name.endswith((".scale", ".shift")):
                parameter.normal_(std=0.1, generator=random)
            parameter.mul_(3.0)
    return model


@pytest.fixture
def nar() -> NAR:
    return make_nar(CONFIG)


def random_codes(frames: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([random.integers(0, size, frames) for size in SIZES])


def batch(stages: list[int], lengths: tuple[int, ...] = (9, 14, 5)) -> NARBatch:
    codes = [random_codes(length, seed) for seed, length in enumerate(lengths)]
    prompts = [length // 3 for length in lengths]
    return nar_batch([text_bytes(text) for text in TEXTS[: len(lengths)]], codes, prompts, stages)


def test_similar_codes_start_alike() -> None:
    nar = NAR(CONFIG)
    random = torch.Generator().manual_seed(0)
    entries = [torch.randn(size, 6, generator=random) * 40 + 7 for size in SIZES]
    for book in entries:
        book[1] = book[0] + 0.01
    nar.init_from_codec(entries, seed=0)
    nar.requires_grad_(False)
    # Strong as before, though the codec's entries are not; no codebook's mean is left.
    assert float(nar.codes.weight.std()) == pytest.approx(0.5, rel=0.1)
    assert float(nar.head.weight.std()) == pytest.approx(CONFIG.width**-0.5, rel=0.1)
    for table in (nar.codes.weight, nar.head.weight):
        for rows in table.split(list(SIZES)):
            assert float(rows.mean(0).abs().max()) < 1e-5
            apart = (rows - rows[0]).norm(dim=1)
            assert float(apart[1]) < 0.01 * float(apart[2:].min())
    again = NAR(CONFIG)
    again.init_from_codec(entries, seed=0)
    assert torch.equal(again.codes.weight, nar.codes.weight)


def changed(nar: NAR, one: NARBatch, other: NARBatch) -> float:
    with torch.no_grad():
        return float((nar(one).nll - nar(other).nll).abs().sum())


def with_codes(one: NARBatch, codebook: int, frames: slice) -> NARBatch:
    codes = one.codes.clone()
    codes[:, codebook, frames] = (codes[:, codebook, frames] + 1) % SIZES[codebook]
    return one._replace(codes=codes)


def test_a_stage_depends_on_lower_codebooks_and_the_full_prompt(nar: NAR) -> None:
    one = batch([1])
    behind = slice(8, 9)  # behind every prompt
    assert changed(nar, one, with_codes(one, 0, behind)) > 1e-3
    assert changed(nar, one, with_codes(one, 2, behind)) == 0.0
    assert changed(nar, one, with_codes(one, 2, slice(0, 1))) > 1e-3
    two = batch([2])
    assert changed(nar, two, with_codes(two, 1, behind)) > 1e-3


def test_the_target_is_no_input(nar: NAR) -> None:
    one = batch([1])
    hidden = nar._hidden(one, 1)
    moved = nar._hidden(with_codes(one, 1, slice(5, None)), 1)
    assert torch.equal(hidden, moved)


def test_loss_counts_the_frames_after_the_prompt(nar: NAR) -> None:
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
    shift = nar.norm.shift.grad
    assert shift is not None
    assert (shift.abs().sum(1) > 0).tolist() == [False, False, True]


def test_a_stage_has_norms_of_its_own(nar: NAR) -> None:
    one = batch([1])
    before = nar(one).nll
    with torch.no_grad():
        nar.norm.shift[1] += 1.0
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
    texts = [*TEXTS[:2], "", ""]
    prompts = [random_codes(3, 7), random_codes(0, 8), random_codes(6, 9), random_codes(2, 5)]
    first = [random_codes(length, seed)[0] for seed, length in enumerate((9, 14, 5, 1))]

    def decode(rows: list[int], seeds: list[int]) -> list[np.ndarray]:
        chosen = ([part[row] for row in rows] for part in (texts, prompts, first))
        return nar.decode(*chosen, temperature=temperature, seeds=seeds)

    together = decode([0, 1, 2, 3], [1, 2, 3, 4])
    for row in range(4):
        (alone,) = decode([row], [row + 1])
        assert np.array_equal(together[row], alone)
        assert np.array_equal(alone[0], first[row])
        assert alone.shape == (len(SIZES), len(first[row]))
        assert ((alone >= 0) & (alone < np.array(SIZES)[:, None])).all()
    other = decode([0, 1, 2, 3], [5, 6, 7, 8])
    same = all(np.array_equal(a, b) for a, b in zip(together, other, strict=True))
    assert same == (temperature == 0)


def test_a_nar_without_texts_ignores_them() -> None:
    prompts, first = [random_codes(3)], [random_codes(60)[0]]
    made = {}
    for dropout in (0.5, 1.0):
        nar = make_nar(replace(CONFIG, text_dropout=dropout))
        for layer in nar.layers:
            layer.output.weight.data.mul_(20.0)  # Strong enough for other codes to be drawn.
        made[dropout] = [
            nar.decode([text], prompts, first, temperature=1.0, seeds=[1])[0]
            for text in ("the dog ran far away", "")
        ]
    assert np.array_equal(*made[1.0])
    assert not np.array_equal(*made[0.5])
    assert np.array_equal(made[0.5][1], made[1.0][1])


def test_greedy_decoding_goes_codebook_by_codebook(nar: NAR) -> None:
    prompt, first = random_codes(3, 7), random_codes(6, 1)[0]
    (made,) = nar.decode(["a cat"], [prompt], [first])
    joined = np.concatenate([prompt, made], axis=1)
    for stage in (1, 2):
        one = nar_batch([text_bytes("a cat")], [joined], [3], [stage])
        scores = nar(one)
        assert scores.correct[stage - 1] == scores.targets[stage - 1]


def test_decoding_in_chunks_with_finished_frames_as_prompt(nar: NAR) -> None:
    prompt, first = random_codes(3, 7), random_codes(9, 1)[0]
    (made,) = nar.decode(["a cat"], [prompt], [first[:4]])
    done = np.concatenate([prompt, made], axis=1)
    (rest,) = nar.decode(["a cat"], [done], [first[4:]])
    whole = np.concatenate([made, rest], axis=1)
    assert np.array_equal(whole[0], first)
    # The rest stands where it would stand in the whole, and sees every codebook before it.
    joined = np.concatenate([prompt, whole], axis=1)
    one = nar_batch([text_bytes("a cat")], [joined], [7], [1, 2])
    assert torch.equal(nar(one).correct, nar(one).targets)
    assert changed(nar, one, with_codes(one, 2, slice(5, 6))) > 1e-3


@pytest.mark.parametrize("sizes", [(8, 4), tuple(range(3, 35))])
def test_any_number_of_codebooks_of_any_size(sizes: tuple[int, ...]) -> None:
    nar = make_nar(replace(CONFIG, codebook_sizes=sizes, num_layers=1))
    calls = []
    nar.codes.register_forward_hook(lambda *_: calls.append(1))
    prompt = np.stack([np.arange(40) % size for size in sizes])
    prompts = [prompt[:, :0], prompt]
    made = nar.decode(["", "a"], prompts, [np.array([2]), np.arange(3) % sizes[0]])
    assert [one.shape for one in made] == [(len(sizes), 1), (len(sizes), 3)]
    assert all((one < np.array(sizes)[:, None]).all() for one in made)
    # The table is read once for each pass, however many codebooks there are.
    assert len(calls) == len(sizes) - 1


def test_no_frames_to_decode(nar: NAR) -> None:
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
    half = NAR.load(tmp_path, torch.bfloat16)
    (made,) = half.decode(["a"], [random_codes(3)], [np.zeros(5, np.int64)], temperature=1.0)
    assert made.shape == (len(SIZES), 5)


def test_earlier_configurations_load_but_for_masked_training(nar: NAR, tmp_path: Path) -> None:
    nar.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["text_dropout"]
    for masked in ({}, {"masked": False}):
        file.write_text(json.dumps(config | masked))
        assert NAR.load(tmp_path).config == CONFIG
    file.write_text(json.dumps(config | {"masked": True}))
    with pytest.raises(ValueError, match="masked is True: this feature was removed"):
        NAR.load(tmp_path)


def test_a_nar_of_the_first_revision_is_refused(nar: NAR, tmp_path: Path) -> None:
    nar.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "stages.weight": torch.zeros(3, 16)}, file)
    with pytest.raises(ValueError, match="of an earlier revision; train it again"):
        NAR.load(tmp_path)


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
    with pytest.raises(ValueError, match="incomplete or damaged NAR"):
        NAR.load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        *("[]", "{}", "{", '{"width": "x"}', "7", "[" * 100_000),
        '{"width": 1099511627776, "codebook_sizes": [8, 8]}',
        '{"num_layers": 1099511627776, "codebook_sizes": [8, 8]}',
    ],
    ids=range(8),
)
def test_a_damaged_configuration_is_named(nar: NAR, tmp_path: Path, config: str) -> None:
    nar.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=str(tmp_path)):
        NAR.load(tmp_path)


def test_one_codebook_needs_no_nar() -> None:
    with pytest.raises(ValueError, match="two codebooks or more"):
        NAR(NARConfig(codebook_sizes=(8,)))
