"""Evaluation items for zero-shot TTS: texts and prompts from the rows of a dev token shard.

Two lists, as in VALL-E (arXiv 2301.02111, section 5): `continuation` (an item's own text, from its
first seconds on) and `cross` (an item's text with another recording of its speaker as the prompt;
where the speaker has no other, the item's beginning is the prompt for another item's text).
"""

import json
import logging
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from codec.audio import resample_wave
from codec.distillation.word_alignment import Transcriber, load_transcriber
from codec.io import sha256_of
from codec.tokens import TokenRow, TokenShard
from codec.transcripts import has_words
from eval.text import character_errors, whisper_normalize
from recipes.scoring.judges import Judges
from slm.data.prompts import Prompt
from slm.voice import Voice

logger = logging.getLogger(__name__)

TOLERANCE = 1 / 3
"""Relative difference from the wanted length within which a recording is a prompt uncut."""
PAUSE_SECONDS = 0.1
"""Length of the window whose energy is minimal where a prompt ends; longer than the closure of a
plosive."""


class EvalItem(NamedTuple):
    """A text to synthesize, and its prompt."""

    id: str
    text: str
    prompt: Prompt
    speaker: str = ""
    """Of the prompt."""
    prompt_id: str = ""
    """Recording that the prompt is, or is the beginning of."""
    remainder: Int[np.ndarray, "Q T"] | None = None
    """Codes of that recording after the prompt."""
    source_id: str = ""
    """Row of the shard; repetitions of an item share it and differ in `id`."""


class PromptCutter:
    """Truncates recordings to prompts, with the transcript of what remains."""

    def __init__(
        self, voice: Voice, judges: Judges, seconds: float, aligner: Transcriber | None = None
    ):
        """
        Args:
            seconds: wanted length of a prompt.
            aligner: gives word times, so that a prompt ends between two words. None: it ends at a
                pause, and its words are those that the judge's transcript of it matches best, or,
                without a judge, a proportional share.
        """
        self._voice, self._judges, self._aligner = voice, judges, aligner
        self.seconds = seconds

    def cut(self, row: TokenRow, *, always: bool = False) -> tuple[Prompt, Int[np.ndarray, "Q T"]]:
        """Returns a prompt of about `seconds`, and the codes after it.

        A recording within TOLERANCE of that length is not truncated, unless `always` is set; then
        the prompt is at most half of it.
        """
        codes = codes_of(row)
        if not always and row.duration <= (1 + TOLERANCE) * self.seconds:
            return Prompt(codes=codes, text=row.text), codes[:, :0]
        seconds = min(self.seconds, row.duration / 2)
        wave, rate = self._voice.decode(codes[:, :0], codes), self._voice.codec.sample_rate
        words = row.text.split()
        if self._aligner is not None and len(words) > 1:
            resampled = resample_wave(wave, rate, self._aligner.sample_rate)
            (times,) = self._aligner.words(
                torch.from_numpy(resampled)[None, None], texts=[row.text]
            )
            gaps = [(before.end + after.start) / 2 for before, after in pairwise(times)]
            best = min(range(len(gaps)), key=lambda index: abs(gaps[index] - seconds))
            end, count = gaps[best], best + 1
        else:
            end = quietest_point(wave, rate, seconds * (1 - TOLERANCE), seconds * (1 + TOLERANCE))
            if self._judges.transcribe is not None:
                hypothesis = self._judges.transcribe(wave[: round(end * rate)], rate)
                count = count_prefix_words(words, hypothesis)
            else:
                count = max(1, round(end / row.duration * len(words)))
        frames = min(max(1, round(end * self._voice.codec.frame_rate)), codes.shape[1])
        return Prompt(codes=codes[:, :frames], text=" ".join(words[:count])), codes[:, frames:]


