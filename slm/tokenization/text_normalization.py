"""Text normalization for TTS (English): numbers and abbreviations to words; and phonemes.

Numbers, dates, times, money and units are read by wetext's offline rules (WeTextProcessing). It
gets only the words that need it, after rules for what it misreads; all other words are unchanged.
Texts with letters of other scripts are returned unchanged.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from codec.transcripts import has_words


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizedText:
    """A text with its normalized form and ids. `SpeechTextTokenizer.normalize` makes it, once."""

    original: str
    """As it was given; of a piece of a longer text, as `text`."""
    text: str
    """Numbers and abbreviations in words, lower case if the original is all in capitals."""
    tts_form: str
    """Text input of TTS and of the NAR: `text`, or its phonemes."""
    ids: tuple[int, ...]
    """Vocabulary ids of `tts_form`."""
    num_tokens: int
    """Tokens of `text` in the LLM's own tokenizer: the unit of length bounds."""

    @property
    def words(self) -> list[str]:
        """Words of `tts_form`; what has no letter or digit is no word."""
        return [word for word in self.tts_form.split() if has_words(word)]


NO_TEXT = NormalizedText(original="", text="", tts_form="", ids=(), num_tokens=0)


def script_of(letter: str) -> str:
    """The script of a letter: LATIN, CYRILLIC, CJK, ... (first word of its Unicode name).

    Compatibility forms, such as superscript and full-width letters, have their base letter's.
    """
    plain = unicodedata.normalize("NFKC", letter)
    letter = plain if len(plain) == 1 else letter
    return unicodedata.name(letter, "UNKNOWN").split()[0]


def join_texts(prompt_text: str, text: str) -> str:
    """The transcript of a prompt followed by a text."""
    return " ".join(part for part in (prompt_text.strip(), text.strip()) if part)


_TITLES = {
    **{"Mr": "Mister", "Mrs": "Missus", "Dr": "Doctor", "Prof": "Professor", "Capt": "Captain"},
    **{"Lt": "Lieutenant", "Sgt": "Sergeant", "Gen": "General", "Col": "Colonel"},
    **{"Gov": "Governor", "Sen": "Senator", "Rev": "Reverend", "Hon": "Honorable"},
    **{"St": "Saint", "Mt": "Mount", "Ft": "Fort"},
}
"""Before a name."""
_ABBREVIATIONS = {
    **{"Jr": "Junior", "Sr": "Senior", "St": "Street", "Ave": "Avenue", "Blvd": "Boulevard"},
    **{"vs": "versus", "etc": "et cetera", "e.g": "for example", "i.e": "that is"},
    **{"approx": "approximately", "dept": "department"},
}
_COUNTED = {
    **{"no": "number", "nos": "numbers", "vol": "volume", "p": "page", "pp": "pages"},
    **{"ch": "chapter", "fig": "figure", "sec": "section"},
}
"""Before a number."""
_MONEY = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "\u00a3": ("pound", "pounds", "penny", "pence"),
    "\u20ac": ("euro", "euros", "cent", "cents"),
}
_LARGE = {"k": "thousand", "m": "million", "b": "billion"}
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_UNITS = "lbs?|oz|ft|yds?|mi|mph|km|kg|mg|cm|mm|ml|hrs?|mins?|secs?|kph|rpm|[kMG]?Hz|[kMGT]B|kW"
_DIGIT_WORDS = "oh one two three four five six seven eight nine"
_NUMERALS = f"""{_DIGIT_WORDS} ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred"""
_BEFORE_THOUSAND = {*_NUMERALS.split(), "a", "the", "few", "several", "of", "per"}


def _names(words: dict[str, str]) -> str:
    return "|".join(re.escape(word) for word in words)


def _any_case(words: dict[str, str], found: str) -> str:
    """The full word, in the case of its abbreviation."""
    full = next(full for short, full in words.items() if short.lower() == found.lower())
    if found.isupper() and len(found) > 1:
        return full.upper()
    return full.lower() if found.islower() else full.capitalize()


def _money(match: re.Match[str]) -> str:
    one, many, cent, cents = _MONEY[match[1]]
    parts = [] if match[2] == "0" else [f"{match[2]} {one if match[2] == '1' else many}"]
    if int(match[3]):
        parts.append(f"{int(match[3])} {cent if int(match[3]) == 1 else cents}")
    return " and ".join(parts) or f"0 {many}"


def _large_money(match: re.Match[str]) -> str:
    return f"{match[2]} {_LARGE[match[3].lower()]} {_MONEY[match[1]][1]}"


def _version(match: re.Match[str]) -> str:
    return f"{'Version' if match[1] == 'V' else 'version'} {match[2].replace('.', ' point ')}"


def _telephone(match: re.Match[str]) -> str:
    names = _DIGIT_WORDS.split()
    groups = re.findall(r"\d+", match[0])
    return ", ".join(" ".join(names[int(digit)] for digit in group) for group in groups)


