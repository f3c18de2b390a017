"""Long texts: split into pieces that the model can generate at once, and their waves joined.

A text is split at blank lines. A paragraph that is too long is split at sentence ends; a sentence
that is too long at the sentence ends inside its quotations, then at commas and the like, then
between words, then inside words, behind their signs.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from codec.transcripts import has_words
from slm.config import SamplingConfig
from slm.data.prompts import Prompt
from slm.generation.sampling import BOUNDS_FRAME_RATE
from slm.generation.tts import Models, Speech, Utterance
from slm.tokenization.markup import PARAGRAPH
from slm.tokenization.text_normalization import NormalizedText

PARAGRAPH_PAUSE, SENTENCE_PAUSE, CLAUSE_PAUSE, WORD_PAUSE = 0.8, 0.4, 0.2, 0.05
"""Pause between two pieces, in seconds, by what ends the first one."""
LEAST_SECONDS = 2.0
"""Texts of this length are never split."""
WINDOW_SECONDS = 0.01
"""Window of the level measurement."""
FADE_SECONDS = 0.005
QUIET_SHARE = 0.05
"""A window is quiet below this share of the highest level so far: -26 dB."""

LONGEST_ABBREVIATION = 24
"""Maximum characters that are searched before a full stop."""

_EMPTY = np.zeros(0, np.float32)
_OPENING, _CLOSING = "\"'([{\u201c\u2018\u00ab", "\"')]}\u201d\u2019\u00bb"
_SPACE = re.compile(r"\s+")
_SENTENCE = re.compile(
    rf"(?<![.!?\u2026])[.!?\u2026]++[{re.escape(_CLOSING)}]*(?=\s)|[\u3002\uff01\uff1f]+[{re.escape(_CLOSING)}]*"
)
_CLAUSE = re.compile(rf"[,;:\u2014\u2013][{re.escape(_CLOSING)}]*(?=\s)|[\u3001\uff0c\uff1b\uff1a]")
_IN_WORD = re.compile(r"(?<=\w)(?:[^\w\s'\u2019]+|_+)(?=\w)")
_NEXT = re.compile(rf"\s*[{re.escape(_OPENING)}]*(.)", re.DOTALL)
_QUOTES = '"\u201c\u201d\u00ab\u00bb'
# Words before a full stop that ends no sentence: titles, and words before a number or a name.
# Letters with stops between them are found by a pattern.
_TITLES = "mr mrs ms mx dr prof rev hon st ste mt ft gen col capt cmdr lt maj sgt gov sen rep"
_REFERENCES = "no nos vol vols fig figs eq ch chap sec pp p ed eds vs cf approx ca al etc dept univ"
_NAMES = "sr jr messrs mme mlle fr br supt assn bros co corp inc ltd ave blvd rd"
_DATES = "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri sat sun"
_ABBREVIATIONS = frozenset(f"{_TITLES} {_REFERENCES} {_NAMES} {_DATES}".split())
_INITIALS = re.compile(r"(?:^|[\s(\"'\u201c\u2018.-])[^\W\d_](?:\.[^\W\d_])*$")


class Piece(NamedTuple):
    """A part of a text."""

    text: str
    pause: float
    """Silence behind it, in seconds; 0 behind the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LongText:
    """A text of any length, checked, split and encoded: `Voice.prepare_long` makes it."""

    text: NormalizedText
    utterances: list[Utterance]
    pauses: list[float]
    """Silence behind each utterance, in seconds."""


def join_speeches(long_text: LongText, speeches: Sequence[Speech]) -> Speech:
    """One speech from those of the pieces: waves joined with pauses, codes without them.

    `failure` names the pieces that failed; `score` is the mean.
    """
    if len(speeches) == 1:
        return speeches[0]
    failures = [
        f"{speech.failure} in piece {number} of {len(speeches)}"
        for number, speech in enumerate(speeches, start=1)
        if speech.failure is not None
    ]
    scores = [speech.score for speech in speeches if speech.score is not None]
    pieces = zip(speeches, long_text.pauses, strict=True)
    waves = [([speech.wave], pause) for speech, pause in pieces]
    return replace(
        speeches[0],
        wave=np.concatenate(list(join(waves, speeches[0].sample_rate)) or [_EMPTY]),
        codes=np.concatenate([speech.codes for speech in speeches], axis=1),
        text=long_text.text.original,
        failure="; ".join(failures) or None,
        tries=max(speech.tries for speech in speeches),
        score=sum(scores) / len(scores) if scores else None,
    )


