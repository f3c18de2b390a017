"""Normalised text, and word and character errors through jiwer.

Rates of several texts are rates of their summed counts, never means of rates. An empty reference
counts as one word (one character), so that an insertion against it has a finite rate.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

LIBRARIES = ("jiwer", "whisper-normalizer")

Counts = TypeVar("Counts", bound="ErrorCounts")

# Written without spaces: every character is a word, as in Whisper's own evaluation.
_UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "my"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorCounts:
    """An alignment's counts; those of several texts add up."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self: Counts, other: Counts) -> Counts:
        return type(self)(
            hits=self.hits + other.hits,
            substitutions=self.substitutions + other.substitutions,
            deletions=self.deletions + other.deletions,
            insertions=self.insertions + other.insertions,
        )

    @property
    def num_reference(self) -> int:
        return self.hits + self.substitutions + self.deletions

    @property
    def num_hypothesis(self) -> int:
        return self.hits + self.substitutions + self.insertions

    @property
    def num_errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per unit of the reference: WER for words, CER for characters."""
        return self.num_errors / max(1, self.num_reference)


class WordErrors(ErrorCounts):
    """Counts of words."""

    __slots__ = ()

    @property
    def num_words(self) -> int:
        return self.num_reference

    @property
    def wer(self) -> float:
        """Word error rate."""
        return self.rate

    @property
    def mer(self) -> float:
        """Match error rate: the share of aligned places that are wrong."""
        return self.num_errors / max(1, self.hits + self.num_errors)

    @property
    def wil(self) -> float:
        """Word information lost (Morris et al. 2004)."""
        if not self.num_reference or not self.num_hypothesis:
            return float(self.num_errors > 0)
        return 1 - (self.hits / self.num_reference) * (self.hits / self.num_hypothesis)


@cache
def _normalizer(language: str) -> Callable[[str], str]:
    if language == "en":
        from whisper_normalizer.english import EnglishTextNormalizer

        return EnglishTextNormalizer()
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer(split_letters=language in _UNSPACED)


def normalize(text: str, language: str = "en") -> str:
    """Whisper's normal form: English spelling and numbers, or the basic form of other languages."""
    return " ".join(_normalizer(language)(text).split())


def word_errors(reference: str, hypothesis: str, language: str = "en") -> WordErrors:
    """Aligns the words of two texts after normalising both."""
    import jiwer

    aligned = jiwer.process_words(normalize(reference, language), normalize(hypothesis, language))
    return WordErrors(
        hits=aligned.hits,
        substitutions=aligned.substitutions,
        deletions=aligned.deletions,
        insertions=aligned.insertions,
    )


def character_errors(reference: str, hypothesis: str, language: str = "en") -> ErrorCounts:
    """Aligns the characters (spaces included) of two texts after normalising both."""
    import jiwer

    aligned = jiwer.process_characters(
        normalize(reference, language), normalize(hypothesis, language)
    )
    return ErrorCounts(
        hits=aligned.hits,
        substitutions=aligned.substitutions,
        deletions=aligned.deletions,
        insertions=aligned.insertions,
    )


def _pairs(references: Iterable[str], hypotheses: Iterable[str]) -> list[tuple[str, str]]:
    left, right = list(references), list(hypotheses)
    if len(left) != len(right):
        raise ValueError(f"{len(left)} references but {len(right)} hypotheses")
    if not left:
        raise ValueError("there is no text to compare")
    return list(zip(left, right, strict=True))


def wer(references: Iterable[str], hypotheses: Iterable[str], language: str = "en") -> float:
    """Word error rate of a list of texts."""
    pairs = _pairs(references, hypotheses)
    return sum((word_errors(r, h, language) for r, h in pairs), WordErrors()).wer


def cer(references: Iterable[str], hypotheses: Iterable[str], language: str = "en") -> float:
    """Character error rate of a list of texts."""
    pairs = _pairs(references, hypotheses)
    return sum((character_errors(r, h, language) for r, h in pairs), ErrorCounts()).rate