_ALONE = r"(?<![\w.,:/$\u00a3\u20ac-])"
"""Before a separate number."""
_ENDS = r"(?![\w%]|[.,:/-]\d)"
_CLOSED = r"(?=[\"')\]]*$)"
"""At the end of the text, where an abbreviation's full stop also ends the sentence."""
_RULES = [
    (re.compile("[\u2018\u2019]"), lambda m: "'"),
    (re.compile("[\u201c\u201d]"), lambda m: '"'),
    (re.compile(r"\s*&\s*(?=\w)"), lambda m: " and "),
    (re.compile(r"#(?=\d)"), lambda m: "number "),
    (
        re.compile(rf"\b({_names(_COUNTED)})\.\s*(?=\d)", re.I),
        lambda m: _any_case(_COUNTED, m[1]) + " ",
    ),
    (re.compile(r"\b(Mrs?|Dr)\b\.?(?=\s+[a-z])", re.I), lambda m: _any_case(_TITLES, m[1])),
    (
        re.compile(rf"(?<![\w.])({_names(_TITLES)})\.(?=\s+[A-Z][A-Za-z'])"),
        lambda m: _TITLES[m[1]],
    ),
    (
        re.compile(rf"(?<![\w.])({_names(_ABBREVIATIONS)})\.{_CLOSED}"),
        lambda m: _ABBREVIATIONS[m[1]] + ".",
    ),
    (re.compile(r"\betc\.(?=\s+[A-Z])"), lambda m: "et cetera."),
    (
        re.compile(rf"(?<![\w.])({_names(_ABBREVIATIONS)})\.(?!\w)"),
        lambda m: _ABBREVIATIONS[m[1]],
    ),
    (
        re.compile(r"([$\u00a3\u20ac])(\d+(?:,\d{3})*(?:\.\d+)?)([kmb])n?\b", re.I),
        _large_money,
    ),
    (re.compile(r"(?<![\w.])([vV])(\d+(?:\.\d+)+)\b"), _version),
    (re.compile(rf"(\d)\s*({_UNITS})\.(?=[,;:]|\s+[a-z\d])"), lambda m: f"{m[1]} {m[2]}"),
    (re.compile(r"(\d)\s+in\.(?!\w)"), lambda m: f"{m[1]} inches"),
    (
        re.compile(r"(\d)\s?m(?![\w'/])(?!\.\w)(?:\.(?=[,;:]|\s+[a-z\d]))?"),
        lambda m: f"{m[1]} meters",
    ),
    (
        re.compile(r"(\d)\s*([AaPp])\.?[Mm]\b(?:\.(?!\s*$|\s+[A-Z]))?"),
        lambda m: f"{m[1]} {m[2].upper()}M",
    ),
    (re.compile(rf"{_ALONE}(?:\(\d{{3}}\) ?|\d{{3}}-)?\d{{3}}-\d{{4}}{_ENDS}"), _telephone),
    (
        re.compile(r"([$\u00a3\u20ac])(\d+(?:,\d{3})*)\.(\d\d)(?!\d|\s+[mbt]r?illion)"),
        _money,
    ),
    (re.compile(r"\b24/7\b"), lambda m: "twenty four seven"),
    (re.compile(r"\b(1[1-9])00'?s\b"), lambda m: f"{m[1]} hundreds"),
    (re.compile(r"\b2000'?s\b"), lambda m: "two thousands"),
    (re.compile(r"\b(1[1-9]|20)10'?s\b"), lambda m: f"{m[1]} tens"),
    (re.compile(r"\b(1[1-9]|20)([2-9]0)'?s\b"), lambda m: f"{m[1]} {m[2]}s"),
    (re.compile(r"(?<!\w)'?([2-9]0)'s\b"), lambda m: f"{m[1]}s"),
    (re.compile(rf"{_ALONE}(1[1-9])0([1-9]){_ENDS}"), lambda m: f"{m[1]} oh {m[2]}"),
    (re.compile(rf"{_ALONE}100([1-9]){_ENDS}"), lambda m: f"one thousand and {m[1]}"),
    (re.compile(r"(\d(?:st|nd|rd|th|s)|,\d{3})-(?=[A-Za-z])"), lambda m: f"{m[1]} "),
    (re.compile(r"(\d)\s?\u00a2"), lambda m: f"{m[1]} cents"),
]
_AFTER = ".,;:!?)]\"'"
MOST_PASSES = 4
"""One pass may enable another: a title before a number is then before a word."""
_TRIGGER = re.compile(r"[0-9\u00bc-\u00be]|\w@\w|^www\.|^https?:")
_COMPANION = re.compile(
    rf"(?:{_UNITS}|km/h|m/s|\u00b0[CF]|[AP]M|[x=+\u00d7\u00f7]|(?:m|b|tr)illion|{_MONTHS}|"
    r"(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.)[.,;:!?)]*"
)
"""Words that wetext reads together with an adjacent number."""
_MONTH_OF_DATE = re.compile(rf"(?<=\bof )({_MONTHS.lower()})\b")
"""wetext writes it in lower case."""


