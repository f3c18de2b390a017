"""text_normalization.py: numbers and abbreviations in words, no word lost, and phonemes by an
extra."""

import json
import random
import re
import sys
import time

import pytest
from conftest import ROOT

from codec.transcripts import lowercase_if_all_caps
from slm.tokenization import text_normalization as spelling
from slm.tokenization.markup import read_markup
from slm.tokenization.text_normalization import (
    clean_text,
    normalize,
    phonemes,
    remove_signs,
    unread_signs,
)

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
    "[9] and \u00a75": "[nine] and section five",
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
    "20-30\u20ac, 5-10%, +5, 5+, 1000 and 5 \u03bcm": (
        "twenty to thirty euros, five to ten percent, plus five, five plus, one thousand and "
        "five micrometers"
    ),
    "5 > 3, 3 < 5, x\u00b2 + y = 2, 5 m/s, 3 hrs. or 1 hr": (
        "five is greater than three, three is less than five, x squared plus y equals two, "
        "five meters per second, three hours or one hour"
    ),
    "50 USD, \u00a5500 or \u20b92k, 1 m\u00b2 at 3\u215c miles": (
        "fifty dollars, five hundred yen or two thousand rupees, one square meter at "
        "three and three eighths miles"
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
        "Wait #, %, @ home, a \\ b",
        "\u4f60\u597d 5",
        "\u041f\u044f\u0442\u044c 5, Mr. X",
    ],
)
def test_what_needs_nothing_or_is_of_another_script_stays(text: str) -> None:
    assert normalize(text) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("so\u00adfar wi\u200bth\u2060 \ufeffit\u202e", "sofar with it"),
        ("\ufeffHello", "Hello"),
        ("\U0001d407\U0001d41e\U0001d425\U0001d425\U0001d428", "Hello"),
        ("\uff28\uff49\uff01 \ufb01nd \ufb03", "Hi! find ffi"),
        ("cafe\u0301\u00a0no\u2011one 20\u2103", "caf\u00e9 no-one 20\u00b0C"),
        ("a\x00b\x1bc\r\nd\re\u2028f\u2029g", "abc\nd\ne\nf\n\ng"),
        ("10\u2077 m\u00b2 \u00bd don\u00b4t H\u2082O", "10\u2077 m\u00b2 \u00bd don\u00b4t H2O"),
        ("\u4f60\u597d\uff0c\u200b\uff76\uff01", "\u4f60\u597d\uff0c\u30ab\uff01"),
        ("\u0645\u06cc\u200c\u0634", "\u0645\u06cc\u200c\u0634"),
        (" plain\ttext,\n\n5 of it ", " plain\ttext,\n\n5 of it "),
    ],
)
def test_unicode_forms_are_composed_and_invisible_characters_removed(text: str, clean: str) -> None:
    assert clean_text(text) == clean
    assert clean_text(clean) == clean


SPOKEN = [
    json.loads(line)
    for line in (ROOT / "tests" / "golden" / "texts.jsonl").read_text().split("\n")
    if line
]


@pytest.mark.parametrize("case", SPOKEN, ids=lambda case: case["text"])
def test_numbers_with_signs_and_suffixes(case: dict) -> None:
    made = normalize(clean_text(case["text"]))
    assert made in case["spoken"]
    assert not unread_signs(made)


ENGLISH: dict[str, list[dict]] = {}
for line in (ROOT / "tests" / "golden" / "texts_en.jsonl").read_text().strip().split("\n"):
    ENGLISH.setdefault(json.loads(line)["kind"], []).append(json.loads(line))


def as_read(text: str) -> str:
    """A reading without the differences that are not heard; signs that are no pauses stay."""
    text = re.sub(r"(?<=[a-z])\.(?=[a-z])", " ", text.lower())
    text = re.sub(r"(?<![a-z'])'|'(?![a-z])", " ", text)
    text = re.sub('[.,;:!?"()\\[\\]\u00a1\u00bf\u2013\u2014\u2026-]', " ", text)
    return re.sub(r"\b([ap]) m\b", r"\1m", " ".join(text.split()))


