"""Lets a voice go on from recordings without a text, and scores what it adds.

The list is called `textless`: `continuation` is a text's, spoken from its beginning on. There are
no words to compare; what counts is whether the voice stays the prompt's.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from codec import write_audio
from eval.benchmark import Utterance, score_tts
from recipes.lines import Line
from recipes.scoring import safe_name
from recipes.speak import Ears, Made, Spoken
from slm.pipeline import Voice

logger = logging.getLogger(__name__)

TEXTLESS = "textless"


def go_on_lines(voice: Voice, lines: Sequence[Line], ears: Ears, folder: Path, seed: int) -> Spoken:
    """Goes on from each line's prompt, for at most as long as its recording does, under `seed`,
    `seed` + 1, ...; writes FOLDER/textless/ID.wav, prompts included."""
    made = []
    for number, line in enumerate(lines):
        assert line.rest is not None
        seconds = line.rest.shape[1] / voice.codec.frame_rate
        try:
            speech = voice.continue_speech(line.prompt, seconds, seed + number)
        except ValueError as error:
            logger.warning("%s was not gone on with: %s", line.id, error)
            scored = score(voice, line, line.rest[:, :0], ears, "refused")
            made.append(Made(scored, [], None, "refused", 0, None))
            continue
        name = f"{safe_name(line.id)}.wav"
        whole = np.concatenate([line.prompt.codes, speech.codes], axis=1)
        wave = voice.decode(whole[:, :0], whole)
        write_audio(folder / TEXTLESS / name, wave, voice.codec.sample_rate)
        scored = score(voice, line, speech.codes, ears, speech.failure)
        scored = dataclasses.replace(scored, seed=speech.seed)
        made.append(Made(scored, [], name, speech.failure, speech.tries, speech.seed))
    return Spoken(TEXTLESS, list(lines), made)


def rests(voice: Voice, lines: Sequence[Line], ears: Ears) -> Spoken:
    """The ceiling: what the recordings themselves go on with."""
    made = []
    for line in lines:
        assert line.rest is not None
        made.append(Made(score(voice, line, line.rest, ears), [], None, None, 0, None))
    return Spoken(TEXTLESS, list(lines), made)


def score(
    voice: Voice, line: Line, codes: np.ndarray, ears: Ears, failure: str | None = None
) -> Utterance:
    """Failure, seconds and, where there is a speaker encoder, similarities of the new part."""
    rate, judges = voice.codec.sample_rate, ears.judges
    wave = np.zeros(0, np.float32)
    if failure != "empty" and codes.shape[1]:
        wave = voice.decode(line.prompt.codes, codes)
    prompt = (voice.decode(codes[:, :0], line.prompt.codes), rate)
    scored = score_tts(line.id, "", wave, rate, _unheard, judges.embed, prompt, failure)
    values = dict(scored.values)
    if ears.likeness is not None and wave.size:
        values |= ears.likeness.of(line, wave)
    return dataclasses.replace(scored, values=values, words=None, characters=None)


def _unheard(_wave: np.ndarray, _rate: int) -> str:
    return ""
