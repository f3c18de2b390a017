"""Text normalization for TTS (English): numbers and abbreviations to words; and phonemes.

`clean_text` comes first, for all languages: compatibility forms, format and control characters.
Numbers, dates, times, money and units are read by wetext's offline rules (WeTextProcessing). It
gets only the words that need it, after rules for what it misreads; all other words are unchanged.
What is right, and what is known to be wrong, is in tests/golden/texts_en.jsonl.
Texts with letters of other scripts are returned unchanged.
"""

import re
import unicodedata
from collections.abc import Iterable
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
    respelled: bool = False
    """Whether words are respelled by markup or lexicon: a transcript may spell them otherwise."""

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
_RAISED = re.compile("(?<=\\d)(?:\u02e2t|\u02b3d|t\u02b0)(?![^\\W\\d_])")
"""Superscript endings of ordinals, of which some letters are composed already."""
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
    text = _RAISED.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
    return _HYPHENS.sub("-", text)


_TITLES = {
    **{"Mr": "Mister", "Mrs": "Missus", "Dr": "Doctor", "Prof": "Professor", "Capt": "Captain"},
    **{"Lt": "Lieutenant", "Sgt": "Sergeant", "Gen": "General", "Col": "Colonel"},
    **{"Gov": "Governor", "Sen": "Senator", "Rev": "Reverend", "Hon": "Honorable"},
    **{"Rep": "Representative", "Pres": "President", "Maj": "Major", "Adm": "Admiral"},
    **{"Cmdr": "Commander", "Cpl": "Corporal", "Det": "Detective"},
    **{"St": "Saint", "Mt": "Mount", "Ft": "Fort"},
}
"""Before a name."""
_ABBREVIATIONS = {
    **{"Jr": "Junior", "Sr": "Senior", "St": "Street", "Ave": "Avenue", "Blvd": "Boulevard"},
    **{"vs": "versus", "etc": "et cetera", "e.g": "for example", "i.e": "that is"},
    **{"E.g": "For example", "I.e": "That is", "approx": "approximately", "dept": "department"},
    **{"Inc": "Incorporated", "Ltd": "Limited", "Corp": "Corporation", "Bros": "Brothers"},
}
_COUNTED = {
    **{"no": "number", "nos": "numbers", "vol": "volume", "p": "page", "pp": "pages"},
    **{"ch": "chapter", "fig": "figure", "sec": "section", "eq": "equation"},
    **{"apt": "apartment", "rm": "room", "ext": "extension", "est": "established"},
    **{"tel": "telephone", "min": "minimum", "max": "maximum"},
}
"""Before a number."""
_MONEY = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "\u00a3": ("pound", "pounds", "penny", "pence"),
    "\u20ac": ("euro", "euros", "cent", "cents"),
}
_OTHER_MONEY = {
    **{"\u00a5": "yen", "\u20b9": "rupees", "\u20a9": "won", "\u20bd": "rubles", "\u20ba": "lira"},
    **{"A$": "Australian dollars", "C$": "Canadian dollars", "NZ$": "New Zealand dollars"},
    **{"HK$": "Hong Kong dollars", "S$": "Singapore dollars", "R$": "reais"},
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
    **{"\\": "backslash"},
}
_INITIALS = {
    *("http", "https", "ftp", "www", "html", "htm", "php", "pdf", "io", "ai"),
    *("txt", "md", "csv", "xml", "js", "usr"),
}
"""Parts of links that are spelled letter by letter."""
_FILE_TYPES = {
    *("txt", "md", "pdf", "doc", "docx", "xls", "xlsx", "csv", "tsv", "json", "jsonl", "xml"),
    *("html", "htm", "yaml", "yml", "toml", "ini", "log", "zip", "tar", "gz", "exe", "py", "js"),
    *("ts", "sh", "png", "jpg", "jpeg", "gif", "svg", "mp3", "mp4", "wav", "flac", "ogg"),
}
"""Endings of file names."""
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
    **{"tbsp": "tablespoon", "tsp": "teaspoon", "V": "volt", "W": "watt", "kV": "kilovolt"},
    **{"mA": "milliampere", "mAh": "milliampere hour", "Wh": "watt hour", "L": "liter"},
    **{"dB": "decibel", "cal": "calorie", "kcal": "kilocalorie", "kJ": "kilojoule"},
    **{"kbps": "kilobit per second", "Mbps": "megabit per second", "Gbps": "gigabit per second"},
    **{"fps": "frame per second", "bpm": "beat per minute", "dpi": "dot per inch"},
    **{"ms": "millisecond", "ns": "nanosecond", "ha": "hectare", "gal": "gallon", "px": "pixel"},
    **{"kB": "kilobyte", "KB": "kilobyte", "TB": "terabyte", "PB": "petabyte"},
    **{"ppm": "part per million", "psi": "pound per square inch", "kPa": "kilopascal"},
}
"""Units that wetext does not read."""
_PER_UNITS = {"ml": "milliliter", "dl": "deciliter", "l": "liter", "L": "liter", "kg": "kilogram"}
_PERIODS = "second|minute|hour|day|night|week|month|quarter|year|person|mile|gallon|pound|page"
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