@pytest.mark.parametrize("kind", ENGLISH)
def test_english_texts_of_a_kind(kind: str) -> None:
    """Each text has a reading of `spoken`, or signs that are `named` in a warning and not read, or
    a script that is `refused`; wrong readings that are known are listed as `read`."""
    for case in ENGLISH[kind]:
        marked = read_markup(clean_text(case["text"]))
        made = normalize(lowercase_if_all_caps(marked.text))
        assert normalize(made) == made, case
        assert " ".join(unread_signs(made)) == case.get("named", ""), case
        if "read" in case:
            assert made == case["read"], case
        elif "named" not in case and "refused" not in case:
            assert as_read(made) in map(as_read, case["spoken"]), case


LINKS = {
    "https://example.com": "h t t p s colon slash slash example dot com",
    "www.a-b.org/x_1?q=2&r#t": (
        "w w w dot a dash b dot org slash x underscore one question mark q equals two and r hash t"
    ),
    "Example.com:8080/2024": "Example dot com colon eight zero eight zero slash two zero two four",
    "127.0.0.1": "one two seven dot zero dot zero dot one",
}


@pytest.mark.parametrize("link", LINKS)
def test_links_in_sentences_are_read_as_alone(link: str) -> None:
    assert normalize(link) == LINKS[link]
    assert normalize(f"Visit {link} for 2 cats.") == f"Visit {LINKS[link]} for two cats."
    assert normalize(f'See ("{link}"), {link}.') == f'See ("{LINKS[link]}"), {LINKS[link]}.'


@pytest.mark.parametrize("text", ["He left.Next came a.b", "Hi.There of the .net", "Com.munity."])
def test_what_is_no_link_stays(text: str) -> None:
    assert normalize(text) == text


def test_a_long_link_has_no_long_word() -> None:
    made = normalize("https://example.com/" + "ab1" * 110 + "/" + "x" * 30)
    assert max(map(len, made.split())) <= 20


def test_long_runs_take_no_long_time() -> None:
    assert normalize("7" * 30) == " ".join(["seven"] * 30)
    assert normalize("5" + " " * 20_000 + "& x").startswith("five")
    assert normalize("1" * 20_000) == " ".join(["one"] * 20_000)
    assert normalize("1;" * 300) == "; ".join(["one"] * 300) + ";"


@pytest.mark.parametrize(
    "run",
    [*("a", "1", " ", ".", "-", "/", "_", "*", "&", "<a ", "[a](", "a.", "1,", "1/", "IX ", "\n ")],
)
def test_time_is_linear_in_runs(run: str) -> None:
    """Ten times the length takes less than 60 times as long; 100 times is quadratic."""

    def seconds(length: int) -> float:
        text = "5" + run * (length // len(run)) + "b"
        begin = time.thread_time()
        read_markup(clean_text(text))
        for pattern, spell in (*spelling._RULES, *spelling._REST):
            pattern.sub(spell, text)
        return time.thread_time() - begin

    assert seconds(5000) < 60 * max(seconds(500), 1e-3)


def test_words_joined_by_commas_are_words() -> None:
    assert normalize("red,green;a,b and 1,234") == (
        "red, green; a, b and one thousand two hundred and thirty four"
    )


def test_signs_without_words_are_named_and_blank_lines_stay() -> None:
    assert unread_signs(normalize("a \u2122 b\u00b2c \U0001f600 5*")) == [
        *("*", "\u00b2"), "\u2122", "\U0001f600",
    ]  # fmt: skip
    assert normalize("Part 5\n\n6 cats") == "Part five\n\nsix cats"
    assert unread_signs("a_b {x} c/d \u2022 \\") == ["/", "\\", "_", "{", "}", "\u2022"]


def test_signs_are_removed_with_the_lines_that_consist_of_them() -> None:
    text = "* Hi \U0001f44d! a~b\n* *\n~ c\n\nd ^"
    assert remove_signs(text, "*~^\U0001f44d") == "Hi! a b\n c\n\nd"
    # No rule reads the signs of other scripts.
    assert remove_signs("\u0438 50%", "%") == "\u0438 50%"


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
