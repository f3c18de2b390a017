"""Prompts: what a codec can decode, and files that keep everything."""

import json

import numpy as np
import pytest

from slm.data.prompts import Prompt, load_prompts

SIZES = (8, 4)


def prompt(*rows: list[int]) -> Prompt:
    return Prompt(codes=np.array(rows), text="Caf\u00e9.", credit="Ada, CC0")


def test_codes_lie_within_their_codebooks() -> None:
    prompt([0, 7, 7], [3, 0, 3]).check(SIZES)
    with pytest.raises(ValueError, match="code 8 in codebook 1, which has 8 entries"):
        prompt([0, 8, 7], [3, 0, 3]).check(SIZES)
    with pytest.raises(ValueError, match="code 4 in codebook 2, which has 4 entries"):
        prompt([0, 7, 7], [3, 0, 4]).check(SIZES)
    with pytest.raises(ValueError, match="code -1 in codebook 2"):
        prompt([0, 7, 7], [-1, 0, 3]).check(SIZES)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros(3, int), r"shape \(3,\); this codec makes \(2, T\)"),
        (np.zeros((2, 3, 1), int), r"shape \(2, 3, 1\)"),
        (np.zeros((1, 3), int), r"shape \(1, 3\)"),
        (np.zeros((2, 0), int), r"shape \(2, 0\)"),
        (np.zeros((2, 3)), "float64, not integers"),
        (np.zeros((2, 3), bool), "bool, not integers"),
    ],
)
def test_codes_are_one_row_of_integers_a_codebook(codes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompt(codes=codes, text="").check(SIZES)
    Prompt(codes=np.zeros((2, 1), np.uint16), text="").check(SIZES)


def test_prompts_round_trip_by_name(tmp_path) -> None:
    assert load_prompts(tmp_path / "missing") == {}
    for name in ("b", "a"):
        prompt([0, 7], [3, 0]).save(tmp_path, name)
    assert "Caf\u00e9." in (tmp_path / "a.json").read_text(encoding="utf-8")
    found = load_prompts(tmp_path)
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["a"].codes, [[0, 7], [3, 0]])
    assert found["a"].codes.dtype == np.int64
    assert (found["a"].text, found["a"].credit) == ("Caf\u00e9.", "Ada, CC0")
    assert not found["a"].continuation


@pytest.mark.parametrize(
    "change",
    [
        *({"codes": [1, 2]}, {"codes": [["x"]]}, {"codes": None}, {"codes": [[2**70]]}),
        *({"text": 5}, {"credit": None}, None),
    ],
)
def test_a_damaged_prompt_is_named(tmp_path, change: dict | None) -> None:
    record = {"codes": [[1]], "text": "", "credit": ""}
    made = json.dumps({**record, **change} if change else {"codes": [[1]]})
    (tmp_path / "p.json").write_text(made)
    with pytest.raises(ValueError, match=r"p\.json: not a prompt"):
        load_prompts(tmp_path)
