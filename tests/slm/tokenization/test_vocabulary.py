"""vocabulary.py: ids never collide, old rows stay, new rows are drawn from them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_slm import STAMP, quiet, save_base

from slm.models.ar import load_base
from slm.tokenization.vocabulary import (
    FILE_NAME,
    Vocabulary,
    _draw_rows,
    encode_texts,
    extend,
    row_parameters,
)

pytestmark = quiet()

BASES = [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False)]


def vocabulary_of(folder: Path) -> Vocabulary:
    base = load_base(folder)
    return Vocabulary.of(base.lm, base.tokenizer, STAMP)


def test_ids_do_not_collide_and_codes_come_back(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(save_base(tmp_path))
    codes = np.arange(STAMP.codebook_sizes[0])
    ids = vocabulary.encode_speech(codes)
    specials = [vocabulary.text, vocabulary.speech, vocabulary.speech_end]
    everything = [*range(vocabulary.text_size), *specials, *ids]
    assert sorted(everything) == list(range(vocabulary.size))
    assert np.array_equal(vocabulary.decode_speech(ids), codes)


def test_merges_follow_codebook_1(tmp_path: Path) -> None:
    base = load_base(save_base(tmp_path))
    plain = Vocabulary.of(base.lm, base.tokenizer, STAMP)
    vocabulary = Vocabulary.of(base.lm, base.tokenizer, STAMP, num_merges=3)
    size = STAMP.codebook_sizes[0]
    assert vocabulary.size == plain.size + 3
    codes, pieces = np.arange(size), np.arange(size + 3)
    ids = vocabulary.encode_pieces(pieces)
    assert np.array_equal(ids[:size], plain.encode_speech(codes))
    assert np.array_equal(vocabulary.encode_speech(codes), ids[:size])
    assert ids[-1] == vocabulary.size - 1 == vocabulary.new_ids[-1]
    assert np.array_equal(vocabulary.decode_pieces(ids), pieces)
    # A merge is no code, nor is what follows the last one a merge.
    with pytest.raises(ValueError, match="is not the id of a code"):
        vocabulary.decode_speech(ids[-1:])
    with pytest.raises(ValueError, match="outside codebook 1"):
        vocabulary.encode_speech(pieces)
    with pytest.raises(ValueError, match=f"no piece {size + 3} among"):
        vocabulary.encode_pieces(np.array([size + 3]))
    with pytest.raises(ValueError, match="is not a speech id"):
        vocabulary.decode_pieces([vocabulary.size])
    extend(base.lm, vocabulary, seed=0)
    assert base.lm.get_input_embeddings().weight.shape[0] == vocabulary.size
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == vocabulary


def test_the_first_format_had_no_merges(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(save_base(tmp_path / "base"))
    vocabulary.save(tmp_path)
    record = json.loads((tmp_path / FILE_NAME).read_text())
    assert record.pop("num_merges") == 0
    (tmp_path / FILE_NAME).write_text(json.dumps({**record, "format": 1}))
    assert Vocabulary.load(tmp_path) == vocabulary


def test_rows_that_pad_the_table_are_not_used(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(save_base(tmp_path, pad_rows=7))
    assert vocabulary.text_size == vocabulary.num_text + 7
    assert vocabulary.new_ids[0] == vocabulary.text_size


def test_an_llm_without_end_token_gets_one(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(save_base(tmp_path, eos=False))
    assert vocabulary.eos == vocabulary.text_size + 3
    assert vocabulary.first_speech == vocabulary.eos + 1


@pytest.mark.parametrize("code", [-1, STAMP.codebook_sizes[0]])
def test_a_code_outside_codebook_1_is_named(tmp_path: Path, code: int) -> None:
    vocabulary = vocabulary_of(save_base(tmp_path))
    with pytest.raises(ValueError, match=f"code {code} is outside codebook 1"):
        vocabulary.encode_speech(np.array([0, code]))


def test_text_that_looks_like_a_special_token_is_text(tmp_path: Path) -> None:
    base = load_base(save_base(tmp_path))
    vocabulary = Vocabulary.of(base.lm, base.tokenizer, STAMP)
    ids = encode_texts(base.tokenizer, ["a<|end|>b"])[0]
    assert vocabulary.eos not in ids
    assert vocabulary.decode_text(base.tokenizer, ids) == "a<|end|>b"
    with pytest.raises(ValueError, match="is not a text id"):
        vocabulary.decode_text(base.tokenizer, [vocabulary.speech])


def test_save_and_load(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(save_base(tmp_path / "base"))
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == vocabulary


@pytest.mark.parametrize("content", ["", "{}", '{"format": 99}', "5", "null", '"map"'])
def test_a_damaged_map_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ValueError, match=FILE_NAME):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("codec", "codebook_sizes", []),
        ("codec", "codebook_sizes", [2**40] * 3),
        ("codec", "frame_rate", float("nan")),
        (None, "num_text", 200.0),
        (None, "text_eos", "1"),
        (None, "num_merges", None),
    ],
)
def test_a_map_with_values_that_no_voice_has_is_named(
    tmp_path: Path, part: str | None, key: str, value: Any
) -> None:
    vocabulary_of(save_base(tmp_path / "base")).save(tmp_path)
    record = json.loads((tmp_path / FILE_NAME).read_text())
    (record[part] if part else record)[key] = value
    (tmp_path / FILE_NAME).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{FILE_NAME}: not a vocabulary map.*copy the voice"):
        Vocabulary.load(tmp_path)


def test_a_missing_map_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing"):
        Vocabulary.load(tmp_path)


def test_another_codec_is_refused(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(save_base(tmp_path))
    other = dataclasses.replace(STAMP, digest="f" * 16)
    with pytest.raises(ValueError, match="ffffffffffffffff"):
        vocabulary.check_codec(other, "tokens")


@pytest.mark.parametrize(("kind", "tied"), BASES)
def test_extending_keeps_old_logits_and_ties(tmp_path: Path, kind: str, tied: bool) -> None:
    base = load_base(save_base(tmp_path, kind=kind, tied=tied))
    vocabulary = Vocabulary.of(base.lm, base.tokenizer, STAMP)
    base.lm.eval()
    tokens = torch.tensor([[1, 2, 3, 4]])
    before = base.lm(tokens).logits
    rows_before = base.lm.get_input_embeddings().weight.detach().clone()
    extend(base.lm, vocabulary, seed=0)
    after = base.lm(tokens).logits
    assert after.shape[-1] == vocabulary.size
    torch.testing.assert_close(after[..., : vocabulary.text_size], before, rtol=1e-5, atol=1e-5)
    embedding, head = base.lm.get_input_embeddings(), base.lm.get_output_embeddings()
    assert torch.equal(embedding.weight[: vocabulary.text_size], rows_before)
    assert (embedding.weight is head.weight) == tied
    assert head.weight.shape[0] == vocabulary.size


def test_new_rows_have_the_old_ones_mean_and_covariance(tmp_path: Path) -> None:
    base = load_base(save_base(tmp_path, pad_rows=0))
    stamp = dataclasses.replace(STAMP, codebook_sizes=(4096,), num_codebooks=1)
    vocabulary = Vocabulary.of(base.lm, base.tokenizer, stamp)
    weight = base.lm.get_input_embeddings().weight
    with torch.no_grad():  # features that vary together, and not about zero
        weight[:, 1] = weight[:, 0] * 0.5 + 1.0
    old = weight.detach().clone()
    extend(base.lm, vocabulary, seed=0)
    new = base.lm.get_input_embeddings().weight.detach()[vocabulary.text_size :]
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(new.T.cov(), old.T.cov(), rtol=0, atol=0.01)


@pytest.mark.parametrize(("kind", "tied"), BASES)
def test_a_table_smaller_than_the_tokenizer_grows_to_its_size_first(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    """Rows between old and new ones are neither trained nor saved: every load makes them alike."""
    save_base(tmp_path, kind=kind, tied=tied, pad_rows=-3)
    tables = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        base = load_base(tmp_path)
        old = base.lm.get_input_embeddings().weight.detach().clone()
        vocabulary = Vocabulary.of(base.lm, base.tokenizer, STAMP)
        assert vocabulary.text_size == vocabulary.num_text == len(base.tokenizer) == len(old) + 3
        extend(base.lm, vocabulary, seed=seed, scale=1.0 + seed)
        modules = (base.lm.get_input_embeddings(), base.lm.get_output_embeddings())
        tables.append([each.weight.detach() for each in modules])
        assert torch.equal(tables[-1][0][: len(old)], old)
    between = slice(len(old), vocabulary.text_size)
    for first, second in zip(*tables, strict=True):
        assert torch.equal(first[between], second[between])
        assert len(first[between].unique(dim=0)) == 3
        assert not torch.equal(first[between.stop :], second[between.stop :])


def test_new_rows_follow_the_seed(tmp_path: Path) -> None:
    def rows(seed: int) -> torch.Tensor:
        base = load_base(save_base(tmp_path))
        vocabulary = Vocabulary.of(base.lm, base.tokenizer, STAMP)
        extend(base.lm, vocabulary, seed=seed)
        return base.lm.get_input_embeddings().weight.detach()

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


def test_rows_are_the_mean_and_the_scaled_noise_of_the_seed() -> None:
    """Of two features that vary together: the lower triangular factor of their covariance."""
    old = torch.tensor([[0.0, 1.0], [2.0, 3.0], [0.0, 0.0], [2.0, 4.0]], dtype=torch.float64)
    rows = _draw_rows(old, 3, 0.5, torch.Generator().manual_seed(7))
    noise = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    factor = torch.tensor([[1.0, 0.0], [1.5, 0.5]], dtype=torch.float64)
    expected = torch.tensor([1.0, 2.0]) + 0.5 * noise @ factor.T
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "tied"), BASES)
def test_rows_that_an_adapter_trains(tmp_path: Path, kind: str, tied: bool) -> None:
    lm = load_base(save_base(tmp_path, kind=kind, tied=tied)).lm
    embedding, head = ("transformer.wte" if kind == "gpt2" else "model.embed_tokens"), "lm_head"
    tables = [embedding] if tied else [embedding, head]
    assert row_parameters(lm, range(3, 5)) == {name: [3, 4] for name in tables}
    lm.lm_head.bias = torch.nn.Parameter(torch.zeros(len(lm.lm_head.weight)))
    if tied:
        assert row_parameters(lm, [3]) == {embedding: [3]}
    else:
        with pytest.raises(ValueError, match="has a bias, which the adapter cannot extend"):
            row_parameters(lm, [3])


def test_the_bias_of_new_rows_is_the_mean_of_the_old_ones(tmp_path: Path) -> None:
    base = load_base(save_base(tmp_path, tied=False))
    vocabulary = Vocabulary.of(base.lm, base.tokenizer, STAMP)
    bias = torch.arange(float(vocabulary.text_size))
    base.lm.lm_head.bias = torch.nn.Parameter(bias.clone())
    extend(base.lm, vocabulary, seed=0)
    found = base.lm.lm_head.bias.detach()
    assert torch.equal(found[: vocabulary.text_size], bias)
    assert found[vocabulary.text_size :].tolist() == [bias[: vocabulary.num_text].mean()] * (
        vocabulary.size - vocabulary.text_size
    )


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_text": 0}, "num_text 0 must be in 1..12"),
        ({"num_text": 13}, "num_text 13 must be in 1..12"),
        ({"text_eos": 10}, "end token 10 is not one of 10 text ids"),
        ({"text_eos": -1}, "end token -1 is not"),
        ({"codebook_size": 16}, "codebook size 16 is not the codec's 24"),
        ({"num_merges": -1}, "num_merges must not be negative, got -1"),
    ],
)
def test_ranges_of_ids_are_checked(facts: dict, message: str) -> None:
    fitting = {"num_text": 10, "text_size": 12, "text_eos": 9, "codebook_size": 24, "codec": STAMP}
    with pytest.raises(ValueError, match=message):
        Vocabulary(**{**fitting, **facts})
    for least in ({}, {"text_eos": 0}, {"text_eos": None}, {"num_text": 12}):
        Vocabulary(**{**fitting, **least})
