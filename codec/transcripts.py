"""Rules for transcripts that the codec's teachers and the language model share."""

import unicodedata
from collections.abc import Sequence


def has_words(text: str) -> bool:
    """Whether a text has a letter or a digit."""
    return any(unicodedata.category(letter)[0] in "LN" for letter in text)


def lowercase_if_all_caps(text: str, min_words: int = 2) -> str:
    """Lower case for a text all in capitals, as some corpora's transcripts are; else unchanged.

    Args:
        min_words: texts of fewer words stay as they are; a single one may be a name.
    """
    num_words = sum(map(has_words, text.split()))
    return text.lower() if text.isupper() and num_words >= min_words else text


def lowercase_words(words: Sequence[str]) -> list[str]:
    """The same for the words of a text, or of a crop of one: a single word is lower-cased too.

    CTC transcribers have an alphabet of capitals, and cased language models few words in capitals.
    """
    text = " ".join(words)
    if lowercase_if_all_caps(text, min_words=1) == text:
        return list(words)
    return [word.lower() for word in words]
