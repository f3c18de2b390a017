"""Text normalization for TTS (English): numbers and abbreviations to words; and phonemes.

`clean_text` comes first, for all languages: compatibility forms, format and control characters.
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
    pauses: tuple[float | None, ...] = ()
    """Seconds of the pause at each blank line of `text`; None and missing: that of a paragraph."""

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


SIGN_LETTERS = "\u00aa\u00b5\u00ba\u02bc\u03a9\u03bc\u2126"
"""Letters that English texts have as signs: ordinals, micro, ohm, apostrophe."""
_PLAIN = re.compile(r"[\t\n -~]*")
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028]")
_HYPHENS = re.compile("[\u2010\u2011]")
_SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Choose between glyphs of the character before them."""
_MARKS = "\u00a8\u00af\u00b4\u00b8\u02d8-\u02dd"
_SUPERSCRIPTS = "\u00b2\u00b3\u00b9\u2070\u2074-\u207b"
_FRACTIONS = "\u00bc-\u00be\u2150-\u215e"
_KEPT = f"{_MARKS}{_SUPERSCRIPTS}{_FRACTIONS}\u00aa\u00b5\u00ba\u02b0-\u02b8\u02e0-\u02e4"
_KEPT += "\u2116\u2120\u2122\u2126"
"""Characters that compatibility composition (NFKC) would misread: 10\\u00b2 is not 102."""
_WIDE_PUNCTUATION = "\u2026\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
"""Punctuation of other scripts; part of their spelling."""
_FOLDED = {
    False: re.compile(f"[^{_KEPT}]+"),
    True: re.compile(f"[^{_KEPT}{_WIDE_PUNCTUATION}]+"),
}


def clean_text(text: str) -> str:
    """The text in compatibility composition (NFKC), without format and control characters.

    Line ends become line feeds, a paragraph separator a blank line. Fractions, exponents and signs
    are left to `normalize`; texts with letters of other scripts than Latin keep their punctuation
    and joiners.
    """
    if _PLAIN.fullmatch(text):
        return text
    text = _LINE_ENDS.sub("\n", text).replace("\u2029", "\n\n")
    foreign = any(map(_is_foreign, unicodedata.normalize("NFKC", text)))
    kept = {"\t", "\n", *("\u200c\u200d" if foreign else "")}
    text = "".join(c for c in text if c in kept or unicodedata.category(c) not in ("Cc", "Cf"))
    text = _SELECTORS.sub("", text)
    text = _FOLDED[foreign].sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
    return _HYPHENS.sub("-", text)


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
_OTHER_MONEY = {
    **{"\u00a5": "yen", "\u20b9": "rupees", "\u20a9": "won", "\u20bd": "rubles", "\u20ba": "lira"},
}
_CODES = {"USD": "$", "GBP": "\u00a3", "EUR": "\u20ac"}
_LARGE = {"k": "thousand", "m": "million", "b": "billion", "t": "trillion"}
_SIGNS = {
    **{
        "\u00b1": "plus or minus",
        "\u00d7": "times",
        "\u00f7": "divided by",
        "\u2248": "approximately",
    },
    **{"\u2260": "not equal to", "\u2264": "at most", "\u2265": "at least", "\u221e": "infinity"},
    **{"\u221a": "the square root of", "\u00a7": "section", "\u00a9": "copyright", "\u2192": "to"},
}
_LINK_SIGNS = {
    **{".": "dot", "/": "slash", ":": "colon", "-": "dash", "_": "underscore", "~": "tilde"},
    **{"?": "question mark", "=": "equals", "&": "and", "#": "hash", "%": "percent", "+": "plus"},
    **{"@": "at", ",": "comma", ";": "semicolon", "!": "exclamation mark", "*": "star"},
    **{"$": "dollar", "(": "open parenthesis", ")": "close parenthesis", "'": "apostrophe"},
}
_INITIALS = {"http", "https", "ftp", "www", "html", "htm", "php", "pdf", "io", "ai"}
"""Parts of links that are spelled letter by letter."""
_LONGEST_WORD = 20
"""Longer parts of links are spelled, too."""
_AREAS = {
    **{"mm": "millimeter", "cm": "centimeter", "m": "meter", "km": "kilometer"},
    **{"ft": "foot", "in": "inch", "mi": "mile", "yd": "yard"},
}
_AREAS_OF_MANY = {"ft": "feet", "in": "inches"}
_PREFIXES = {"": "", "k": "kilo", "M": "mega"}
_UNIT_NAMES = {
    **{"hr": "hour", "hrs": "hour", "mins": "minute", "sec": "second", "secs": "second"},
    **{"yr": "year", "yrs": "year", "wk": "week", "wks": "week", "kWh": "kilowatt hour"},
    **{"tbsp": "tablespoon", "tsp": "teaspoon", "V": "volt", "W": "watt"},
}
"""Units that wetext does not read."""
_MICRO = {"m": "meters", "g": "grams", "s": "seconds", "l": "liters", "L": "liters"}
_MONTH_NAMES = {
    **{"Jan": "January", "Feb": "February", "Mar": "March", "Apr": "April", "Jun": "June"},
    **{"Jul": "July", "Aug": "August", "Sep": "September", "Sept": "September"},
    **{"Oct": "October", "Nov": "November", "Dec": "December"},
}
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


