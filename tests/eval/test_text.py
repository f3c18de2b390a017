import pytest

from eval.text import (
    ErrorCounts,
    WordErrors,
    cer,
    character_errors,
    wer,
    whisper_normalize,
    word_errors,
)


def test_normalizer_has_the_spelling_table_and_numbers() -> None:
    assert whisper_normalize("Mr. Smith's COLOURS, twenty-one!") == "mister smith is colors 21"


def test_counts_and_rates_of_one_pair() -> None:
    errors = word_errors("the cat sat on the mat", "so the cat sit on mat")
    assert (errors.hits, errors.substitutions, errors.deletions, errors.insertions) == (4, 1, 1, 1)
    assert errors.num_words == 6
    assert errors.wer == pytest.approx(3 / 6)
    assert errors.mer == pytest.approx(3 / 7)
    assert errors.wil == pytest.approx(1 - (4 / 6) * (4 / 6))


def test_corpus_rate_is_of_summed_counts_not_a_mean_of_rates() -> None:
    references = ["alpha", "bravo charlie delta echo foxtrot golf hotel"]
    hypotheses = ["", "bravo charlie delta echo foxtrot golf hotel"]
    assert wer(references, hypotheses) == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wer_value", "wil"),
    [
        ("", "", 0.0, 0.0),
        ("", "many words", 2.0, 1.0),
        ("", "one", 1.0, 1.0),
        ("many words", "", 1.0, 1.0),
        ("um", "", 0, 0),
    ],
)
def test_empty_texts(reference: str, hypothesis: str, wer_value: float, wil: float) -> None:
    errors = word_errors(reference, hypothesis)
    assert errors.wer == wer_value
    assert errors.wil == wil
    assert character_errors(reference, hypothesis).rate == (
        0 if wer_value == 0 else pytest.approx(len(hypothesis) if hypothesis else 1.0)
    )


