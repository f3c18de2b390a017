"""Markup of texts for TTS: pauses and pronunciations.

    Wait. <break time="0.5s"/> [Nguyen](win) is here.

A break becomes a blank line with its own pause, `[word](respelling)` the respelling. A lexicon
gives respellings of words wherever they occur. Other tags, such as those of SSML, are removed.
Markdown (emphasis, headings, lists, code) and character references such as `&amp;` are read, too.
"""

import html
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from codec.json_lines import decode_utf8
from codec.transcripts import has_words
from slm.tokenization.text_normalization import IPA, clean_text

LONGEST_BREAK = 10.0
"""Maximum pause of a break, in seconds."""
_STRENGTHS = {
    **{"none": 0.0, "x-weak": 0.1, "weak": 0.2, "medium": 0.4, "strong": 0.8, "x-strong": 1.2},
}
"""Seconds by the attribute `strength`."""
_BREAK = re.compile(r"<break\b([^<>]*)>(?:\s{0,9}</break>)?", re.I)
_ATTRIBUTE = re.compile(r"(time|strength)\s*=\s*[\"']?([^\"'\s/>]+)", re.I)
_TIME = re.compile(r"(\d{1,6}(?:\.\d{1,6})?|\.\d{1,6})(m?s)", re.I)
_TAG = re.compile(r"<(?:/?([A-Za-z][\w:-]*)(?:\s[^<>]*|/)?|([!?])[^<>]*)>")
_PARAGRAPH_TAGS = {"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "table"}
_LINE_TAGS = {"br", "li", "tr", "td", "th", "hr", "s"}
_REFERENCE = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]\w{1,31});")
_HEADING_OR_ITEM = re.compile(
    r"^[^\S\n]{0,9}(?:#{1,6}|[*+\u2022\u2023\u25aa\u25cf\u25e6\u2043\u00b7-])[^\S\n]{1,9}"
    r"(?=[^\s])([^\n]*)",
    re.M,
)
_CODE = re.compile(r"(?<!`)(`{1,3})(?=[^\s`])([^`\n]{1,400})(?<=\S)\1(?!`)")
_EMPHASIS = re.compile(r"(?<![\w*_])(\*{1,3}|_{1,3})(?=[^\s*_])([^*_\n]{1,400})(?<=\S)\1(?![\w*_])")
_PHONETIC = re.compile(r"(?<![\w/])/([^\s/][^/\n]{0,80})/(?![\w/])")
_MARKS = re.compile(
    r"[<&*_`#/\u2022\u2023\u25aa\u25cf\u25e6\u2043]|\]\(|^[^\S\n]{0,9}[+\u00b7-]\s", re.M
)
PARAGRAPH = re.compile(r"\n\s*\n")
"""Blank lines between two paragraphs."""
_PRONUNCIATION = re.compile(r"\[([^\[\]\n]+)\]\(([^()\[\]\n]+)\)")
_LINK = re.compile(r"[A-Za-z]{1,20}://|www\.|mailto:|[#/]")


class MarkedText(NamedTuple):
    """A text without its markup."""

    text: str
    """Paragraphs and breaks are separated by blank lines."""
    pauses: tuple[float | None, ...]
    """Seconds of the pause at each blank line; None: that of a paragraph."""
    removed: tuple[str, ...]
    """Names of other tags, sorted."""
    respelled: bool = False
    """Whether words are respelled."""


