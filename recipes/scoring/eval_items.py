"""What a voice is asked to say, and whose voice it takes on: lines from the rows of a dev shard.

`cross`: an item's text after another recording of its speaker; where the speaker has no other,
the beginning of the item lends the voice to another item's text. `continuation`: an item's own text
from codec.io import sha256_of
from its beginning on.
"""

import json
import logging
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from codec.io import sha256_of
from codec.tokens import TokenRow, TokenShard
from eval.text import character_errors, normalize
from recipes.scoring.judges import Judges
from slm.data.sequences import Prompt, has_words
from slm.voice import Voice

logger = logging.getLogger(__name__)

SPARE = 1 / 3
"""A recording that differs from the wanted length by this share is a prompt as it is."""
PAUSE_SECONDS = 0.1
"""The quietest stretch of this length is where a prompt is cut; a plosive's closure is shorter."""


class Line(NamedTuple):
    """Something to say."""

    id: str
    text: str
    prompt: Prompt
    speaker: str = ""
    """Who lends the voice."""
    prompt_id: str = ""
    """Of which recording the prompt is the whole or the beginning."""
    rest: np.ndarray | None = None
    """Codes (Q, T) of that recording behind the prompt."""
    item: str = ""
    """The item that the line is about; `id` tells its repetitions apart."""


class Cutter:
    """Cuts the beginning of a recording off, at a pause, and says which words it holds."""

    def __init__(self, voice: Voice, judges: Judges, seconds: float, aligner: Any = None):
        """`aligner` (codec.words.Transcriber) tells the times of the words; without it the judge
        hears the beginning; without either the text is shared out evenly."""
        self._voice, self._judges, self._aligner = voice, judges, aligner
        self.seconds = seconds

    def prompt(self, row: TokenRow, *, always: bool = False) -> tuple[Prompt, np.ndarray]:
        """A prompt of about `seconds`, and the codes behind it. What is but a little longer is left
        whole, unless it must be cut (`always`): then at most half of it is taken."""
        codes = codes_of(row)
        if not always and row.duration <= (1 + SPARE) * self.seconds:
            return Prompt(codes=codes, text=row.text), codes[:, :0]
        seconds = min(self.seconds, row.duration / 2)
        wave = self._voice.decode(codes[:, :0], codes)
        words = row.text.split()
        if self._aligner is not None and len(words) > 1:
            end, count = self._word_end(wave, row.text, seconds)
        else:
            rate = self._voice.codec.sample_rate
            end = quietest(wave, rate, seconds * (1 - SPARE), seconds * (1 + SPARE))
            count = self._num_words(wave[: round(end * rate)], words, end / row.duration)
        frames = min(max(1, round(end * self._voice.codec.frame_rate)), codes.shape[1])
        return Prompt(codes=codes[:, :frames], text=" ".join(words[:count])), codes[:, frames:]

    def _word_end(self, wave: np.ndarray, text: str, seconds: float) -> tuple[float, int]:
        """Where the gap of two words is the nearest to `seconds`, and how many words lie before."""
        from codec.audio import resample

        heard = resample(wave, self._voice.codec.sample_rate, self._aligner.sample_rate)
        (times,) = self._aligner.words(torch.from_numpy(heard)[None, None], texts=[text])
        gaps = [(one.end + two.start) / 2 for one, two in pairwise(times)]
        best = min(range(len(gaps)), key=lambda index: abs(gaps[index] - seconds))
        return gaps[best], best + 1

    def _num_words(self, wave: np.ndarray, words: Sequence[str], share: float) -> int:
        if not self._judges.judge_name:
            return max(1, round(share * len(words)))
        return num_begun(words, self._judges.transcribe(wave, self._voice.codec.sample_rate))