# Language, two ways to write one text, a text with one wrong unit, and the number of units.
SENTENCES = {
    "en": (
        "Mr. Smith's 21 colours.",
        "mister smith is twenty one colors",
        "mr smith is 21 flowers",
        5,
    ),
    "de": (
        "M\u00fcller kaufte 1984 (lacht) zw\u00f6lf \u00c4pfel f\u00fcr 3,5 Euro.",
        "mu\u0308ller kaufte neunzehnhundertvierundachtzig 12 \u00c4PFEL, "
        "f\u00fcr drei Komma f\u00fcnf Euro",
        "Muller kaufte 1984 12 \u00c4pfel f\u00fcr 3,5 Euro",
        10,
    ),
    "fr": (
        "L\u2019\u00e9t\u00e9, 21 gar\u00e7ons ont mang\u00e9 1\u202f234 p\u00eaches !",
        "l'\u00e9t\u00e9 vingt-et-un gar\u00e7ons ont mang\u00e9 mille deux cent "
        "trente-quatre p\u00eaches",
        "L'\u00e9t\u00e9 21 gar\u00e7ons ont mang\u00e9 1234 p\u00e9ch\u00e9s",
        14,
    ),
    "es": (
        "\u00bfCu\u00e1ntos a\u00f1os tienes? Tengo 25 a\u00f1os.",
        "cu\u00e1ntos a\u00f1os tienes tengo veinticinco a\u00f1os",
        "Cu\u00e1ntos anos tienes, tengo 25 a\u00f1os",
        6,
    ),
    "zh": (
        "\u6211\u6709\uff11\uff12\u500b\u860b\u679c\u3002",
        "\u6211\u6709\u5341\u4e8c\u4e2a \u82f9\u679c",
        "\u6211\u67091\uff13\u4e2a\u82f9\u679c",
        7,
    ),
    "ja": (
        "\u79c1\u306f12\u500b\u306e\u30ea\u30f3\u30b4\u3092\u98df\u3079\u305f\u3002",
        "\u79c1\u306f \u5341\u4e8c\u500b\u306e\uff98\uff9d\uff7a\uff9e\u3092\u98df\u3079\u305f",
        "\u79c1\u306f12\u500b\u306e\u30ea\u30f3\u30b3\u3092\u98df\u3079\u305f",
        13,
    ),
    "hi": (
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e, "
        "\u0967\u0968 \u0926\u093f\u0928",
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e 12 "
        "\u0926\u093f\u0928",
        "\u0928\u092e\u0938\u094d\u0924\u0940 \u0926\u0941\u0928\u093f\u092f\u093e 12 "
        "\u0926\u093f\u0928",
        4,
    ),
    "th": (
        "\u0e1b\u0e25\u0e32 3",
        "\u0e1b\u0e25\u0e32\u0e2a\u0e32\u0e21",
        "\u0e1b\u0e25\u0e39 3",
        6,
    ),
    "ar": (
        "\u0645\u064e\u0631\u062d\u0628\u0627 \u0663",
        "\u0645\u0631\u062d\u0628\u0627\u060c \u062b\u0644\u0627\u062b\u0629",
        "\u0645\u0631\u062d\u0628 3",
        2,
    ),
    "tr": ("ISPARTA'da \u0130zmir", "\u0131sparta da izmir", "isparta da izmir", 3),
    "uk": ("\u043f\u02bc\u044f\u0442\u044c", "5", "\u043f'\u044f\u0442\u0438", 2),
    "ru": (
        "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
        "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
        "\u043f\u0440\u0438\u0432\u0435\u0442 \u043f\u0438\u0440",
        2,
    ),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("language", SENTENCES)
def test_one_text_written_in_two_ways_and_a_real_error(language: str) -> None:
    text, same, wrong, count = SENTENCES[language]
    assert word_errors(text, same, language).num_words == count
    assert wer([text, same], [same, text], language) == 0
    assert cer([text, same], [same, text], language) == 0
    errors = 2 if language == "th" else 1
    assert wer([text], [wrong], language) == pytest.approx(errors / count)
    assert wer([wrong], [text], language) > 0


def test_chinese_is_scored_by_characters() -> None:
    text, wrong = (
        "\u4eca\u5929\u5929\u6c14\u5f88\u597d",
        "\u4eca \u5929\u5929\u6c23\u5f88\u574f\u3002",
    )
    assert wer([text], [wrong], "zh_CN") == cer([text], [wrong], "zh-TW") == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("text", "words", "language"),
    [
        ("1.234.567", "eine million zweihundertvierunddrei\u00dfigtausend"
         "f\u00fcnfhundertsiebenundsechzig", "de"),
        ("0171", "null eins sieben eins", "de_CH"),
        ("90", "nonante", "fr-CH"),
        ("90", "quatre vingt dix", "fr"),
        ("1,23,456.5", "123456 5", "hi"),
        ("1.000,5", "1000 5", "hr"),
        ("3,5 kg", "tiga lima kg", "id"),
        ("\u2764\ufe0f gut", "gut", "de"),
        ("na\u00efve", "naive", "en-US"),
    ],
)  # fmt: skip
def test_numbers_and_regions(text: str, words: str, language: str) -> None:
    assert whisper_normalize(text, language) == words


def test_unknown_languages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'german' is not known; the codes are .*de, el, en"):
        wer(["a"], ["a"], "german")


def test_counts_add_up() -> None:
    total = WordErrors(hits=1, deletions=2) + WordErrors(hits=3, insertions=1)
    assert isinstance(total, WordErrors)
    assert (total.num_reference, total.num_hypothesis, total.num_errors) == (6, 5, 3)
    each = WordErrors(hits=1, substitutions=2, deletions=3, insertions=4)
    assert each + each == WordErrors(hits=2, substitutions=4, deletions=6, insertions=8)
    assert (each.num_reference, each.num_hypothesis, each.num_errors) == (6, 7, 9)
    assert ErrorCounts().rate == 0


def test_lists_must_match() -> None:
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        wer(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no text"):
        cer([], [])
