"""recipes/scoring/eval_items.py: choice of prompts, truncation, and the words that remain."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import stand_in
from tiny_slm import STAMP

from codec.distillation.word_alignment import Word
from codec.tokens import TokenRow, TokenShard, write_shard
from recipes.scoring.eval_items import (
    PromptCutter,
    continuation_items,
    count_prefix_words,
    cross_items,
    nearest_in_length,
    quietest_point,
    select_items,
)
from recipes.scoring.judges import Judges
from slm.voice import Voice

RATE, HOP = 16_000, 640
TEXT = "red hens ran over green fields"


def decode(prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Codes are amplitudes."""
    return np.repeat(new[0] / 10, HOP).astype(np.float32)


VOICE = stand_in(Voice, codec=SimpleNamespace(sample_rate=RATE, frame_rate=25.0), decode=decode)


def judges(transcript: str = "") -> Judges:
    transcribe = (lambda wave, rate: transcript) if transcript else None
    return Judges(transcribe, None, "judge" if transcript else "", "")


def row(name: str, frames: int, speaker: str = "s", text: str = TEXT, pause: int = -1) -> TokenRow:
    codes = np.full((3, frames), 5, np.uint16)
    if pause >= 0:
        codes[:, pause : pause + 5] = 0
    return TokenRow(name, text, speaker, "en", frames / 25, codes)


def shard(folder: Path, *rows: TokenRow) -> TokenShard:
    write_shard(folder / "dev.parquet", rows, STAMP)
    return TokenShard.open(folder / "dev.parquet")


def test_quietest_point_is_within_the_bounds() -> None:
    wave = decode(np.zeros((3, 0)), row("a", 200, pause=80).codes)
    assert quietest_point(wave, RATE, 2.0, 4.0) == pytest.approx(82.5 / 25, abs=0.02)
    assert 1.0 <= quietest_point(wave, RATE, 1.0, 2.0) <= 2.0


def test_prompt_ends_at_a_pause_and_has_the_words_of_the_transcript() -> None:
    cutter = PromptCutter(VOICE, judges("Red hands ran."), 3.0)
    one = row("a", 200, pause=80)
    prompt, remainder = cutter.cut(one)
    assert prompt.text == "red hens ran"
    assert prompt.codes.shape[1] in (82, 83)
    assert np.array_equal(np.concatenate([prompt.codes, remainder], axis=1), one.codes)
    # Without a judge the share of words is that of the length.
    assert PromptCutter(VOICE, judges(), 3.0).cut(one)[0].text == "red hens"


def test_recording_within_tolerance_is_not_truncated() -> None:
    cutter = PromptCutter(VOICE, judges("red hens"), 3.0)
    assert cutter.cut(row("a", 95))[0].text == TEXT
    prompt, remainder = cutter.cut(row("a", 95), always=True)
    assert prompt.text == "red hens"
    assert remainder.shape[1] >= 95 - prompt.codes.shape[1] > 0


def test_with_an_aligner_a_prompt_ends_between_two_words() -> None:
    def words(wave, texts):
        assert texts == [TEXT]
        names = TEXT.split()
        return [[Word(name, index * 1.2, index * 1.2 + 1.0) for index, name in enumerate(names)]]

    aligner = SimpleNamespace(name="aligner", sample_rate=RATE, words=words)
    prompt, _ = PromptCutter(VOICE, judges(), 3.0, aligner).cut(row("a", 180))
    # The gaps are around 1.1, 2.3, 3.5, ... s.
    assert prompt.text == "red hens ran"
    assert prompt.codes.shape[1] / 25 == pytest.approx(3.5, abs=0.05)


@pytest.mark.parametrize(
    ("transcript", "count"),
    [("red hens ran", 3), ("red", 1), ("red hen ran", 3), ("", 1)],
)
def test_number_of_words_of_a_truncated_recording(transcript: str, count: int) -> None:
    assert count_prefix_words(TEXT.split(), transcript) == count


def test_prompts_of_the_cross_list(tmp_path: Path) -> None:
    dev = shard(
        tmp_path,
        row("long", 250), row("fits", 70), row("short", 20), row("alone", 200, "t", "other words"),
    )  # fmt: skip
    assert dev.ids[nearest_in_length(dev, [0, 1, 2], 3.0)] == "fits"
    assert dev.ids[nearest_in_length(dev, [0, 2], 3.0)] == "long"
    items = cross_items([dev[0], dev[3]], dev, PromptCutter(VOICE, judges(), 3.0))
    assert [(item.id, item.prompt_id, item.speaker) for item in items] == [
        ("long", "fits", "s"), ("alone", "alone", "t"),
    ]  # fmt: skip
    assert [item.source_id for item in items] == ["long", "alone"]
    # A speaker of one recording gets another item's text.
    assert [item.text for item in items] == [TEXT, TEXT]
    remainder = items[1].remainder
    assert remainder is not None
    assert remainder.shape[1] + items[1].prompt.codes.shape[1] == 200
    assert not cross_items([dev[3]], dev, PromptCutter(VOICE, judges(), 3.0))


def test_a_continuation_has_at_most_half_of_its_item() -> None:
    items = continuation_items([row("a", 200), row("b", 40)], 3.0, 25.0)
    assert [item.prompt.codes.shape[1] for item in items] == [75, 20]
    assert all(item.prompt.continuation for item in items)


def test_training_texts_are_excluded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dev = shard(tmp_path, row("a", 9, text="Known, text"), row("b", 9, text="new"))
    assert [one.id for one in select_items(dev, 5, {"known text"})] == ["b"]
    assert len(select_items(dev, 5, {"known text", "new"})) == 2
    assert "all texts of" in caplog.text