def quietest_point(
    wave: Float[np.ndarray, " S"], sample_rate: int, low: float, high: float
) -> float:
    """Returns the second within [low, high] around which the mean power is minimal."""
    half = max(1, round(PAUSE_SECONDS * sample_rate / 2))
    power = np.concatenate([[0.0], np.cumsum(np.square(wave, dtype=np.float64))])
    first, last = round(low * sample_rate), round(high * sample_rate)
    middles = np.arange(first, max(first, last) + 1)
    ends = np.minimum(middles + half, len(wave))
    starts = np.maximum(middles - half, 0)
    mean = (power[ends] - power[np.minimum(starts, ends)]) / np.maximum(1, ends - starts)
    # The middle one of equal minima, not the first.
    minima = np.flatnonzero(mean <= mean.min() + 1e-12)
    return float(middles[minima[len(minima) // 2]] / sample_rate)


def count_prefix_words(words: Sequence[str], hypothesis: str) -> int:
    """Returns the number of leading words (at least 1) with the fewest character errors against a
    transcript of the beginning."""
    longest = min(len(words), len(hypothesis.split()) + 3)
    errors = [
        character_errors(" ".join(words[:count]), hypothesis).num_errors
        for count in range(1, longest + 1)
    ]
    return 1 + int(np.argmin(errors))


def select_items(
    shard: TokenShard, count: int, exclude: Collection[str] = (), language: str = "en"
) -> list[TokenRow]:
    """Returns at most `count` rows with a text, evenly spaced.

    Args:
        exclude: normalized texts to leave out (the training set's), unless no other is left.

    Raises:
        ValueError: no row has a text.
    """
    usable = [
        index
        for index, text in enumerate(shard.texts)
        if has_words(text) and shard.num_frames[index] > 1
    ]
    if not usable:
        raise ValueError(f"{shard.files[0].parent}: no dev item has a text; export others")
    new = [
        index
        for index in usable
        if not exclude or whisper_normalize(shard.texts[index], language) not in exclude
    ]
    if not new:
        logger.warning("all texts of %s are in the training set", shard.files[0].parent)
    usable = new or usable
    picks = np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int)
    return [shard[usable[i]] for i in dict.fromkeys(picks.tolist())]


def normalized_texts(shard: TokenShard, language: str = "en") -> set[str]:
    """Returns the distinct texts of a shard, normalized."""
    return {whisper_normalize(text, language) for text in set(shard.texts)}


def list_name(name: str, items: Sequence[EvalItem] | Sequence[TokenRow]) -> str:
    """Returns the name with a digest of the items' ids and texts, which differs between shards."""
    return f"{name}@{sha256_of(json.dumps([[item.id, item.text] for item in items]), 8)}"


def eval_lists(
    rows: Sequence[TokenRow], shard: TokenShard, voice: Voice, judges: Judges, seconds: float,
    aligner: str | None = None,
) -> dict[str, list[EvalItem]]:  # fmt: skip
    """Returns the lists `continuation` and `cross`, without empty ones.

    Args:
        seconds: length of a prompt.
        aligner: hub id or folder of the model that gives word times (`PromptCutter`).
    """
    transcriber = load_transcriber(aligner) if aligner is not None else None
    cutter = PromptCutter(voice, judges, seconds, transcriber)
    lists = {
        "continuation": continuation_items(rows, seconds, voice.codec.frame_rate),
        "cross": cross_items(rows, shard, cutter),
    }
    for name in [name for name, items in lists.items() if not items]:
        logger.warning("no dev item is suitable for the list %s", name)
        del lists[name]
    return lists


def continuation_items(
    rows: Sequence[TokenRow], seconds: float, frame_rate: float
) -> list[EvalItem]:
    """Returns each row's own text, with its first `seconds`, at most half of it, as the prompt."""
    items = []
    for row in rows:
        codes = codes_of(row)
        frames = max(1, min(round(seconds * frame_rate), row.num_frames // 2))
        prompt = Prompt(codes=codes[:, :frames], text="", continuation=True)
        items.append(
            EvalItem(row.id, row.text, prompt, row.speaker, row.id, codes[:, frames:], row.id)
        )
    return items


def cross_items(
    rows: Sequence[TokenRow], shard: TokenShard, cutter: PromptCutter
) -> list[EvalItem]:
    """Returns each row's text with another recording of its speaker as the prompt; see the module's
    docstring for speakers of one recording."""
    items = []
    for place, row in enumerate(rows):
        others = [
            index
            for index, speaker in enumerate(shard.speakers)
            if speaker and speaker == row.speaker and shard.ids[index] != row.id
            and has_words(shard.texts[index]) and shard.num_frames[index] > 0
        ]  # fmt: skip
        if others:
            source, text = shard[nearest_in_length(shard, others, cutter.seconds)], row.text
            prompt, remainder = cutter.cut(source)
        else:
            following = [*rows[place + 1 :], *rows[:place]]
            text = next((other.text for other in following if other.text != row.text), None)
            if text is None:
                continue
            source = row
            prompt, remainder = cutter.cut(row, always=True)
        items.append(EvalItem(row.id, text, prompt, source.speaker, source.id, remainder, row.id))
    return items


def nearest_in_length(shard: TokenShard, indices: Sequence[int], seconds: float) -> int:
    """Returns the index of the recording nearest to `seconds`; one that is too short only if all
    are."""

    def distance(index: int) -> tuple[bool, float]:
        duration = float(shard.durations[index])
        return duration < (1 - TOLERANCE) * seconds, abs(duration - seconds)

    return min(indices, key=distance)


def codes_of(row: TokenRow) -> Int[np.ndarray, "Q T"]:
    """Returns a row's codes as int64."""
    return row.codes.astype(np.int64)
