import math

import pytest
import torch

from eval.tokens import LABELS, ctc_loss, frames_needed, labels_of, spell, text_of


def test_texts_are_spelled_in_labels() -> None:
    assert spell("DON'T stop, Zo\u00eb -- now!") == "don't stop zoe now"
    assert spell("it\N{RIGHT SINGLE QUOTATION MARK}s") == "it's"
    assert spell("Les \u00c9l\u00e8ves na\u00effs") == "les eleves naifs"
    assert spell("room 12") is None
    assert spell("...") is None
    assert set(spell("".join(map(chr, range(32, 48)))) or "") <= set(LABELS)


def test_labels_and_texts_are_inverse() -> None:
    labels = labels_of("It's a see-saw")
    assert labels is not None
    assert min(labels) > 0
    apart = [label for one in labels for label in (one, one, 0)]
    assert text_of(apart) == "it's a see saw"
    assert text_of([0, 0]) == ""
    assert labels_of("7") is None


def test_double_letters_need_a_frame_between() -> None:
    assert frames_needed(labels_of("aab") or []) == 4
    assert frames_needed(labels_of("aba") or []) == 3
    uniform = torch.zeros(1, 4, 1 + len(LABELS)).log_softmax(2)
    # One path of four frames: a, blank, a, b.
    loss = float(ctc_loss(uniform, [[3, 3, 4]], [4]))
    assert loss == pytest.approx(4 * math.log(1 + len(LABELS)))
    assert float(ctc_loss(uniform, [[3, 3, 4]], [3])) == math.inf