def quietest(wave: np.ndarray, rate: int, least: float, most: float) -> float:
    """The second between `least` and `most` around which it is the quietest."""
    half = max(1, round(PAUSE_SECONDS * rate / 2))
    power = np.concatenate([[0.0], np.cumsum(np.square(wave, dtype=np.float64))])
    middles = np.arange(round(least * rate), max(round(least * rate), round(most * rate)) + 1)
    ends = np.minimum(middles + half, len(wave))
    starts = np.maximum(middles - half, 0)
    mean = (power[ends] - power[np.minimum(starts, ends)]) / np.maximum(1, ends - starts)
    # Among equals the middle one, not the first.
    level = np.flatnonzero(mean <= mean.min() + 1e-12)
    return float(middles[level[len(level) // 2]] / rate)


def num_begun(words: Sequence[str], heard: str) -> int:
    """How many of the first words were heard best; at least one."""
    most = min(len(words), len(heard.split()) + 3)
    # In characters: a word that was misheard still is one that was said.
    errors = [
        character_errors(" ".join(words[:count]), heard).num_errors for count in range(1, most + 1)
    ]
    return 1 + int(np.argmin(errors))


def spread(shard: TokenShard, count: int, known: Collection[str] = ()) -> list[TokenRow]:
    """`count` rows with words, evenly from those whose text is not `known` (normal forms)."""
    usable = [
        index
        for index, text in enumerate(shard.texts)
        if has_words(text) and shard.num_frames[index] > 1
    ]
    if not usable:
        raise ValueError(f"{shard.files[0].parent}: no dev item has a text; export others")
    new = [index for index in usable if not known or normalize(shard.texts[index]) not in known]
    if new:
        usable = new
    else:
        logger.warning("every text of %s was trained on: all are taken", shard.files[0].parent)
    picks = np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int)
    return [shard[usable[i]] for i in dict.fromkeys(picks.tolist())]


def list_name(name: str, lines: Sequence[Line] | Sequence[TokenRow]) -> str:
    """A list's name with a digest of its ids and texts: two shards never pass for one."""
    return f"{name}@{sha256_of(json.dumps([[line.id, line.text] for line in lines]), 8)}"


def continuations(items: Sequence[TokenRow], seconds: float, frame_rate: float) -> list[Line]:
    """Each item's own text from its first `seconds` on, or from its first half."""
    lines = []
    for row in items:
        codes = codes_of(row)
        frames = max(1, min(round(seconds * frame_rate), row.num_frames // 2))
        start = Prompt(codes=codes[:, :frames], text="", continuation=True)
        lines.append(Line(row.id, row.text, start, row.speaker, row.id, codes[:, frames:], row.id))
    return lines


def crosses(items: Sequence[TokenRow], shard: TokenShard, cutter: Cutter) -> list[Line]:
    """Each item's text after another recording of its speaker, or what the module says."""
    lines = []
    for place, row in enumerate(items):
        others = [
            index
            for index, speaker in enumerate(shard.speakers)
            if speaker and speaker == row.speaker and shard.ids[index] != row.id
            and has_words(shard.texts[index]) and shard.num_frames[index] > 0
        ]  # fmt: skip
        if others:
            lender, text = shard[best_prompt(shard, others, cutter.seconds)], row.text
            prompt, rest = cutter.prompt(lender)
        else:
            lender, text = row, _another_text(items, place)
            if text is None:
                continue
            prompt, rest = cutter.prompt(row, always=True)
        lines.append(Line(row.id, text, prompt, lender.speaker, lender.id, rest, row.id))
    return lines


def best_prompt(shard: TokenShard, rows: Sequence[int], seconds: float) -> int:
    """The recording the nearest to `seconds`; a shorter one only if all are."""

    def fitness(index: int) -> tuple[bool, float]:
        seconds_of = float(shard.durations[index])
        return seconds_of < (1 - SPARE) * seconds, abs(seconds_of - seconds)

    return min(rows, key=fitness)


def _another_text(items: Sequence[TokenRow], place: int) -> str | None:
    """The next item's text that differs from this item's."""
    own = items[place].text
    following = [*items[place + 1 :], *items[:place]]
    return next((row.text for row in following if row.text != own), None)


def codes_of(row: TokenRow) -> np.ndarray:
    """(Q, T) as models take them."""
    return row.codes.astype(np.int64)
