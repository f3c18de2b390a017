"""Long texts: where they are split, and that their waves are joined without clicks."""

import numpy as np
import pytest
from conftest import voiced

from slm.generation.long_form import (
    CLAUSE_PAUSE,
    PARAGRAPH_PAUSE,
    SENTENCE_PAUSE,
    WORD_PAUSE,
    Piece,
    join,
    split_text,
)

RATE = 16_000


def sentences(text: str) -> list[str]:
    """Pieces where any two sentences are too long together."""
    return [piece.text for piece in split_text(text, lambda part: len(part) < 30)]


@pytest.mark.parametrize(
    "text",
    [
        "It cost 3.50 in all, 1,000.",
        "Dr. Smith met Mrs. J. K. Hill.",
        "The U.S. Army left at 5 p.m.",
        "See No. 5, i.e. The Hague.",
        '"Stop! Go away." He left.',
        '"Stop!" he said to Ann again.',
        "\u201cStop. Go home.\u201d He left.",
        "Wait... and see what is next.",
    ],
)
def test_what_does_not_end_a_sentence_does_not_split(text: str) -> None:
    pieces = split_text(f"{text} Then came the end of it all.", lambda part: len(part) < 33)
    assert pieces[0].text == text


def test_splits_at_sentences_then_within_quotations_then_at_commas_then_at_words() -> None:
    text = (
        'A cat sat there. "Red hens ran. A dog did." One two three, four five six seven eight ok.'
    )
    assert split_text(text, lambda part: len(part) < 20) == [
        Piece("A cat sat there.", SENTENCE_PAUSE),
        Piece('"Red hens ran.', SENTENCE_PAUSE),
        Piece('A dog did."', SENTENCE_PAUSE),
        Piece("One two three,", CLAUSE_PAUSE),
        Piece("four five six seven", WORD_PAUSE),
        Piece("eight ok.", 0.0),
    ]


def test_pieces_are_as_long_as_they_fit_and_lose_nothing() -> None:
    text = "One. Two two. Three three three. " * 5
    pieces = split_text(text, lambda part: len(part) <= 40)
    assert " ".join(piece.text for piece in pieces) == " ".join(text.split())
    assert max(len(piece.text) for piece in pieces) <= 40
    assert len(pieces) == 5
    assert split_text(text, lambda _: True) == [Piece(" ".join(text.split()), 0.0)]


def test_paragraphs_split_without_a_full_stop() -> None:
    text = "A heading of words\n\nand what is below it, all of it."
    assert sentences(text)[0] == "A heading of words"


def test_a_blank_line_is_a_pause_however_short_the_text_is() -> None:
    pieces = split_text("Chapter One\n\nIt was\nlate. He left.\n \n***\n\nTwo", lambda _: True)
    assert pieces == [
        Piece("Chapter One", PARAGRAPH_PAUSE),
        Piece("It was late. He left. ***", PARAGRAPH_PAUSE),
        Piece("Two", 0.0),
    ]


def test_pauses_of_blank_lines_may_be_given() -> None:
    pieces = split_text("a\n\nb\n\nc\n\nd", lambda _: True, [0.1, None])
    assert [piece.pause for piece in pieces] == [0.1, PARAGRAPH_PAUSE, PARAGRAPH_PAUSE, 0.0]


def test_what_has_no_spaces_is_split_behind_its_signs() -> None:
    text = ",".join(["word"] * 300) + "_" + "/".join(["path"] * 9)
    pieces = split_text(text, lambda part: len(part) < 20)
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) < 20


def test_a_piece_has_words() -> None:
    assert sentences("He is gone now ... ... Oh! ! Well done, all of you.") == [
        "He is gone now ... ... Oh! !",
        "Well done, all of you.",
    ]


def test_a_word_that_does_not_fit_is_a_piece_all_the_same() -> None:
    long = "a" * 50
    assert [p.text for p in split_text(f"x {long} y", lambda t: len(t) < 9)] == ["x", long, "y"]


def test_a_book_is_split_in_a_moment() -> None:
    text = 'He said, "Go, Mr. Hill." So they went. ' * 5000
    pieces = split_text(text, lambda part: len(part) < 90)
    assert {piece.text for piece in pieces} == {text[:77]}


def test_other_scripts_need_no_space_behind_a_full_stop() -> None:
    text = "\u4f60\u597d\u3002\u518d\u89c1\u3002"
    assert [p.text for p in split_text(text, lambda t: len(t) < 4)] == [text[:3], text[3:]]


def padded(before: float, after: float, seed: int = 0) -> np.ndarray:
    sound = voiced(0.5, seed=seed)
    noise = 1e-3 * np.random.default_rng(seed).standard_normal(round((before + after) * RATE))
    edge = round(before * RATE)
    return np.concatenate([noise[:edge], sound, noise[edge:]]).astype(np.float32)


def test_a_single_piece_stays_as_it_is() -> None:
    wave = padded(0.5, 0.5)
    assert np.array_equal(np.concatenate(list(join([([wave], 0.0)], RATE))), wave)


def test_the_silence_between_two_pieces_is_the_pause() -> None:
    waves = [padded(0.3, 0.6), padded(0.7, 0.2, seed=1), padded(0.0, 0.0, seed=2)]
    pieces = [([wave], pause) for wave, pause in zip(waves, (0.4, 0.2, 0.0), strict=True)]
    joined = np.concatenate(list(join(pieces, RATE)))
    # 0.3 + 0.5 + 0.4 + 0.5 + 0.2 + 0.5, to a window
    assert len(joined) == pytest.approx(2.4 * RATE, abs=0.04 * RATE)
    assert np.array_equal(joined[: round(0.79 * RATE)], waves[0][: round(0.79 * RATE)])
    # No step is greater than those of the waves themselves.
    steps = max(float(np.abs(np.diff(wave)).max()) for wave in waves)
    assert float(np.abs(np.diff(joined)).max()) <= steps


def test_blocks_of_any_size_join_to_the_same_wave() -> None:
    waves = [padded(0.1, 0.3), np.zeros(3000, np.float32), padded(0.3, 0.1, seed=1)]
    whole = list(join([([wave], 0.3) for wave in waves], RATE))
    blocks = [np.split(wave, range(777, len(wave), 777)) for wave in waves]
    parts = list(join([(block, 0.3) for block in blocks], RATE))
    assert len(parts) > len(whole)
    assert np.array_equal(np.concatenate(parts), np.concatenate(whole))