_ROMAN = (
    r"(?=[IVXLCDM])M{0,3}(?:C[MD]|D?C{0,3})(?:X[CL]|L?X{0,3})(?:I[XV]|V?I{0,3})(?<=[IVXLCDM])\b"
)
_SMALL_ROMAN = r"(?=[IVXL])(?:XL|L?X{0,3})(?:I[XV]|V?I{0,3})(?<=[IVXL])\b"
"""To 89; what has C, D or M behind a name is an abbreviation (MD, CD, DC)."""
_NUMBERED = (
    "Chapter|Part|Act|Scene|Volume|Vol\\.|Book|Section|Article|Type|Phase|Stage|Class|Grade|Level|"
    "Title|World War|Super Bowl|Appendix|Figure|Table|Episode|Season|Unit|Lesson|Canto|Annex|"
    "Division|Group|Category|Tier|Psalm|Round|Step|Apollo"
)
"""Before a Roman numeral that is a number; after a name it is an ordinal."""
_REIGNING = (
    "Henry|Edward|George|William|Richard|James|Charles|John|Paul|Elizabeth|Mary|Louis|Philip|"
    "Napoleon|Alexander|Nicholas|Peter|Catherine|Frederick|Wilhelm|Otto|Leopold|Albert|Ferdinand|"
    "Francis|Pius|Benedict|Gregory|Leo|Innocent|Clement|Urban|Boniface|Ramses|Ramesses|Ptolemy|"
    "Darius|Xerxes|Thutmose|Amenhotep|Robert|David|Harald|Olaf|Gustav|Christian|Umberto|"
    "Alfonso|Pedro|Ivan|Mehmed|Murad|Selim|Suleiman|Constantine|Margaret|Anne|Isabella|Baldwin"
)
_NOT_NAMES = "The|An|Her|His|Its|Our|Your|This|That|These|Those|And|For|With|From|But|Jet"
_CAPITAL_I = r"(?=\s*(?:[,.;:!?)\]\"]|'s\b|$)|\s+(?:of|the|began|begins|ended|ends)\b)"
"""After the numeral I, which is a pronoun elsewhere."""
_DAYS = {
    **{"Mon": "Monday", "Tue": "Tuesday", "Tues": "Tuesday", "Wed": "Wednesday"},
    **{"Thu": "Thursday", "Thur": "Thursday", "Thurs": "Thursday", "Fri": "Friday"},
    **{"Sat": "Saturday", "Sun": "Sunday"},
}


def _roman(numeral: str) -> int:
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}[c] for c in numeral]
    later = [*values[1:], 0]
    return sum(-one if one < two else one for one, two in zip(values, later, strict=True))


def _ordinal(number: int) -> str:
    teen = number % 100 // 10 == 1
    return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


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
    name, per, period = _UNIT_NAMES[match[2]].partition(" per ")
    return f"{match[1]} {name}{'' if _is_one(match) else 's'}{per}{period}"


def _years(match: re.Match[str]) -> str:
    """A range of years, or a year and its month."""
    century, first, last = match[1], match[2], match[3]
    if len(last) == 4:
        return f"{century}{first} to {last}" if last > century + first else match[0]
    if last > first:
        return f"{century}{first} to {last}"
    months = _MONTHS.split("|")
    return f"{months[int(last) - 1]} {century}{first}" if 1 <= int(last) <= 12 else match[0]


def _short_date(match: re.Match[str]) -> str:
    year = int(match[3])
    return f"{match[1]}/{match[2]}/{2000 + year if year < 50 else 1900 + year}"


def _dotted_date(match: re.Match[str]) -> str:
    day, month = int(match[1]), int(match[2])
    valid = 1 <= day <= 31 and 1 <= month <= 12
    return f"{match[3]}-{month:02}-{day:02}" if valid else match[0]


