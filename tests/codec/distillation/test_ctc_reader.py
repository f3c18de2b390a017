"""The CTC recognizer over codes: labels, decoding, word boundaries, and its folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_semantic import one_hot_recognizer

from codec.distillation.ctc_reader import (
    SPACE,
    STEPS,
    CodeRecognizer,
    RecognizerNetwork,
    letters_in,
    transcript_labels,
)


def test_letters_are_those_of_the_normalized_transcripts() -> None:
    assert letters_in(["Dad\N{RIGHT SINGLE QUOTATION MARK}s well-known 2 plans!"]) == "'adeklnopsw"
    assert transcript_labels("Ab, a-b.", "ab") == [2, 3, 1, 2, 1, 3]
    assert transcript_labels("I'm", "'im") == [3, 2, 4]
    assert transcript_labels(
        "Caf\N{LATIN SMALL LETTER E WITH ACUTE}", letters_in(["CAFE\N{COMBINING ACUTE ACCENT}"])
    ) == [3, 2, 4, 5]


@pytest.mark.parametrize("text", ["", "?!", "room 2", "xa"])
def test_texts_without_labels(text: str) -> None:
    assert transcript_labels(text, letters_in(["a room 2"])) is None


def codes(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint16)


def test_codes_are_decoded_to_letters_and_words() -> None:
    reader = one_hot_recognizer("abc")
    assert reader.transcribe(codes(0, 2, 0, 3, 3, 1, 1, 0, 4, 0)) == "abb c"
    assert reader.transcribe(codes(0, 0)) == ""


def test_word_boundaries_lie_in_the_middle_of_pauses() -> None:
    reader = one_hot_recognizer("abc")
    spoken = codes(0, 2, 3, 0, 0, 0, 0, 4, 0, 1, 2, 0)
    assert reader.word_boundaries(spoken, "ab c a") == [0, 5, 9, 12]
    assert reader.word_boundaries(spoken, "AB, C! a.") == [0, 5, 9, 12]
    assert reader.word_boundaries(spoken, "ab - c a") == [0, 2, 7, 9, 12]


def test_boundaries_of_a_wrong_text_still_start_at_0_and_end_at_the_end() -> None:
    edges = one_hot_recognizer("abc").word_boundaries(codes(2, 3, 4, 2, 3), "c c")
    assert (edges[0], edges[-1], len(edges)) == (0, 5, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 2", "'2' has characters that are not"),
        ("x", "'x' has characters that are not"),
        ("?!", "has no letters"),
        ("abcabcabc", "9 letters need at least 9 CTC steps, but the recording has 6"),
        ("aaaa", "4 letters need at least 7 CTC steps, but the recording has 6"),
    ],
)
def test_texts_that_cannot_be_aligned(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_hot_recognizer("abc").word_boundaries(codes(2, 3, 4), text)


def test_shares_are_means_over_the_frames_of_a_code() -> None:
    shares = one_hot_recognizer("ab").letter_shares([codes(2, 2, 1), codes(3)])
    assert shares.shape == (4, 3)
    np.testing.assert_allclose(shares.argmax(1)[1:], [0, 1, 2])
    assert shares[2, 1] > 0.97
    assert not shares[0].any()  # This code does not occur.


def test_no_codes_give_no_text() -> None:
    reader = CodeRecognizer(RecognizerNetwork(6, 8, "ab"), torch.randn(5, 6))
    assert reader.transcribe(codes()) == ""
    assert not reader.letter_shares([codes()]).any()


def test_han_numbers_are_letters() -> None:
    three = "\N{CJK UNIFIED IDEOGRAPH-4E09}"
    assert letters_in([three + "3"]) == three
    assert transcript_labels(three, three) == [2]


def test_log_probs_depend_on_neighboring_frames() -> None:
    torch.manual_seed(0)
    reader = CodeRecognizer(RecognizerNetwork(6, 8, "ab"), torch.randn(5, 6))
    found = reader.log_probs(codes(0, 1, 2, 3, 4))
    assert found.shape == (5 * STEPS, 4)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(10))
    assert not torch.allclose(found[:2], reader.log_probs(codes(0, 4, 2, 3, 4))[:2])
    with pytest.raises(ValueError, match="code 5 of a codebook of 5 entries"):
        reader.log_probs(codes(5))


def test_a_recognizer_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reader = CodeRecognizer(RecognizerNetwork(6, 8, "ab'"), torch.randn(5, 6))
    reader.save(tmp_path / "reader")
    again = CodeRecognizer.load(tmp_path / "reader")
    assert torch.equal(again.log_probs(codes(0, 3, 2)), reader.log_probs(codes(0, 3, 2)))
    assert again.letters == "ab'"
    # Refused by the sizes, before memory is allocated.
    for width, message in ((2**20, r"asks for \(1048576, 6, 1\)"), (2**40, "impossible sizes")):
        about = json.dumps({"width": width, "letters": "ab'"})
        (tmp_path / "reader" / "reader.json").write_text(about)
        with pytest.raises(ValueError, match=f"no complete recognizer .*{message}"):
            CodeRecognizer.load(tmp_path / "reader")
    (tmp_path / "reader" / "reader.json").write_text("{")
    for folder in ("reader", "none"):
        with pytest.raises(ValueError, match="no complete recognizer of codes"):
            CodeRecognizer.load(tmp_path / folder)


def test_a_space_is_a_label_of_its_own() -> None:
    assert transcript_labels("a b", "ab") == [2, SPACE, 3]
