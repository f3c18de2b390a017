"""Rules for transcripts that the codec's teachers and the language model share."""

import unicodedata
from collections.abc import Sequence


def has_words(text: str) -> bool:
    """Whether a text has a letter or a digit."""
    return any(unicodedata.category(letter)[0] in "LN" for letter in text)


def check_unicode(text: str, what: str = "the text") -> None:
    """Raises `ValueError` for a text with half of a surrogate pair, which JSON and command lines
    may contain.

    Args:
        what: name of the text, for the message.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise ValueError(
            f"{what} {text!r} has {half}, half of a surrogate pair, which is no character"
        ) from None


def lowercase_if_all_caps(text: str, min_words: int = 2) -> str:
    """Lower case for a text all in capitals, as some corpora's transcripts are; else unchanged.

    Args:
        min_words: texts of fewer words with letters stay as they are; a single one may be a name,
            or a unit behind a number.
    """
    num_words = sum(any(map(str.isalpha, word)) for word in text.split())
    return text.lower() if text.isupper() and num_words >= min_words else text


def lowercase_words(words: Sequence[str]) -> list[str]:
    """`lowercase_if_all_caps` for the words of a text or of a crop, also for a single word.

    CTC transcribers print capitals, which are rare in the training data of cased language models.
    """
    text = " ".join(words)
    if lowercase_if_all_caps(text, min_words=1) == text:
        return list(words)
    return [word.lower() for word in words]