def _height(match: re.Match[str]) -> str:
    inches = f" {_inches(match[2])}" if match[2] else ""
    return f"{match[1]} {'foot' if match[1] == '1' else 'feet'}{inches}"


def _inches(number: str) -> str:
    return f"{number} inch" if number == "1" else f"{number} inches"


def _inch_mark(match: re.Match[str]) -> str:
    """Inches, unless the sign closes a quotation."""
    line = match.string.rfind("\n", 0, match.start()) + 1
    line = max(line, match.start() - 1000)
    if match.string.count('"', line, match.start()) % 2:
        return match[0]
    return f"{match[1]} inch"


def _path(match: re.Match[str]) -> str:
    """A path or a file name; others stay."""
    name = match[0].rstrip(_AFTER)
    ending = re.search(r"\.([A-Za-z\d]+)$", name)
    if name[0] in "/~." or "\\" in name or (ending and ending[1].lower() in _FILE_TYPES):
        return _link(match)
    return match[0]


def _digit_by_digit(match: re.Match[str]) -> str:
    return match[1] + " ".join(
        _DIGITS[int(sign)] if sign.isdecimal() else sign for sign in match[2] if sign.isalnum()
    )


def _sign(match: re.Match[str]) -> str:
    """A sign in words, with spaces around it."""
    text, start, end = match.string, match.start(), match.end()
    left = " " if start and not text[start - 1].isspace() and text[start - 1] not in "([\"'" else ""
    right = " " if re.match(r"[\w$\u00a3\u20ac(-]", text[end : end + 1]) else ""
    return f"{left}{_SIGNS[match[0]]}{right}"


def _ratio(match: re.Match[str]) -> str:
    one, other = int(match[1]), int(match[2])
    return f"{one} {other}" if one == other or one + other == 100 else match[0]