def _link(match: re.Match[str]) -> str:
    """A link, part by part; digits one by one."""
    link = match[0].rstrip(_AFTER)
    words = []
    for part in re.findall(r"[^\W\d_]+|\d|[\W_]", link):
        if part.isdecimal():
            words.append(_DIGITS[int(part)])
        elif part.lower() in _INITIALS or len(part) > _LONGEST_WORD:
            words.append(" ".join(part))
        else:
            words.append(_LINK_SIGNS.get(part, part))
    return " ".join(words) + match[0][len(link) :]


def _is_one(match: re.Match[str]) -> bool:
    """Whether the number whose last digit is the first group is 1."""
    before = match.string[max(0, match.start(1) - 1) : match.start(1)]
    return match[1] == "1" and not re.fullmatch(r"[\d.,]", before)


def _count(number: str, unit: str) -> str:
    return f"{number} {unit}" if number == "1" else f"{number} {unit}s"


def _duration(match: re.Match[str], *units: str) -> str:
    parts = zip(match.groups(), units, strict=True)
    return " ".join(_count(number, unit) for number, unit in parts if number)


def _money_range(match: re.Match[str]) -> str:
    sign, low, large, high = match.groups()
    # The sign of the higher one serves both, where the lower one is as simple as that.
    first = f"{sign}{low}{large}" if large or "." in low else low
    return f"{first} to {sign}{high}"


