"""speaker_similarity.py: similarities to the speaker's other recordings, and to other speakers."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_slm import STAMP

from codec.tokens import TokenRow, TokenShard, write_shard
from recipes.scoring.eval_items import Line
from recipes.scoring.speaker_similarity import Likeness
from slm.data.sequences import Prompt

SPEAKERS = {"a": 0, "b": 5, "c": 10}
"""Each one's code: a voice is an angle of a tenth of a right angle for each."""


def decode(prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.repeat(new[0], 640).astype(np.float32)


def embed(wave: np.ndarray, rate: int) -> np.ndarray:
    if len(wave) < 0.4 * rate:
        raise ValueError("too short")
    angle = float(wave.mean()) * np.pi / 20
    return np.array([np.cos(angle), np.sin(angle)])


VOICE = SimpleNamespace(codec=SimpleNamespace(sample_rate=16_000), decode=decode)


@pytest.fixture
def shard(tmp_path: Path) -> TokenShard:
    rows = [
        TokenRow(f"{name}{number}", "text", name, "en", 1.0, np.full((3, 25), code, np.uint16))
        for name, code in SPEAKERS.items()
        for number in range(1 if name == "c" else 2)
    ]
    write_shard(tmp_path / "dev.parquet", rows, STAMP)
    return TokenShard.open(tmp_path / "dev.parquet")


def line(speaker: str, prompt_id: str, rest: int | None = None) -> Line:
    codes = np.zeros((3, 5), np.int64)
    behind = None if rest is None else np.full((3, 20), rest)
    return Line("x", "text", Prompt(codes=codes, text="p"), speaker, prompt_id, behind)


def test_own_and_other_speakers(shard: TokenShard, tmp_path: Path) -> None:
    wave = np.zeros(16_000, np.float32)  # a's voice
    found = Likeness(VOICE, shard, embed).of(line("a", "a0"), wave)
    assert found["similarity_speaker"] == pytest.approx(1.0)
    assert found["similarity_others"] == pytest.approx((np.cos(np.pi / 4) + 0.0) / 2)
    sexes = tmp_path / "sexes.json"
    sexes.write_text(json.dumps({"a": "f", "b": "f", "c": "m"}))
    found = Likeness(VOICE, shard, embed, sexes).of(line("a", "a0"), wave)
    assert found["similarity_others"] == pytest.approx(np.cos(np.pi / 4))


def test_a_single_recording_is_compared_by_its_rest(shard: TokenShard) -> None:
    wave = np.full(16_000, 10.0, np.float32)  # c's voice
    likeness = Likeness(VOICE, shard, embed)
    assert likeness.of(line("c", "c0", rest=10), wave)["similarity_speaker"] == pytest.approx(1.0)
    assert "similarity_speaker" not in likeness.of(line("c", "c0"), wave)
    assert likeness.of(line("c", "c0"), wave[:100]) == {}


def test_the_item_that_is_said_again_is_no_other_recording(shard: TokenShard) -> None:
    likeness = Likeness(VOICE, shard, embed)
    said = line("a", "a0")._replace(id="a1.1", item="a1")
    assert "similarity_speaker" not in likeness.of(said, np.zeros(16_000, np.float32))


def test_without_a_sex_there_are_no_others(shard: TokenShard, tmp_path: Path) -> None:
    sexes = tmp_path / "sexes.json"
    sexes.write_text(json.dumps({"a": "f", "b": "f"}))
    likeness = Likeness(VOICE, shard, embed, sexes)
    wave = np.zeros(16_000, np.float32)
    assert "similarity_others" in likeness.of(line("a", "a0"), wave)
    assert "similarity_others" not in likeness.of(line("c", "c0"), wave)
    sexes.write_text(json.dumps({"p-a": "f"}))
    with pytest.raises(ValueError, match="tells the sex of no speaker"):
        Likeness(VOICE, shard, embed, sexes)


def test_a_file_that_says_no_sexes_is_named(shard: TokenShard, tmp_path: Path) -> None:
    (tmp_path / "sexes.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"sexes\.json: give a JSON object"):
        Likeness(VOICE, shard, embed, tmp_path / "sexes.json")
    with pytest.raises(ValueError, match="not to be read"):
        Likeness(VOICE, shard, embed, tmp_path / "none.json")