def _is_foreign(letter: str) -> bool:
    return letter.isalpha() and "LATIN" not in unicodedata.name(letter, "")


@lru_cache(maxsize=65_536)
def normalize(text: str) -> str:
    """English text with numbers and abbreviations in words; no other word is changed. Idempotent.

    Raises:
        ValueError: wetext is not installed.
    """
    if not text.isascii() and any(map(_is_foreign, text)):
        return text
    for _ in range(MOST_PASSES):
        before, text = text, _spell_out(text)
        if text == before:
            break
    return text


def _spell_out(text: str) -> str:
    for pattern, spell in _RULES:
        text = pattern.sub(spell, text)
    if not _TRIGGER.search(text) and "@" not in text and "www" not in text:
        return text
    parts = re.split(r"(\s+)", text)
    words, spaces = parts[::2], parts[1::2]
    triggers = [_TRIGGER.search(word) is not None for word in words]
    read = [
        trigger or _COMPANION.fullmatch(word) is not None
        for trigger, word in zip(triggers, words, strict=True)
    ]
    result, start = "", 0
    while start < len(words):
        end = start + 1
        while read[start] and end < len(words) and read[end]:
            end += 1
        run = words[start:end]
        result += _read(run) if any(triggers[start:end]) else " ".join(run)
        result += spaces[end - 1] if end - 1 < len(spaces) else ""
        start = end
    return result


def _read(words: list[str]) -> str:
    """Words as wetext reads them; where it fails, word by word, then the numbers alone."""
    text = " ".join(words)
    body = text.rstrip(_AFTER)  # Dates lose what follows them.
    made = _ask(body)
    if made is not None:
        return made + text[len(body) :]
    if len(words) > 1:
        return " ".join(_read([word]) for word in words)
    return re.sub(r"[0-9]+", lambda m: _ask(m[0]) or m[0], text)


def _ask(text: str) -> str | None:
    normalizer = _wetext()
    try:
        # wetext escapes quotes, and misreads a backslash as an escape.
        made = None if "\\" in text else normalizer.normalize(text).replace('\\"', '"')
    except (AssertionError, IndexError, KeyError, RuntimeError, ValueError):
        return None  # It raises these for symbols that its grammar lacks.
    if not made:
        return None
    words = _MONTH_OF_DATE.sub(lambda m: m[0].capitalize(), made).split(" ")
    for index, word in enumerate(words):
        before = re.sub(r"\W", "", words[index - 1]).lower() if index else ""
        if word.rstrip(".,;:!?)") == "thousand" and before not in _BEFORE_THOUSAND:
            words[index] = f"one {word}"
    return " ".join(words)


@cache
def _wetext() -> Any:
    try:
        import wetext
    except ImportError as error:
        raise ValueError(
            "text.normalize needs wetext: pip install wetext, or set text.normalize=false"
        ) from error
    return wetext.Normalizer(lang="en")


_IPA = frozenset("\u02c8\u02cc\u02d0\u0259\u026a\u028a\u025b\u0254\u028c\u0251\u0283\u0292\u014b")
"""Stress and length marks, and IPA letters that English text does not have."""


@lru_cache(maxsize=65_536)
def phonemes(text: str, tied: bool = False) -> str:
    """English text as IPA with stress, spaces between words and punctuation.

    IPA input is returned unchanged, so that a pronunciation can be given.

    Args:
        tied: put "^" between the letters of one phoneme.

    Raises:
        ValueError: the extra `phonemes` is not installed.
    """
    if not _IPA.isdisjoint(text) or not any(letter.isalnum() for letter in text):
        return text
    backend, separator = _espeak(tied) if tied else _espeak()
    return backend.phonemize([text], separator=separator, strip=True)[0].strip()


@cache
def _espeak(tied: bool = False) -> tuple[Any, Any]:
    try:
        import espeakng_loader  # pyright: ignore[reportMissingImports]
        from phonemizer.backend import EspeakBackend  # pyright: ignore[reportMissingImports]
        from phonemizer.backend.espeak.wrapper import EspeakWrapper  # pyright: ignore[reportMissingImports]
        from phonemizer.separator import Separator  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "text.tts_form=phonemes needs the extra `phonemes` (GPL): pip install "
            "'parlance[phonemes]'; or choose tokens or characters"
        ) from error
    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    backend = EspeakBackend(
        "en-us",
        preserve_punctuation=True,
        with_stress=True,
        language_switch="remove-flags",
        tie="^" if tied else False,
    )
    return backend, Separator(phone="", syllable="", word=" ")