def read_markup(text: str, lexicon: Mapping[str, str] | None = None) -> MarkedText:
    """The text with respellings, its breaks, and the names of tags that were removed.

    Breaks before the first and after the last word are removed, too. The target of a link in
    Markdown, `[word](https://...)`, is no respelling and is removed.

    Args:
        lexicon: respellings of words, in lower case.

    Raises:
        ValueError: a break whose time is no time.
    """
    marked = lexicon or _MARKS.search(text) or PARAGRAPH.search(text)
    if not marked:
        return MarkedText(text, (), ())
    removed: set[str] = set()
    parts: list[str] = []
    pauses: list[float | None] = []
    pause: float | None = None
    respelled = False
    for number, found in enumerate(_BREAK.split(text)):
        if number % 2:
            pause = (pause or 0.0) + _seconds(found)
            continue
        removed.update((name or sign).lower() for name, sign in _TAG.findall(found))
        found = _REFERENCE.sub(lambda m: html.unescape(m[0]), _TAG.sub(_space_of, found))
        for paragraph in PARAGRAPH.split(_plain(clean_text(found))):
            part = _respelled(paragraph, lexicon or {}).strip()
            respelled |= part != paragraph.strip()
            if not part:
                continue
            if parts and has_words(part) and has_words(parts[-1]):
                parts.append(part)
                pauses.append(pause)
            else:
                # A part without words, such as ***, belongs to the part before it.
                parts[-1:] = [" ".join([*parts[-1:], part])]
            pause = None
    return MarkedText("\n\n".join(parts), tuple(pauses), tuple(sorted(removed)), respelled)


def _space_of(tag: re.Match[str]) -> str:
    """What separates the words around a tag."""
    name = (tag[1] or "").lower()
    if name in _PARAGRAPH_TAGS:
        return "\n\n"
    joins = tag.string[max(0, tag.start() - 1) : tag.start()].strip()
    return " " if joins and name in _LINE_TAGS else ""


def _plain(text: str) -> str:
    """Without Markdown and the slashes around phonemes; headings and list items end a sentence."""
    text = _HEADING_OR_ITEM.sub(lambda m: _sentence(m[1]), text)
    text = _CODE.sub(lambda m: m[2], text)
    for _ in range(2):  # Emphasis in emphasis.
        text = _EMPHASIS.sub(lambda m: m[2], text)
    return _PHONETIC.sub(lambda m: m[0] if IPA.isdisjoint(m[1]) else m[1], text)


def _sentence(line: str) -> str:
    line = line.rstrip()
    return line if line.endswith((".", ",", ";", ":", "!", "?")) else line + "."


def _seconds(attributes: str) -> float:
    found = {name.lower(): value for name, value in _ATTRIBUTE.findall(attributes)}
    if "time" not in found:
        strength = found.get("strength", "medium").lower()
        if strength not in _STRENGTHS:
            raise ValueError(f"break strength {strength!r}: give one of {', '.join(_STRENGTHS)}")
        return _STRENGTHS[strength]
    match = _TIME.fullmatch(found["time"])
    seconds = float(match[1]) / (1000 if match[2].lower() == "ms" else 1) if match else None
    if seconds is None or seconds > LONGEST_BREAK:
        raise ValueError(
            f"break time {found['time']!r}: give seconds or milliseconds, such as 0.5s or 500ms, "
            f"up to {LONGEST_BREAK:g}s"
        )
    return seconds


def _respelled(text: str, lexicon: Mapping[str, str]) -> str:
    plain = _PRONUNCIATION.split(text)
    parts = [_looked_up(plain[0], lexicon)]
    for word, respelling, after in zip(plain[1::3], plain[2::3], plain[3::3], strict=True):
        parts += [word if _LINK.match(respelling) else respelling, _looked_up(after, lexicon)]
    return "".join(parts)


def _looked_up(text: str, lexicon: Mapping[str, str]) -> str:
    if not lexicon:
        return text
    return _any_of(tuple(lexicon)).sub(lambda m: lexicon[m[0].lower()], text)


@lru_cache(maxsize=8)
def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.I)


def load_lexicon(path: str | Path) -> dict[str, str]:
    """Respellings by word in lower case, from a file of lines `word<TAB>respelling`.

    Blank lines and lines that begin with # are skipped.

    Raises:
        ValueError: no such file, not UTF-8, or a line of another form.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: no lexicon that can be read ({error.strerror})") from error
    lexicon = {}
    for number, line in enumerate(decode_utf8(content, path).split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        word, _, respelling = line.partition("\t")
        if not word.strip() or not has_words(respelling):
            raise ValueError(f"{path}, line {number}: give a word, a tab and its respelling")
        lexicon[word.strip().lower()] = respelling.strip()
    return lexicon
