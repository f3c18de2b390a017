"""Word and character errors of normalized texts (jiwer; Whisper's text normalizer for English,
Unicode's categories and numbers in words for other languages).

Rates of several texts are rates of summed counts, not means of rates. An empty reference counts as
one word (one character), so that the rate of an insertion is finite.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

LIBRARIES = ("jiwer", "whisper-normalizer")
"""Of English."""
ALL_LIBRARIES = (*LIBRARIES, "regex", "num2words", "wetext")

Counts = TypeVar("Counts", bound="ErrorCounts")


def _codes(names: str) -> frozenset[str]:
    return frozenset(names.split())


WHISPER_LANGUAGES = _codes(
    "af am ar as az ba be bg bn bo br bs ca cs cy da de el en es et eu fa fi fo fr gl gu ha "
    "haw he hi hr ht hu hy id is it ja jw ka kk km kn ko la lb ln lo lt lv mg mi mk ml mn mr ms mt "
    "my ne nl nn no oc pa pl ps pt ro ru sa sd si sk sl sn so sq sr su sv sw ta te tg th tk tl tr "
    "tt uk ur uz vi yi yo yue zh"
)
LANGUAGES = WHISPER_LANGUAGES | _codes("eo ga")
"""Codes that are known: Whisper's, Esperanto and Irish."""
_ALIASES = {"nb": "no", "jv": "jw", "iw": "he", "in": "id", "cmn": "zh", "fil": "tl"}

_UNSPACED = _codes("zh yue ja th lo my km")
"""Languages without spaces: every character is a word, as in Whisper's evaluation."""
_WETEXT = _codes("zh yue ja")
_NUMBER_WORDS = _codes(
    "ar az be bn ca cs cy da de eo es fa fi fr he hu id is it kk kn ko lt lv nl no pl pt ro ru sk "
    "sl sr sv te tg th uk vi"
)
"""Languages whose numbers num2words writes. Not Turkish and Amharic: it joins the words of the one,
and does not return for large numbers of the other."""
_NO_DECIMALS = _codes("ar cy fa id vi")
"""Those of which num2words writes no decimal fractions."""
_LONGEST_NUMBER = 9
"""Digits; longer ones, such as those of telephones, are read digit by digit."""
_DECIMAL_POINT = _codes(
    "th lo my km ko he hi bn as ta te kn ml mr gu pa ne si ur sd ms tl sw yo ha so cy ga mt mi haw "
    "sa sn"
)
"""Languages that write 3.5 and 1,000; the others write 3,5 and 1.000."""
_DOTLESS_I = _codes("tr az")
_OPTIONAL_MARKS = re.compile(
    "[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0640\u064b-\u0652\u0670]"
)
"""Hebrew points, Arabic vowel signs and the Arabic lengthening sign, which most texts leave out."""


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


def language_code(name: str) -> str:
    """Returns the code of a language without its region: `de` for `de-DE` and `de_AT`.

    Raises:
        ValueError: a code that is not known.
    """
    base = re.split("[-_]", name.strip().lower())[0]
    base = _ALIASES.get(base, base)
    if base not in LANGUAGES:
        raise ValueError(
            f"the language {name!r} is not known; the codes are {', '.join(sorted(LANGUAGES))}, "
            "also with a region (de-AT)"
        )
    return base


def text_libraries(language: str = "en") -> tuple[str, ...]:
    """Returns the distributions behind the word errors of a language."""
    code = language_code(language)
    if code == "en":
        return LIBRARIES
    numbers = ("wetext",) * (code in _WETEXT) + ("num2words",) * (code in _NUMBER_WORDS)
    return ("jiwer", "regex", *numbers)