def _fraction(match: re.Match[str]) -> str:
    top, bottom = map(int, unicodedata.normalize("NFKC", match[2]).split("\u2044"))
    names = ["half", "third", "quarter", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
    name = names[bottom - 2] if top == 1 else f"{names[bottom - 2]}s"
    if not match[1]:
        return f"{_DIGITS[top]} {name}"
    article = "an" if bottom == 8 else "a"
    return f"{match[1]} and {article if top == 1 else _DIGITS[top]} {name}"


def _power(match: re.Match[str]) -> str:
    exponent = unicodedata.normalize("NFKC", match[1]).replace("\u2212", "-").replace("+", "")
    if exponent in ("2", "3"):
        return " squared" if exponent == "2" else " cubed"
    return f" to the power of {exponent.replace('-', 'minus ')}"


def _area(match: re.Match[str]) -> str:
    before, unit = match[1], match[2]
    kind = "square" if match[3] == "\u00b2" else "cubic"
    if not before.isdigit():
        return f"{' per ' if before == '/' else before}{kind} {_AREAS[unit]}"
    many = _AREAS_OF_MANY.get(unit, f"{_AREAS[unit]}s")
    return f"{before} {kind} {_AREAS[unit] if _is_one(match) else many}"


def _unit(match: re.Match[str]) -> str:
    return f"{match[1]} {_UNIT_NAMES[match[2]]}{'' if _is_one(match) else 's'}"


def _sign(match: re.Match[str]) -> str:
    """A sign in words, with spaces around it."""
    text, start, end = match.string, match.start(), match.end()
    left = " " if start and not text[start - 1].isspace() and text[start - 1] not in "([\"'" else ""
    right = " " if re.match(r"[\w$\u00a3\u20ac(-]", text[end : end + 1]) else ""
    return f"{left}{_SIGNS[match[0]]}{right}"


def _ratio(match: re.Match[str]) -> str:
    one, other = int(match[1]), int(match[2])
    return f"{one} {other}" if one == other or one + other == 100 else match[0]


_DIGITS = ["zero", *_DIGIT_WORDS.split()[1:]]
_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_LINK = re.compile(
    r"(?:(?:https?|ftp)://|\bwww\.|\blocalhost:(?=\d))[^\s<>\"]+"
    r"|(?<![@\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w.-]*\w)(?:[:/][^\s<>\"]*)?"
    r"|(?<![@\w.-])(?:[a-z\d-]+\.)+(?:com|org|net|edu|gov|io|ai|dev)\b(?![.@]\w)"
    r"(?:[:/?][^\s<>\"]+)?",
    re.I,
)
_ALONE = r"(?<![\w.,:/$\u00a3\u20ac-])"
"""Before a separate number."""
_ENDS = r"(?![\w%]|[.,:/-]\d)"
_CLOSED = r"(?=[\"')\]]*$)"
"""At the end of the text, where an abbreviation's full stop also ends the sentence."""
_RULES = [
    (_LINK, _link),
    # Longer than any quantity.
    (re.compile(r"\d{25,}"), lambda m: " ".join(_DIGITS[int(digit)] for digit in m[0])),
    (re.compile("[\u2018\u2019\u201b\u02bc]|(?<=\\w)\u00b4(?=\\w)"), lambda m: "'"),
    (re.compile("[\u201c\u201d]"), lambda m: '"'),
    (re.compile(r"(?<![^\S\n])[^\S\n]*&[^\S\n]*(?=\w)"), lambda m: " and "),
    (re.compile(r"(?:#|\u2116\s?)(?=\d)"), lambda m: "number "),
    (re.compile(r"#(?=[A-Za-z])"), lambda m: "hashtag "),
    (re.compile(r"\b([CF])#(?!\w)"), lambda m: f"{m[1]} sharp"),
    (re.compile(r"\bC\+\+"), lambda m: "C plus plus"),
    (re.compile(r"\bw/o\b"), lambda m: "without"),
    (re.compile(r"\bw/\s?(?=\w)"), lambda m: "with "),
    (re.compile(r"(?<=[^\W\d_])([,;])(?=[^\W\d_])"), lambda m: f"{m[1]} "),
    (re.compile(r"(?<=[a-z])([!?])(?=[A-Z])"), lambda m: f"{m[1]} "),
    (
        re.compile(
            rf"(\d(?:st|nd|rd|th)?\s+)({_names(_MONTH_NAMES)})\b(?:\.(?=\s+[a-z\d]|[,;:]))?"
        ),
        lambda m: m[1] + _MONTH_NAMES[m[2]],
    ),
    (
        re.compile(
            rf"\b({_names(_MONTH_NAMES)})\b\.?"
            r"(?=\s+(?:\d{1,2}(?:st|nd|rd|th)?|\d{4})(?![\w:]))"
        ),
        lambda m: _MONTH_NAMES[m[1]],
    ),
    (re.compile(r"(\d)\s+%"), lambda m: f"{m[1]}%"),
    (re.compile(rf"(\d%?)-(?={_NUMBER}%)"), lambda m: f"{m[1]} to "),
    (re.compile(r"(?<![\w+])\+(?=[$\u00a3\u20ac]?\d)"), lambda m: "plus "),
    (re.compile(r"(\d)\+(?![\w+])"), lambda m: f"{m[1]} plus"),
    (re.compile(r"(\d/\d+)(?:rd|th|nd)s?\b"), lambda m: m[1]),
    (re.compile("\u2044"), lambda m: "/"),
    (re.compile(rf"(?:(?<!\d)(\d+)\s?)?([{_FRACTIONS}])"), _fraction),
    (re.compile(r"(\d|\bper |/)\s?(mm|cm|km|m|ft|in|mi|yd)([\u00b2\u00b3])"), _area),
    (
        re.compile(rf"(?:(?<=[\d)])|(?<=\b[A-Za-z]))([{_SUPERSCRIPTS}]+)(?!\w)"),
        _power,
    ),
    (re.compile(r"(?:(?<=[\d)])|(?<=\b[A-Za-z]))\^([+-]?\d+)"), _power),
    (
        re.compile(r"(\d)\s?[\u00b5\u03bc]([mgslL])\b"),
        lambda m: f"{m[1]} micro{_MICRO[m[2]]}",
    ),
    (
        re.compile(r"(\d)\s?([kM]?)[\u2126\u03a9]"),
        lambda m: f"{m[1]} {_PREFIXES[m[2]]}ohms",
    ),
    (re.compile(r"(?<=\w)\s*\u2212\s*(?=[\w$(])"), lambda m: " minus "),
    (re.compile(r"\u2212\s*(?=[$\u00a3\u20ac]?\d)"), lambda m: "minus "),
    (re.compile(r"(?<!\S)-(?=[$\u00a3\u20ac]\d)"), lambda m: "minus "),
    (re.compile(r"~\s?(?=[$\u00a3\u20ac]?\d)"), lambda m: "approximately "),
    (re.compile(r"(?<=\d)\s?>\s?(?=\d)"), lambda m: " is greater than "),
    (re.compile(r"(?<=\d)\s?<\s?(?=\d)"), lambda m: " is less than "),
    (re.compile(r"(?<!\S)<\s?(?=[$\u00a3\u20ac]?\d)"), lambda m: "less than "),
    (re.compile(r"(?<!\S)>\s?(?=[$\u00a3\u20ac]?\d)"), lambda m: "more than "),
    (re.compile(r"(?<!\d)(?!0x)(\d+)\s?x\s?(?=\d)"), lambda m: f"{m[1]} by "),
    (re.compile(r"(\d)\s?\*\s?(?=\d)"), lambda m: f"{m[1]} times "),
    (re.compile(rf"[{''.join(_SIGNS)}]"), _sign),
    (re.compile(r"(?<=\w) \+ (?=\w)"), lambda m: " plus "),
    (re.compile(r"(?<=\w) = (?=\w)"), lambda m: " equals "),
    (re.compile(r"(\d)\s?m/s\b"), lambda m: f"{m[1]} meters per second"),
    (re.compile(rf"(\d)\s?({_names(_UNIT_NAMES)})\b(?:\.(?=\s+[a-z\d]|[,;:]))?"), _unit),
    (re.compile(r"(\d{4}-\d\d-\d\d)T(?=\d\d:)"), lambda m: f"{m[1]} "),
    (re.compile(r"\bUS\$(?=\d)"), lambda m: "$"),
    (
        re.compile(rf"{_ALONE}({_NUMBER})\s?({_names(_CODES)})\b"),
        lambda m: _CODES[m[2]] + m[1],
    ),
    (
        re.compile(
            rf"{_ALONE}({_NUMBER}(?:-{_NUMBER})?)([kmbt]n?)?\s?([$\u00a3\u20ac])(?!\w)", re.I
        ),
        lambda m: f"{m[3]}{m[1]}{m[2] or ''}",
    ),
    (
        re.compile(
            rf"([$\u00a3\u20ac])({_NUMBER})([kmbt]?)\s?[-\u2013]\s?\1?({_NUMBER})(?![\d-])\1?", re.I
        ),
        _money_range,
    ),
    (
        re.compile(rf"([{''.join(_OTHER_MONEY)}])\s?({_NUMBER})(?:([kmbt])n?\b)?", re.I),
        lambda m: " ".join(
            filter(None, (m[2], _LARGE.get((m[3] or "").lower()), _OTHER_MONEY[m[1]]))
        ),
    ),
    (
        re.compile(r"(\d[%\u00b0]?)\s?[\u2012\u2013]\s?(?=[$\u00a3\u20ac]?\d)"),
        lambda m: f"{m[1]} to ",
    ),
    (
        re.compile(rf"{_ALONE}\d+\.\d+\.\d{{1,3}}(?!\w|\.\d)"),
        lambda m: m[0].replace(".", " point "),
    ),
    (
        re.compile(r"\b(\d+)\s?h(?:rs?)?\s?(\d+)\s?m(?:ins?)?(?:\s?(\d+)\s?s(?:ecs?)?)?\b"),
        lambda m: _duration(m, "hour", "minute", "second"),
    ),
    (
        re.compile(r"\b(\d+)\s?m(?:in)?\s?(\d+)\s?s(?:ec)?\b"),
        lambda m: _duration(m, "minute", "second"),
    ),
    (re.compile(r"\b(\d+)\s?h\b"), lambda m: _count(m[1], "hour")),
    (re.compile(r"(?<![\d/.,])(\d\d)/(\d\d)(?![\d/])"), _ratio),
    (re.compile(r"(?<![\d/])9/11(?![\d/])"), lambda m: "nine eleven"),
    (re.compile(rf"{_ALONE}([248])K\b"), lambda m: f"{m[1]} K"),
    (re.compile(rf"{_ALONE}({_NUMBER})[kK]\b"), lambda m: f"{m[1]} thousand"),
    (
        re.compile(
            rf"{_ALONE}(?:(\d+\.\d+)([MBT])\b|(\d+)([MBT])"
            r"(?=\s+(?:of|people|(?!this|does|goes)[a-z]{3,}s)\b))"
        ),
        lambda m: f"{m[1] or m[3]} {_LARGE[(m[2] or m[4]).lower()]}",
    ),
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
        re.compile(r"([$\u00a3\u20ac])(\d+(?:,\d{3})*(?:\.\d+)?)([kmbt])n?\b", re.I),
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
    (re.compile(rf"{_ALONE}1000{_ENDS}"), lambda m: "one thousand"),
    (re.compile(rf"{_ALONE}100([1-9]){_ENDS}"), lambda m: f"one thousand and {m[1]}"),
    (re.compile(r"(\d(?:st|nd|rd|th|s)|,\d{3})-(?=[A-Za-z])"), lambda m: f"{m[1]} "),
    (
        re.compile(r"(\d)\s?\u00a2"),
        lambda m: f"{m[1]} cent" if _is_one(m) else f"{m[1]} cents",
    ),
    (
        re.compile(r"(\d)\s?\u00b0(?!\s?[CFK]\b)"),
        lambda m: f"{m[1]} degree" if _is_one(m) else f"{m[1]} degrees",
    ),
]
_AFTER = ".,;:!?)]\"'"
MOST_PASSES = 4
"""One pass may enable another: a title before a number is then before a word."""
_LONGEST_RUN = 400
"""Maximum characters that wetext reads at once; its time grows faster than the length."""
_TRIGGER = re.compile(r"[0-9]|\w@\w")
_COMPANION = re.compile(
    rf"(?:{_UNITS}|km/h|m/s|\u00b0[CF]|[AP]M|[x=+\u00d7\u00f7]|(?:m|b|tr)illion|{_MONTHS}|"
    r"(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.)[.,;:!?)]*"
)
"""Words that wetext reads together with an adjacent number."""
_MONTH_OF_DATE = re.compile(rf"(?<=\bof )({_MONTHS.lower()})\b")
"""wetext writes it in lower case."""


_UNREAD = "#%&*@\\\u00b6\u2020\u2021"


def _is_foreign(letter: str) -> bool:
    return (
        letter.isalpha()
        and letter not in SIGN_LETTERS
        and "LATIN" not in unicodedata.name(letter, "")
    )


def unread_signs(text: str) -> list[str]:
    """The signs in a normalized text, sorted: no rule has replaced them by words."""
    return sorted(
        {
            c
            for c in text
            if c in _UNREAD or unicodedata.category(c) in ("Sc", "Sk", "Sm", "So", "No")
        }
    )


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
    if not _TRIGGER.search(text):
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
        while read[start] and end < len(words) and read[end] and "\n" not in spaces[end - 1]:
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


@lru_cache(maxsize=4096)
def _ask(text: str) -> str | None:
    normalizer = _wetext()
    if len(text) > _LONGEST_RUN:
        return None
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
