"""text_normalization.py: numbers and abbreviations in words, no word lost, and phonemes by an
extra."""

import random
import re
import sys

import pytest

from slm.tokenization import text_normalization as spelling
from slm.tokenization.text_normalization import normalize, phonemes

EXPECTED = {
    "Dr. Smith paid $3.50 on 21 Nov. 2026, at 5:30 p.m., for 2 lbs., etc.": (
        "Doctor Smith paid three dollars and fifty cents on the twenty first of November "
        "twenty twenty six, at five thirty PM, for two pounds, et cetera."
    ),
    "It's 1st of 1,234 items; 50% off, No. 7.": (
        "It's first of one thousand two hundred and thirty four items; fifty percent off, "
        "Number seven."
    ),
    "1,000,000 and 21,000 and a thousand 5": (
        "one million and twenty one thousand and a thousand five"
    ),
    "in the 1990s, the '90s, 1900s, 2000s and 2010's": (
        "in the nineteen nineties, the nineties, nineteen hundreds, two thousands and twenty tens"
    ),
    "1905, 1984, 2005 and 1001": (
        "nineteen oh five, nineteen eighty four, two thousand five and one thousand and one"
    ),
    "call 555-1234 or (555) 123-4067": (
        "call five five five, one two three four or five five five, one two three, "
        "four oh six seven"
    ),
    "10-20 men, -5 degrees, 3/4 of 7 km/h": (
        "ten to twenty men, negative five degrees, three quarters of seven kilometers per hour"
    ),
    "$1 to $1,234.56, $0.50, \u00a32.01 and $1.50 million": (
        "one dollar to one thousand two hundred and thirty four dollars and fifty six cents, "
        "fifty cents, two pounds and one penny and one point five million dollars"
    ),
    "5 ft. 6 in. tall, 100 m. away": "five feet six inches tall, one hundred meters away",
    "MR BROWN, mrs. Hall and Mr Pike": "MISTER BROWN, missus Hall and Mister Pike",
    "12 St. James St. in St. Paul": "twelve Saint James Street in Saint Paul",
    "R&B, i.e. this vs. that, e.g. #1": "R and B, that is this versus that, for example number one",
    "[9] and \u00a75": "[nine] and \u00a7five",
    "he said \u201cten, 10\u201d": 'he said "ten, ten"',
    "the 10th-century, 1,000-mile walk": "the tenth century, one thousand mile walk",
    "12/25/2020, of may 5 and 4 July": (
        "the twenty fifth of December twenty twenty, of may five and the fourth of July"
    ),
    "$5k, $2.5K or \u00a33m, not $1bn": (
        "five thousand dollars, two point five thousand dollars or three million pounds, not one "
        "billion dollars"
    ),
    "V2.0 and v3.11.1, e.g. v1": (
        "Version two point zero and version three point eleven point one, for example v one"
    ),
    "mail me@x.com 24/7": "mail me at x dot com twenty four seven",
}


@pytest.mark.parametrize("text", EXPECTED)
def test_numbers_and_abbreviations_are_spelt_out(text: str) -> None:
    assert normalize(text) == EXPECTED[text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " the cat  sat\non a mat ",
        'don\'t "quote" [it]... J. K. Rowling, U.S.',
        "may I march in. No. I said",
        "Wait #, %, @home, a \\ b",
        "\u4f60\u597d 5",
        "\u041f\u044f\u0442\u044c 5, Mr. X",
    ],
)
def test_what_needs_nothing_or_is_of_another_script_stays(text: str) -> None:
    assert normalize(text) == text


PARTS = [
    *("5", "1,234", "1905", "$3.50", "50%", "No. 7", "p.m.", "Mr.", "St.", "etc.", "Nov.", "May"),
    *("3rd", "555-1234", "lbs.", "km/h", "1990s", "#1", "&", "cat", "the", "thousand", "and", "x"),
    *("$5k", "v2.0", "12/25/2020"),
    *('"so"', "(well)", "a\\b", "caf\u00e9", "--", "\u00bd", "10:30", "@", "=", "\u2019tis"),
]


def test_normalised_text_stays_and_no_word_is_lost() -> None:
    draw = random.Random(0)
    for _ in range(150):
        text = draw.choice([" ", "  "]).join(draw.choices(PARTS, k=draw.randint(1, 7)))
        once = normalize(text)
        assert normalize(once) == once, text
        assert not re.search(r"[0-9]", once), text
        for word in ("cat", "caf\u00e9", "so", "well"):
            assert once.count(word) >= text.count(word), (text, once)


def test_texts_that_need_nothing_do_not_load_wetext(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError

    monkeypatch.setattr(spelling, "_wetext", fail)
    assert normalize("Mr. Brown does not count") == "Mister Brown does not count"


@pytest.mark.parametrize(
    ("loader", "module", "message"),
    [
        (spelling._wetext, "wetext", "needs wetext"),
        (spelling._espeak, "espeakng_loader", "extra `phonemes`"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, loader, module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        loader.__wrapped__()


def test_phonemes_keep_words_and_punctuation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        def phonemize(self, texts: list[str], separator: str, strip: bool) -> list[str]:
            return [text.replace("cat", "k\u02c8\u00e6t") + " " for text in texts]

    monkeypatch.setattr(spelling, "_espeak", lambda: (Backend(), " "))
    phonemes.cache_clear()
    assert phonemes("a cat, no?") == "a k\u02c8\u00e6t, no?"
    phonemes.cache_clear()
    monkeypatch.setattr(spelling, "_espeak", None)  # not asked for what is IPA, or no word
    assert phonemes("a k\u02c8\u00e6t") == "a k\u02c8\u00e6t"
    assert phonemes("...") == "..."
    phonemes.cache_clear()


def test_phonemes_of_espeak() -> None:
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("phonemizer")
    said = phonemes("Hello, world! How are you?")
    assert re.fullmatch(r"h\S+, w\S+! h\S+ \S+ j\S+\?", said)
    assert "\u02c8" in said
    assert phonemes(said) == said
