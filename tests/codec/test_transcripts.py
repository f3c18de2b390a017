"""The one lower-casing rule for transcripts in capitals."""

import pytest

from codec.transcripts import has_words, lowercase_if_all_caps, lowercase_words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IT'S 5 O'CLOCK, I SAY", "it's 5 o'clock, i say"),
        ("NASA", "NASA"),
        ("NASA !", "NASA !"),
        ("NASA said", "NASA said"),
        ("", ""),
        ("5 6", "5 6"),
    ],
)
def test_texts_all_in_capitals(text: str, expected: str) -> None:
    assert lowercase_if_all_caps(text) == expected


def test_words_of_a_crop() -> None:
    assert lowercase_words(["HELLO"]) == ["hello"]
    assert lowercase_words(["HELLO", "there"]) == ["HELLO", "there"]
    assert lowercase_words([]) == []


def test_has_words() -> None:
    assert has_words("7")
    assert not has_words("- ...")