def fits_behind(
    prompt: Prompt, prompt_text: NormalizedText, models: Models, sampling: SamplingConfig
) -> Callable[[NormalizedText], bool]:
    """Whether a text, at the prompt's speaking rate, stays within the longest training utterance
    and the context length.

    Texts of LEAST_SECONDS count as short enough: a prompt that leaves less room is refused later.
    """
    lm = models.lm
    rate, num_prompt = lm.vocabulary.codec.frame_rate, prompt.codes.shape[1]
    low, high = (bound * rate / BOUNDS_FRAME_RATE for bound in sampling.frames_per_token)
    frames_per_token = min(max(num_prompt / max(1, prompt_text.num_tokens), low), high)
    room = max(models.coverage.longest_frames - num_prompt, LEAST_SECONDS * rate)
    num_given = len(lm.tokenizer.speech_ids("tts", prompt.codes[0])) + 2

    def fits(text: NormalizedText) -> bool:
        frames = frames_per_token * text.num_tokens
        num_text = len(lm.tokenizer.joined_ids(prompt_text, text))
        needed = num_text + num_given + lm.format.num_forced(text) + frames
        return frames <= room and needed <= lm.max_positions

    return fits


def split_text(
    text: str, fits: Callable[[str], bool], pauses: Sequence[float | None] = ()
) -> list[Piece]:
    """Pieces that fit, as long as possible within a paragraph. A single word that does not fit is a
    piece, too.

    Args:
        pauses: seconds at each blank line; None and missing: PARAGRAPH_PAUSE.
    """
    pieces: list[Piece] = []
    paragraphs = _units(text.strip(), _paragraph_ends(text.strip()))
    for paragraph, pause in zip_longest(paragraphs, pauses[: len(paragraphs)]):
        parts = _split(paragraph.strip(), fits, 0)
        parts[-1] = (parts[-1][0], PARAGRAPH_PAUSE if pause is None else pause)
        pieces += [Piece(_SPACE.sub(" ", part).strip(), pause) for part, pause in parts]
    return [*pieces[:-1], Piece(pieces[-1].text, 0.0)]


def has_paragraphs(text: str) -> bool:
    """Whether a text has a blank line between its words."""
    return PARAGRAPH.search(text.strip()) is not None


def _split(text: str, fits: Callable[[str], bool], level: int) -> list[tuple[str, float]]:
    """Parts of `text` and the pauses behind them; breaks of `level` and below."""
    if level == len(_LEVELS) or fits(text.strip()):
        return [(text, 0.0)]
    breaks, pause = _LEVELS[level]
    groups: list[str] = []
    for unit in _units(text, breaks(text)):
        if groups and fits((groups[-1] + unit).strip()):
            groups[-1] += unit
        else:
            groups.append(unit)
    pieces: list[tuple[str, float]] = []
    for group in groups:
        inner = _split(group, fits, level + 1)
        pieces += [*inner[:-1], (inner[-1][0], pause)]
    return pieces


def _units(text: str, breaks: Iterable[int]) -> list[str]:
    """The text split at its breaks; a part without words stays with the part before it."""
    units: list[str] = []
    edges = [0, *breaks, len(text)]
    for start, stop in pairwise(edges):
        unit = text[start:stop]
        if units and not (has_words(unit) and has_words(units[-1])):
            units[-1] += unit
        elif unit:
            units.append(unit)
    return units


def _sentence_ends(text: str) -> Iterator[int]:
    """Ends of sentences outside quotations."""
    return _stops(text, quoted=False)


def _quoted_ends(text: str) -> Iterator[int]:
    """Ends of sentences, including those in quotations."""
    return _stops(text, quoted=True)


def _paragraph_ends(text: str) -> Iterator[int]:
    return (match.end() for match in PARAGRAPH.finditer(text))


def _clause_ends(text: str) -> Iterator[int]:
    return (match.end() for match in _CLAUSE.finditer(text))


def _word_ends(text: str) -> Iterator[int]:
    return (match.end() for match in _SPACE.finditer(text))


def _ends_in_words(text: str) -> Iterator[int]:
    return (match.end() for match in _IN_WORD.finditer(text))


_LEVELS: tuple[tuple[Callable[[str], Iterator[int]], float], ...] = (
    (_sentence_ends, SENTENCE_PAUSE),
    (_quoted_ends, SENTENCE_PAUSE),
    (_clause_ends, CLAUSE_PAUSE),
    (_word_ends, WORD_PAUSE),
    (_ends_in_words, WORD_PAUSE),
)