@cache
def _english() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def whisper_normalize(text: str, language: str = "en") -> str:
    """Returns a text's words for the comparison, with single spaces.

    English: the output of Whisper's English normalizer (arXiv 2212.04356, appendix C). Other
    languages: lower case of NFKC; letters with their marks, and digits; a space for everything
    else and for text in brackets; numbers in words where they are known. Languages without spaces:
    a space after each character (grapheme cluster).

    Args:
        language: a code of LANGUAGES, with or without a region.

    Raises:
        ValueError: an unknown language.
    """
    import regex

    code = language_code(language)
    if code == "en":
        return " ".join(_english()(text).split())
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"[<\[][^>\]]*[>\]]|\([^)]*\)", " ", text)
    if code in _DOTLESS_I:
        text = text.replace("I", "\u0131").replace("\u0130", "i")
    text = regex.sub(r"\p{Cf}", "", _OPTIONAL_MARKS.sub("", text.lower()))
    text = text.replace("\u02bc", "'")  # The letter apostrophe is written as either.
    spell = _chinese_numbers if code in _WETEXT else _spell_numbers
    text = spell(text, language)
    # num2words writes capitals and hyphens.
    text = unicodedata.normalize("NFKC", text.lower())
    text = regex.sub(r"[^\p{L}\p{M}\p{N}]+", " ", text)
    text = regex.sub(r"(?<![\p{L}\p{M}\p{N}])\p{M}+", "", text)  # Such as emoji's selectors.
    if code in _UNSPACED:
        return " ".join(regex.findall(r"\X", "".join(text.split())))
    return " ".join(text.split())


def _spell_numbers(text: str, language: str) -> str:
    """Returns the text with numbers in words, or in ASCII digits without marks of thousands."""
    code = language_code(language)
    point, group = (".", ",'") if code in _DECIMAL_POINT else (",", ".' ")
    thousands = rf"\d{{1,3}}(?:[{group}\u066c]\d{{2,3}})*[{group}\u066c]\d{{3}}(?!\d)"
    number = re.compile(rf"({thousands}|\d+)(?:[{point}\u066b](\d+))?")
    if code not in _NUMBER_WORDS:
        return number.sub(lambda m: f" {_digits(m[1])} {_digits(m[2] or '')} ", text)
    from num2words import CONVERTER_CLASSES, num2words

    region = re.split("[-_]", language)[1:]
    name = "kz" if code == "kk" else code
    if region and f"{code}_{region[-1].upper()}" in CONVERTER_CLASSES:
        name = f"{code}_{region[-1].upper()}"

    def in_words(match: re.Match[str]) -> str:
        integer, fraction = _digits(match[1]), _digits(match[2] or "")
        if len(integer) > _LONGEST_NUMBER or (integer[0] == "0" and len(integer) > 1):
            words = " ".join(num2words(int(digit), lang=name) for digit in integer)
        elif fraction and code not in _NO_DECIMALS:
            return f" {num2words(float(f'{integer}.{fraction}'), lang=name)} "
        elif code == "de" and 1100 <= int(integer) < 2000 and integer == match[1]:
            words = num2words(int(integer), lang=name, to="year")
        else:
            words = num2words(int(integer), lang=name)
        digits = " ".join(num2words(int(digit), lang=name) for digit in fraction)
        return f" {words} {digits} "

    return number.sub(in_words, text)


def _digits(number: str) -> str:
    """Returns the ASCII digits of a number."""
    return "".join(str(unicodedata.decimal(sign)) for sign in number if sign.isdecimal())


def _chinese_numbers(text: str, language: str) -> str:
    """Returns Japanese or Chinese text with numbers in characters; Chinese ones simplified."""
    japanese = language_code(language) == "ja"
    normalizer = _wetext_normalizer("ja" if japanese else "zh")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    # wetext's time grows faster than the length; it reads a backslash as an escape.
    pieces = re.findall(r"[^\s\\\"\u3002!?;]{1,200}", text)
    return " ".join(
        piece if japanese and not re.search(r"\d", piece) else normalizer(piece) for piece in pieces
    )


@cache
def _wetext_normalizer(language: str) -> Callable[[str], str]:
    from wetext import Normalizer

    normalizer = Normalizer(lang=language, operator="tn", traditional_to_simple=language == "zh")  # pyright: ignore[reportArgumentType]

    def normalize(text: str) -> str:
        try:
            return str(normalizer.normalize(text)) or text
        except (AssertionError, IndexError, KeyError, RuntimeError, ValueError):
            return text  # It raises these for symbols that its grammar lacks.

    return normalize


def word_errors(reference: str, hypothesis: str, language: str = "en") -> WordErrors:
    """Returns the counts of a word alignment after normalization; in languages without spaces the
    words are characters."""
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
    """Returns the counts of a character alignment after normalization, spaces included; in
    languages without spaces those of `word_errors`."""
    import jiwer

    align = jiwer.process_characters
    if language_code(language) in _UNSPACED:
        align = jiwer.process_words
    aligned = align(whisper_normalize(reference, language), whisper_normalize(hypothesis, language))
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
