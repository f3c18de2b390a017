"""recipes/offline/kokoro.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from recipes.offline.kokoro import MAX_SYMBOLS, Kokoro, draw_styles, symbols_of


@pytest.mark.parametrize(
    ("phonemes", "symbols"),
    [
        ("t\u0283^", "t\u0283"),
        ("t^\u0283\u02c8o^\u028az", "\u02a7\u02c8Oz"),  # chose
        ("d^\u0292\u02c8\u028cd^\u0292", "\u02a4\u02c8\u028c\u02a4"),  # judge
        ("b\u02c8\u025c\u02d0d", "b\u02c8\u025c\u0279d"),  # bird
        ("\u0279\u02c8\u026av\u025a", "\u0279\u02c8\u026av\u0259\u0279"),  # river
        ("n\u02c8a^\u026an, \u0261\u02c8e^\u026at!", "n\u02c8In, \u0261\u02c8At!"),
    ],
)
def test_phonemes_to_symbols(phonemes: str, symbols: str) -> None:
    assert symbols_of(phonemes) == symbols


def styles(number: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    mean = random.normal(size=(6, 256))
    return {
        f"v{i}": (mean + random.normal(size=(6, 256))).astype(np.float32) for i in range(number)
    }


def test_drawn_voices_are_distributed_like_the_given_ones() -> None:
    known = styles(12)
    drawn = draw_styles(known, 30, seed=1)
    assert sorted(drawn) == [f"drawn-{index:04d}" for index in range(30)]
    table = np.stack([one.ravel() for one in known.values()])
    made = np.stack([one.ravel() for one in drawn.values()])
    spread = [np.linalg.norm(rows - table.mean(0), axis=1).mean() for rows in (table, made)]
    assert spread[1] == pytest.approx(spread[0], rel=0.3)
    assert len({one.tobytes() for one in drawn.values()}) == 30
    again, other = draw_styles(known, 30, seed=1), draw_styles(known, 30, seed=2)
    assert np.array_equal(again["drawn-0003"], drawn["drawn-0003"])
    assert not np.array_equal(other["drawn-0003"], drawn["drawn-0003"])


@pytest.fixture
def kokoro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kokoro:
    (tmp_path / "config.json").write_text(json.dumps({"a": 7, "b": 8, " ": 16}))
    save_file({"af_one": np.arange(510 * 256, dtype=np.float32).reshape(510, 256)},
              tmp_path / "styles.safetensors")  # fmt: skip
    return Kokoro(tmp_path)


def test_inputs_are_ids_and_the_style_of_their_number(kokoro: Kokoro) -> None:
    given: dict[str, Any] = {}

    class Session:
        def run(self, _: None, inputs: dict[str, Any]) -> list[np.ndarray]:
            given.update(inputs)
            return [np.zeros((1, 50), np.float32)]

    kokoro.__dict__["_session"] = Session()
    wave = kokoro.synthesize("ab?b", kokoro.styles["af_one"], 1.1)
    assert wave.shape == (50,)
    assert given["tokens"].tolist() == [[0, 7, 8, 8, 0]]
    assert given["style"].tolist() == [kokoro.styles["af_one"][3].tolist()]
    assert given["speed"].tolist() == pytest.approx([1.1])
    for wrong in ("", "?", "a" * (MAX_SYMBOLS + 1)):
        with pytest.raises(ValueError, match="cannot be synthesized"):
            kokoro.synthesize(wrong, kokoro.styles["af_one"])


def test_missing_model_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="makes models/kokoro-82m"):
        Kokoro(tmp_path / "none")
