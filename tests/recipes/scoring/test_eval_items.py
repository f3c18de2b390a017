"""eval_items.py: who lends the voice, where a prompt is cut, and which words it holds."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_slm import STAMP

from codec.distillation.word_alignment import Word
from codec.tokens import TokenRow, TokenShard, write_shard
from recipes.scoring.eval_items import (
    Cutter,
    best_prompt,
    continuations,
    crosses,
    num_begun,
    quietest,
    spread,
)
from recipes.scoring.judges import Judges

RATE, HOP = 16_000, 640
TEXT = "red hens ran over green fields"


def decode(prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Codes are amplitudes."""
    return np.repeat(new[0] / 10, HOP).astype(np.float32)


VOICE = SimpleNamespace(codec=SimpleNamespace(sample_rate=RATE, frame_rate=25.0), decode=decode)


def judges(heard: str = "") -> Judges:
    return Judges(lambda wave, rate: heard, None, "judge" if heard else "", "")


def row(name: str, frames: int, speaker: str = "s", text: str = TEXT, pause: int = -1) -> TokenRow:
    codes = np.full((3, frames), 5, np.uint16)
    if pause >= 0:
        codes[:, pause : pause + 5] = 0
    return TokenRow(name, text, speaker, "en", frames / 25, codes)


def shard(folder: Path, *rows: TokenRow) -> TokenShard:
    write_shard(folder / "dev.parquet", rows, STAMP)
    return TokenShard.open(folder / "dev.parquet")


def test_the_quietest_point_is_within_the_bounds() -> None:
    wave = decode(np.zeros((3, 0)), row("a", 200, pause=80).codes)
    assert quietest(wave, RATE, 2.0, 4.0) == pytest.approx(82.5 / 25, abs=0.02)
    assert 1.0 <= quietest(wave, RATE, 1.0, 2.0) <= 2.0


def test_a_prompt_is_cut_at_a_pause_and_has_the_words_that_were_heard() -> None:
    cutter = Cutter(VOICE, judges("Red hands ran."), 3.0)
    one = row("a", 200, pause=80)
    prompt, rest = cutter.prompt(one)
    assert prompt.text == "red hens ran"
    assert prompt.codes.shape[1] in (82, 83)
    assert np.array_equal(np.concatenate([prompt.codes, rest], axis=1), one.codes)
    # Without a judge the text is shared out.
    assert Cutter(VOICE, judges(), 3.0).prompt(one)[0].text == "red hens"


def test_what_is_but_a_little_longer_is_left_whole() -> None:
    cutter = Cutter(VOICE, judges("red hens"), 3.0)
    assert cutter.prompt(row("a", 95))[0].text == TEXT
    prompt, rest = cutter.prompt(row("a", 95), always=True)
    assert prompt.text == "red hens"
    assert rest.shape[1] >= 95 - prompt.codes.shape[1] > 0


def test_with_word_times_a_prompt_ends_between_two_words() -> None:
    def words(wave, texts):
        assert texts == [TEXT]
        names = TEXT.split()
        return [[Word(name, index * 1.2, index * 1.2 + 1.0) for index, name in enumerate(names)]]

    aligner = SimpleNamespace(sample_rate=RATE, words=words)
    prompt, _ = Cutter(VOICE, judges(), 3.0, aligner).prompt(row("a", 180))
    # The gaps are around 1.1, 2.3, 3.5, ... s.
    assert prompt.text == "red hens ran"
    assert prompt.codes.shape[1] / 25 == pytest.approx(3.5, abs=0.05)


@pytest.mark.parametrize(
    ("heard", "count"),
    [("red hens ran", 3), ("red", 1), ("red hen ran", 3), ("", 1)],
)
def test_the_words_of_a_beginning(heard: str, count: int) -> None:
    assert num_begun(TEXT.split(), heard) == count


def test_who_lends_the_voice(tmp_path: Path) -> None:
    dev = shard(
        tmp_path,
        row("long", 250), row("fits", 70), row("short", 20), row("alone", 200, "t", "other words"),
    )  # fmt: skip
    assert dev.ids[best_prompt(dev, [0, 1, 2], 3.0)] == "fits"
    assert dev.ids[best_prompt(dev, [0, 2], 3.0)] == "long"
    lines = crosses([dev[0], dev[3]], dev, Cutter(VOICE, judges(), 3.0))
    assert [(line.id, line.prompt_id, line.speaker) for line in lines] == [
        ("long", "fits", "s"), ("alone", "alone", "t"),
    ]  # fmt: skip
    assert [line.item for line in lines] == ["long", "alone"]
    # The speaker of one recording says another item's text.
    assert [line.text for line in lines] == [TEXT, TEXT]
    rest = lines[1].rest
    assert rest is not None
    assert rest.shape[1] + lines[1].prompt.codes.shape[1] == 200
    assert not crosses([dev[3]], dev, Cutter(VOICE, judges(), 3.0))


def test_a_continuation_has_at_most_half_of_its_item() -> None:
    lines = continuations([row("a", 200), row("b", 40)], 3.0, 25.0)
    assert [line.prompt.codes.shape[1] for line in lines] == [75, 20]
    assert all(line.prompt.continuation for line in lines)


def test_texts_that_were_trained_on_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dev = shard(tmp_path, row("a", 9, text="Known, text"), row("b", 9, text="new"))
    assert [one.id for one in spread(dev, 5, {"known text"})] == ["b"]
    assert len(spread(dev, 5, {"known text", "new"})) == 2
    assert "every text" in caplog.text
