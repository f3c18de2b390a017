"""Characters as CTC labels: a to z, the apostrophe and the space."""

import string
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

LABELS = " '" + string.ascii_lowercase
"""Characters by label; label 0 is CTC's blank and stands before them."""


def spell(text: str) -> str | None:
    """A text in LABELS: lower case, no accents, all else a space.

    None where nothing is left, and where there are digits, which do not say what was spoken.
    """
    straight = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    plain = unicodedata.normalize("NFKD", straight).lower()
    if any(character.isdigit() for character in plain):
        return None
    plain = "".join(one for one in plain if not unicodedata.combining(one))
    kept = "".join(one if one in LABELS else " " for one in plain)
    return " ".join(kept.split()) or None


def frames_needed(target: Sequence[int]) -> int:
    """CTC's minimum: a frame for each label, and one for the blank within each double letter."""
    return len(target) + sum(left == right for left, right in pairwise(target))


def labels_of(text: str) -> list[int] | None:
    """Labels of a text's spelling; None where it has none."""
    spelled = spell(text)
    return None if spelled is None else [1 + LABELS.index(character) for character in spelled]


def ctc_loss(
    log_probabilities: Float[Tensor, "B T V"], targets: Sequence[list[int]], lengths: list[int]
) -> Float[Tensor, ""]:
    """Summed negative log-likelihood in nats."""
    return functional.ctc_loss(
        log_probabilities.transpose(0, 1),
        torch.tensor([label for target in targets for label in target]),
        torch.tensor(lengths),
        torch.tensor([len(target) for target in targets]),
        reduction="sum",
    )


def text_of(labels: Sequence[int]) -> str:
    """The text behind a label for each frame: repeats joined, blanks dropped."""
    kept = [label for label, before in zip(labels, [0, *labels], strict=False) if label != before]
    return " ".join("".join(LABELS[label - 1] for label in kept if label).split())
