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


def test_other_scripts() -> None:
    greeting = "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!"
    assert wer([greeting], ["\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440"], "ru") == 0
    chinese = "\u4f60\u597d\u4e16\u754c"
    assert word_errors(chinese, "\u4f60\u597d\u4e16", "zh").wer == pytest.approx(1 / 4)
    assert cer(["na\u00efve"], ["naive"]) == 0


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
