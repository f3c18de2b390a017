"""Word and character errors of normalized texts (jiwer, Whisper's text normalizer).

Rates of several texts are rates of summed counts, not means of rates. An empty reference counts as
one word (one character), so that the rate of an insertion is finite.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

LIBRARIES = ("jiwer", "whisper-normalizer")

Counts = TypeVar("Counts", bound="ErrorCounts")

# Languages without spaces: every character is a word, as in Whisper's evaluation.
_UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "my"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorCounts:
    """Counts of an alignment of reference and hypothesis; those of several texts can be added."""

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
        """Number of words (characters) of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def num_hypothesis(self) -> int:
        """Number of words (characters) of the hypothesis."""
        return self.hits + self.substitutions + self.insertions

    @property
    def num_errors(self) -> int:
        """Number of substitutions, deletions and insertions."""
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
        """Number of words of the reference."""
        return self.num_reference

    @property
    def wer(self) -> float:
        """Word error rate."""
        return self.rate

    @property
    def mer(self) -> float:
        """Match error rate: errors over all aligned positions (Morris et al. 2004)."""
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


def whisper_normalize(text: str, language: str = "en") -> str:
    """Returns the output of Whisper's text normalizer (arXiv 2212.04356, appendix C), the English
    one or, for other languages, the basic one."""
    return " ".join(_normalizer(language)(text).split())


def word_errors(reference: str, hypothesis: str, language: str = "en") -> WordErrors:
    """Returns the counts of a word alignment after normalization."""
    import jiwer

    aligned = jiwer.process_words(
        whisper_normalize(reference, language), whisper_normalize(hypothesis, language)
    )
    return WordErrors(
        hits=aligned.hits,
        substitutions=aligned.substitutions,
        deletions=aligned.deletions,
        insertions=aligned.insertions,
    )


def character_errors(reference: str, hypothesis: str, language: str = "en") -> ErrorCounts:
    """Returns the counts of a character alignment, spaces included, after normalization."""
    import jiwer

    aligned = jiwer.process_characters(
        whisper_normalize(reference, language), whisper_normalize(hypothesis, language)
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
    """Returns the word error rate of a list of texts.

    Raises:
        ValueError: the lists differ in length, or are empty.
    """
    pairs = _pairs(references, hypotheses)
    return sum((word_errors(r, h, language) for r, h in pairs), WordErrors()).wer


def cer(references: Iterable[str], hypotheses: Iterable[str], language: str = "en") -> float:
    """Returns the character error rate of a list of texts; see `wer`."""
    pairs = _pairs(references, hypotheses)
    return sum((character_errors(r, h, language) for r, h in pairs), ErrorCounts()).rate
