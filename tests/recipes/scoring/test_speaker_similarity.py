"""recipes/scoring/speaker_similarity.py."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import stand_in
from tiny_slm import STAMP

from codec.tokens import TokenRow, TokenShard, write_shard
from recipes.scoring.eval_items import EvalItem
from recipes.scoring.speaker_similarity import SpeakerSimilarity
from slm.data.prompts import Prompt
from slm.voice import Voice

SPEAKERS = {"a": 0, "b": 5, "c": 10}
"""Each one's code: a voice is an angle of a tenth of a right angle for each."""


def decode(prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.repeat(new[0], 640).astype(np.float32)


def embed(wave: np.ndarray, rate: int) -> np.ndarray:
    if len(wave) < 0.4 * rate:
        raise ValueError("too short")
    angle = float(wave.mean()) * np.pi / 20
    return np.array([np.cos(angle), np.sin(angle)])


VOICE = stand_in(Voice, codec=SimpleNamespace(sample_rate=16_000), decode=decode)


@pytest.fixture
def shard(tmp_path: Path) -> TokenShard:
    rows = [
        TokenRow(f"{name}{number}", "text", name, "en", 1.0, np.full((3, 25), code, np.uint16))
        for name, code in SPEAKERS.items()
        for number in range(1 if name == "c" else 2)
    ]
    write_shard(tmp_path / "dev.parquet", rows, STAMP)
    return TokenShard.open(tmp_path / "dev.parquet")


def item(speaker: str, prompt_id: str, remainder: int | None = None) -> EvalItem:
    codes = np.zeros((3, 5), np.int64)
    behind = None if remainder is None else np.full((3, 20), remainder)
    return EvalItem("x", "text", Prompt(codes=codes, text="p"), speaker, prompt_id, behind)


def test_own_and_other_speakers(shard: TokenShard, tmp_path: Path) -> None:
    wave = np.zeros(16_000, np.float32)  # a's voice
    found = SpeakerSimilarity(VOICE, shard, embed).of(item("a", "a0"), wave)
    assert found["similarity_speaker"] == pytest.approx(1.0)
    assert found["similarity_others"] == pytest.approx((np.cos(np.pi / 4) + 0.0) / 2)
    sexes = tmp_path / "sexes.json"
    sexes.write_text(json.dumps({"a": "f", "b": "f", "c": "m"}))
    found = SpeakerSimilarity(VOICE, shard, embed, sexes).of(item("a", "a0"), wave)
    assert found["similarity_others"] == pytest.approx(np.cos(np.pi / 4))


def test_speaker_of_one_recording_uses_its_remainder(shard: TokenShard) -> None:
    wave = np.full(16_000, 10.0, np.float32)  # c's voice
    scorer = SpeakerSimilarity(VOICE, shard, embed)
    assert scorer.of(item("c", "c0", remainder=10), wave)["similarity_speaker"] == pytest.approx(
        1.0
    )
    assert "similarity_speaker" not in scorer.of(item("c", "c0"), wave)
    assert scorer.of(item("c", "c0"), wave[:100]) == {}


def test_the_item_itself_is_no_reference(shard: TokenShard) -> None:
    scorer = SpeakerSimilarity(VOICE, shard, embed)
    repeated = item("a", "a0")._replace(id="a1.1", source_id="a1")
    assert "similarity_speaker" not in scorer.of(repeated, np.zeros(16_000, np.float32))


def test_speaker_without_a_sex_has_no_others(shard: TokenShard, tmp_path: Path) -> None:
    sexes = tmp_path / "sexes.json"
    sexes.write_text(json.dumps({"a": "f", "b": "f"}))
    scorer = SpeakerSimilarity(VOICE, shard, embed, sexes)
    wave = np.zeros(16_000, np.float32)
    assert "similarity_others" in scorer.of(item("a", "a0"), wave)
    assert "similarity_others" not in scorer.of(item("c", "c0"), wave)
    sexes.write_text(json.dumps({"p-a": "f"}))
    with pytest.raises(ValueError, match="has no speaker of"):
        SpeakerSimilarity(VOICE, shard, embed, sexes)


def test_invalid_file_of_sexes_is_a_user_error(shard: TokenShard, tmp_path: Path) -> None:
    (tmp_path / "sexes.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"sexes\.json: must hold a JSON object"):
        SpeakerSimilarity(VOICE, shard, embed, tmp_path / "sexes.json")
    with pytest.raises(ValueError, match="cannot be read"):
        SpeakerSimilarity(VOICE, shard, embed, tmp_path / "none.json")