_GREEK = re.compile("(?<![^\\W\\d_])[\u0391-\u03a8\u03b1-\u03bb\u03bd-\u03c9](?![^\\W\\d_])")
"""One Greek letter by itself is a sign; ohm and micro are units."""
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
    (re.compile(r"(?<![^\s(\"'])(?:~|\.\.?)?/(?:[\w.~-]+/)*[\w.~-]+/?(?![^\s.,;:!?)\"'])"), _path),
    (re.compile(r"\b[A-Z]:\\[^\s\"<>|]*"), _path),
    (re.compile(r"(?<![\w.@/-])[\w-]+(?:\.[\w-]+)*\.[A-Za-z]\w{1,4}(?![\w/@-]|\.\w)"), _path),
    (re.compile(r"(?<![\w@.])@(?=\w)"), lambda m: "at "),
    (re.compile(r"[-=]>"), lambda m: "\u2192"),
    (re.compile(r"<="), lambda m: "\u2264"),
    (re.compile(r">="), lambda m: "\u2265"),
    (re.compile(r"!="), lambda m: "\u2260"),
    (
        re.compile(
            r"(\d)\s?\u00b0\s?(\d{1,2})\s?['\u2032\u2019](?:\s?(\d{1,2})\s?"
            r"(?:[\"\u2033\u201d]|''|\u2032\u2032))?"
        ),
        lambda m: f"{m[1]} degrees {m[2]} minutes" + (f" {m[3]} seconds" if m[3] else ""),
    ),
    (
        re.compile(
            r"(?<![\w'.])(\d{1,2})\s?['\u2032\u2019]\s?(\d{1,2})\s?"
            r"(?:[\"\u2033\u201d]|''|\u2032\u2032)"
        ),
        _height,
    ),
    (
        re.compile(
            r"(?<![\w'.])(\d{1,3})\s?(?:['\u2032\u2019](?=\s+(?:tall|high|long|wide|deep|x|by)\b)"
            r"|\u2032(?!\u2032))()"
        ),
        _height,
    ),
    (
        re.compile(r"(?<![\w'.])(\d{1,2})\s?ft\.?\s?(\d{1,2})\s?in\b\.?(?!\s+(?:the|a|an|my)\b)"),
        _height,
    ),
    (re.compile(r"(\d)(?:\u2033|\u2032\u2032)"), lambda m: f"{m[1]} inches"),
    (re.compile(r"(?<![\w\"])(\d{1,3}(?:\.\d{1,3})?)\"(?=\s+[a-z])"), _inch_mark),
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
    (re.compile(r"\bc/o\b"), lambda m: "care of"),
    (re.compile(r"\b(and)/(or)\b", re.I), lambda m: f"{m[1]} {m[2]}"),
    (
        re.compile(rf"(\d(?:\s?[A-Za-z]{{1,12}})?)/(?=(?:{_PERIODS})s?\b)"),
        lambda m: f"{m[1]} per ",
    ),
    (
        re.compile(rf"(\d\s?(?:[mk]?g|k?cal|lbs?|oz|k?J))/({_names(_PER_UNITS)})\b"),
        lambda m: f"{m[1]} per {_PER_UNITS[m[2]]}",
    ),
    (re.compile(r"(\d/\d{1,3})-(?=[a-z])"), lambda m: f"{m[1]} "),
    (re.compile(r"(\d)-(?=[a-z]{3,20}\b(?!-\d))"), lambda m: f"{m[1]} "),
    (re.compile(r"(?<=\d)\s/\s(?=\d)"), lambda m: " divided by "),
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
    # Roman numerals. I, C, D, L and M alone are letters in most places.
    (
        re.compile(rf"\b({_NUMBERED}) (?![IL]\b)({_SMALL_ROMAN})(?!\.[A-Za-z])"),
        lambda m: f"{m[1]} {_roman(m[2])}",
    ),
    (re.compile(r"\bWorld War I\b(?!\.\w)"), lambda m: "World War 1"),
    (re.compile(r"\bMark I(?= tanks?\b)"), lambda m: "Mark 1"),
    (re.compile(rf"\b({_NUMBERED}) I{_CAPITAL_I}"), lambda m: f"{m[1]} 1"),
    (
        re.compile(r"\b(Chapter|Part|Act|Scene|Volume|Book|Section) ([ivx]{2,5})\b"),
        lambda m: f"{m[1]} {_roman(m[2].upper())}",
    ),
    (
        re.compile(rf"\b({_REIGNING}) (?!V\.\s*[A-Z]|[ILX]\b)({_SMALL_ROMAN})(?!\.\w)"),
        lambda m: f"{m[1]} the {_ordinal(_roman(m[2]))}",
    ),
    (
        re.compile(
            r"\b((?:King|Queen|Pope|Emperor|Empress|Tsar|Czar|Kaiser|Prince) [A-Z][a-z]+) I"
            rf"{_CAPITAL_I}"
        ),
        lambda m: f"{m[1]} the 1st",
    ),
    (
        re.compile(r"\b(Charles|Louis|Pius|Leo|Gregory|Benedict|Clement|Boniface) X\b(?!\.)"),
        lambda m: f"{m[1]} the 10th",
    ),
    (re.compile(rf"\b({_REIGNING}) I(?= of [A-Z])"), lambda m: f"{m[1]} the 1st"),
    (
        re.compile(
            rf"\b(?!(?:{_NOT_NAMES})\b)([A-Z][a-z]{{2,}}) (?=[IVX]{{2}})"
            rf"(?!XX\b|IV (?:fluid|drip|line|bag|drug|therap))({_SMALL_ROMAN})(?!\.\w)"
        ),
        lambda m: f"{m[1]} {_roman(m[2])}",
    ),
    (
        re.compile(rf"\b({_ROMAN})(?:th|st|nd|rd)?(?= (?:century|centuries)\b)"),
        lambda m: _ordinal(_roman(m[1])),
    ),
    # Days of the week.
    (
        re.compile(
            rf"\b({_names(_DAYS)})\b\.?\s?[-\u2013]\s?({_names(_DAYS)})\b(?:\.(?=\s*[a-z\d,;:]))?"
        ),
        lambda m: f"{_DAYS[m[1]]} to {_DAYS[m[2]]}",
    ),
    (
        re.compile(
            rf"\b({_names(_DAYS)})(?:\.,?(?=\s+(?:and|at|to|or|from|\d|[a-z]))|(?=,\s+"
            rf"(?:{_MONTHS}|{_names(_MONTH_NAMES)})\b\.?\s\d))"
        ),
        lambda m: _DAYS[m[1]] + ("," if m[0].endswith(",") else ""),
    ),
    (
        re.compile(rf"\b({_MONTHS}) (\d{{1,2}})\s?[-\u2013]\s?(\d{{1,2}})(?![\w:/-])"),
        lambda m: f"{m[1]} {_ordinal(int(m[2]))} to the {_ordinal(int(m[3]))}",
    ),
    # Dates: month first with slashes, day first with dots.
    (re.compile(r"(?<![\w/.-])(\d{1,2})/(\d{1,2})/(\d\d)(?![\w/]|[.-]\d)"), _short_date),
    (re.compile(r"(?<![\w/.-])(\d{1,2})\.(\d{1,2})\.([12]\d{3})(?![\w/]|[.-]\d)"), _dotted_date),
    (
        re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::00)?(?:\.0+)?(Z\b)?"),
        lambda m: f"{m[1]} {m[2]}" + (" UTC" if m[3] else ""),
    ),
    (
        re.compile(rf"{_ALONE}(1[1-9]|20)(\d\d)\s?[-\u2013]\s?(1[1-9]\d\d|20\d\d|\d\d){_ENDS}"),
        _years,
    ),
    (re.compile(r"\bFY\s?(?=(?:19|20)\d\d\b)"), lambda m: "FY "),
    # Numbers that are read digit by digit.
    (re.compile(r"\b(ISBN(?:-1[03])?:? ?)(\d(?:[ -]?[\dXx]){9,12})\b"), _digit_by_digit),
    (
        re.compile(r"(?<![\w+])\+\d(?:[ .-]?\(?\d\)?){6,14}(?![\w]|[.-]\d)"),
        lambda m: "plus " + _telephone(m),
    ),
    (re.compile(r"(?<![\w-])\d{5}-\d{4}(?![\w-])"), _telephone),
    (re.compile(r"(?<![\w.,/-])0\d{2,4}[ -]\d{3,4}[ -]?\d{3,4}(?![\w/-]|[.,]\d)"), _telephone),
    (
        re.compile(
            r"\b((?:[Cc]all|[Dd]ial|[Pp]hone|[Tt]ext) )(\d{3})"
            r"(?=[.,;:!?)]|$|\s+(?:for|if|now|or|and)\b)"
        ),
        _digit_by_digit,
    ),
    (
        re.compile(r"(?<![\w.,])(\d{1,3})((?: 000)+)(?![\w]|[.,]\d)"),
        lambda m: m[0].replace(" ", ""),
    ),
    # Arithmetic.
    (
        re.compile(r"(?<=\d) - (?=\d{1,12}(?:\.\d{1,12})?\s?[=+*/\u00d7\u00f7])"),
        lambda m: " minus ",
    ),
    (re.compile(r"(?<=\d) - (?=\d)"), lambda m: " to "),
    (re.compile(r"(?<=\d)!(?=\s?[=+*/])"), lambda m: " factorial"),
    (
        re.compile(rf"{_ALONE}(\d{{1,9}}(?:\.\d{{1,9}})?)[eE]([+-]?)(\d{{1,3}}){_ENDS}"),
        lambda m: f"{m[1]} times 10 to the power of {'minus ' if m[2] == '-' else ''}{m[3]}",
    ),
    (
        re.compile(r"(?<![\w:.])(\d{1,6}):(\d{1,6})(?=\s(?:ratio|odds|scale|mix|mixture|split)\b)"),
        lambda m: f"{m[1]} to {m[2]}",
    ),
    (re.compile(r"\b((?:ratio|odds|scale) of \d{1,6}):(?=\d)"), lambda m: f"{m[1]} to "),
    (re.compile(r"(?<=\w) < (?=\w)"), lambda m: " is less than "),
    (re.compile(r"(?<=\w) > (?=\w)"), lambda m: " is greater than "),
    (re.compile(r"(?<![\d-])50-50(?![\d-])"), lambda m: "50 50"),
    (re.compile(r"(\d\u00b0[CF]?)\s?-(?=\d)"), lambda m: f"{m[1]} to "),
    (
        re.compile(rf"{_ALONE}(\d{{1,9}}\.\d{{1,9}})-(?=\d{{1,9}}\.\d{{1,9}}(?![\w.-]))"),
        lambda m: f"{m[1]} to ",
    ),
    (
        re.compile(r"(\d\s?(?:mm|cm|m|km|in|ft)\.?)\s?[x\u00d7]\s?(?=\d)"),
        lambda m: f"{m[1]} by ",
    ),
    (re.compile(r"\bPh\.?D\b(?:\.(?=[,;:)]|\s+[a-z]))?(?=[\s.,;:)]|$)"), lambda m: "P H D"),
    (re.compile(r"(\d)\s+%"), lambda m: f"{m[1]}%"),
    (re.compile(rf"(\d%?)-(?={_NUMBER}%)"), lambda m: f"{m[1]} to "),
    (re.compile(r"(?<![\w+])\+(?=[$\u00a3\u20ac]?\d)"), lambda m: "plus "),
    (re.compile(r"(\d)\+(?![\w+])"), lambda m: f"{m[1]} plus"),
    (re.compile(r"(\d/\d+)(?:rd|th|nd)s?\b"), lambda m: m[1]),
    (re.compile("\u2044"), lambda m: "/"),
    (re.compile(rf"(?:(?<!\d)(\d+)\s?)?([{_FRACTIONS}])"), _fraction),
    (
        re.compile(r"(\d)\s?(sq|cu)\.?\s?(ft|in|mi|yd|mm|cm|km|m)\b(?:\.(?=\s+[a-z\d]|[,;:]))?"),
        lambda m: f"{m[1]} {m[3]}" + ("\u00b2" if m[2] == "sq" else "\u00b3"),
    ),
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
        re.compile(rf"(?<![A-Za-z])({_names(_OTHER_MONEY)})\s?({_NUMBER})(?:([kKmMbBtT])n?\b)?"),
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
        re.compile(rf"(?<!\d)(?<!\d\s)\b({_names(_COUNTED)})\.[^\S\n]*(?=\d)", re.I),
        lambda m: _any_case(_COUNTED, m[1]) + " ",
    ),
    (re.compile(r"([A-Z][a-z]+ )Dr\.(?=,|\s+[a-z]|\s*$)"), lambda m: f"{m[1]}Drive"),
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
_REST = [
    (re.compile(r"\bkm/h\b"), lambda m: "kilometers per hour"),
    (re.compile(r"\bm/s\b"), lambda m: "meters per second"),
    (re.compile(r"(?<=\w)\s?/\s?(?=\w)"), lambda m: " slash "),
    (re.compile(r"(?<=[^\W_])_{1,9}(?=[^\W_])"), lambda m: " underscore "),
    (re.compile(r"(?<=[\w:])\\(?=\w)"), lambda m: " backslash "),
    (re.compile(r"(?<=\w)\u00b7(?=\w)"), lambda m: ""),
]
"""Signs that are still there when all numbers are words."""
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
_OH = re.compile(r"\bo(?= [a-z])")
"""wetext's zero in times, 3:05."""