def _stops(text: str, *, quoted: bool) -> Iterator[int]:
    """Ends of sentences; those in a quotation only if `quoted`."""
    read, quotes = 0, dict.fromkeys(_QUOTES, 0)
    for match in _SENTENCE.finditer(text):
        passed = text[read : match.end()]
        read = match.end()
        quotes = {mark: count + passed.count(mark) for mark, count in quotes.items()}
        after = _NEXT.match(text, match.end())
        if after is None or (not quoted and _is_open(quotes)):
            continue
        # As in `"Go!" she cried.`
        if after[1].islower():
            continue
        before = text[max(0, match.start() - LONGEST_ABBREVIATION) : match.start()]
        if match[0][0] == "." and _is_abbreviation(before):
            continue
        yield match.end()


def _is_open(quotes: dict[str, int]) -> bool:
    """Whether a quotation is open after these numbers of quotation marks."""
    pairs = (("\u201c", "\u201d"), ("\u00ab", "\u00bb"))
    return quotes['"'] % 2 == 1 or any(quotes[left] > quotes[right] for left, right in pairs)


def _is_abbreviation(before: str) -> bool:
    """Whether the full stop behind `before` belongs to its last word."""
    if _INITIALS.search(before):
        return True
    words = before.split()
    return bool(words) and words[-1].lstrip(_OPENING).lower() in _ABBREVIATIONS


def join(
    pieces: Sequence[tuple[Iterable[Float[np.ndarray, " _"]], float]], sample_rate: int
) -> Iterator[Float[np.ndarray, " _"]]:
    """Joins waves: (blocks, seconds of pause behind them) of each piece.

    Where two pieces meet, the silence at each edge is trimmed to half the pause, faded, and padded
    with zeros up to the pause. The outer edges, and a single piece, are unchanged. Yields blocks as
    soon as they are final; the result does not depend on the input's block sizes.
    """
    joint = _Joint(sample_rate)
    for number, (blocks, pause) in enumerate(pieces):
        for block in blocks:
            wave = joint.add(block)
            if wave.size:
                yield wave
        wave = joint.end(pause, last=number == len(pieces) - 1)
        if wave.size:
            yield wave


class _Joint:
    """Buffer of samples that are not final yet."""

    def __init__(self, sample_rate: int):
        self._sample_rate = sample_rate
        self._window = max(1, round(WINDOW_SECONDS * sample_rate))
        self._loudest = 0.0
        # The start of the first piece is unchanged.
        self._begun, self._room = True, 0
        self._part = _EMPTY
        """An incomplete window."""
        self._loud = _EMPTY
        """The last loud window, perhaps the last one of the piece."""
        self._quiet: list[np.ndarray] = []
        """Quiet windows behind it."""

    def add(self, block: np.ndarray) -> np.ndarray:
        """Adds a block of the piece; returns the samples that are now final."""
        held = np.concatenate([self._part, block])
        count = len(held) // self._window
        windows = held[: count * self._window].reshape(count, self._window)
        self._part = held[count * self._window :]
        return np.concatenate([_EMPTY, *map(self._take, windows)])

    def end(self, pause: float, *, last: bool) -> np.ndarray:
        """Ends the piece; returns the rest of it and half of the pause behind it."""
        done = self._take(self._part) if self._part.size else _EMPTY
        if not self._begun:  # It had no loud window.
            self._loud, self._quiet = np.zeros(self._room, np.float32), []
        quiet = np.concatenate([_EMPTY, *self._quiet])
        if last:
            return np.concatenate([done, self._loud, quiet])
        room = round(pause * self._sample_rate / 2)
        kept = self._faded(np.concatenate([self._loud, quiet[:room]])[::-1])[::-1]
        filling = np.zeros(max(0, room - len(quiet)), np.float32)
        self._begun, self._room = False, room
        self._part, self._loud, self._quiet = _EMPTY, _EMPTY, []
        return np.concatenate([done, kept, filling])

    def _take(self, window: np.ndarray) -> np.ndarray:
        level = float(np.sqrt(np.mean(np.square(window))))
        self._loudest = max(self._loudest, level)
        if level <= QUIET_SHARE * self._loudest:
            self._quiet.append(window)
            return _EMPTY
        quiet = np.concatenate([_EMPTY, *self._quiet])
        self._quiet = []
        if self._begun:
            done, self._loud = np.concatenate([self._loud, quiet]), window
            return done
        self._begun = True
        kept = quiet[max(0, len(quiet) - self._room) :]
        self._loud = self._faded(np.concatenate([kept, window]))
        return np.zeros(self._room - len(kept), np.float32)

    def _faded(self, wave: np.ndarray) -> np.ndarray:
        """With a linear fade-in."""
        size = min(len(wave), round(FADE_SECONDS * self._sample_rate))
        rise = np.linspace(0.0, 1.0, size, endpoint=False, dtype=np.float32)
        return np.concatenate([wave[:size] * rise, wave[size:]])