_UNREAD = "#%&*/@\\_{}\u00b6\u00b7\u2020\u2021\u2022\u2023\u2032\u2033\u203b\u2043"


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


def remove_signs(text: str, signs: Iterable[str]) -> str:
    """The text without these signs, and without lines that have nothing else; unchanged if it is of
    another script, of which no rule reads the signs."""
    if any(map(_is_foreign, text)):
        return text
    any_of = "[" + re.escape("".join(signs)) + "]"
    text = re.sub(rf"\n[^\S\n]*{any_of}(?:{any_of}|[^\S\n])*(?=\n)", "", text)
    text = re.sub(rf"[^\S\n]?{any_of}+(?=[\s.,;:!?)]|$)", "", text)
    return re.sub(rf"{any_of}+[^\S\n]?", " ", text).strip()


@lru_cache(maxsize=65_536)
def normalize(text: str) -> str:
    """English text with numbers, abbreviations and signs in words; no other word is changed.
    Idempotent.

    Dates with slashes have the month first (5/6/2020 is May 6), dates with dots the day.

    Raises:
        ValueError: wetext is not installed.
    """
    if not text.isascii() and any(map(_is_foreign, text)):
        named = _GREEK.sub(_greek_name, text)
        if not re.search("[A-Za-z]", text) or any(map(_is_foreign, named)):
            return text
        text = named
    for _ in range(MOST_PASSES):
        before, text = text, _spell_out(text)
        if text == before:
            break
    for pattern, spell in _REST:
        text = pattern.sub(spell, text)
    return text


def _greek_name(match: re.Match[str]) -> str:
    before = " " if match.string[max(0, match.start() - 1) : match.start()].isdigit() else ""
    return before + unicodedata.name(match[0]).split()[-1].lower()


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
    made = _MONTH_OF_DATE.sub(lambda m: m[0].capitalize(), made)
    if not _OH.search(text):
        made = _OH.sub("oh", made)
    words = made.split(" ")
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


IPA = frozenset("\u02c8\u02cc\u02d0\u0259\u026a\u028a\u025b\u0254\u028c\u0251\u0283\u0292\u014b")
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
    if not IPA.isdisjoint(text) or not any(letter.isalnum() for letter in text):
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
