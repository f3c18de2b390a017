"""Speech word by word: each word's text stands right before its codes.

After ELLA-V (arXiv 2401.07333, section 3), which interleaves phonemes and codes: which word comes
next is told, not learned, so that none is left out, said twice or in another's place. The whole
text still comes first, for how a word sounds depends on its neighbours.

Training needs to know where each word is said: frames between words, by utterance id, in the files
of recipes/make_clips.py (edges.jsonl.gz). A text whose edges are not known counts as one word.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int

from codec.io import atomic_file
from slm.data.sequences import (
    ForcedTokens,
    Layout,
    Stretch,
    Word,
    heard_in_stretches,
    in_small_letters,
    interleaved,
    stretch_lead,
    word_lead,
)
from slm.tokenization.tokenizer import SpeechTextTokenizer

Edges = Mapping[str, Sequence[int]]
"""Frames between which the words of `text.split()` are said, by the id of their utterance: one more
than words, from 0 to the last frame's end."""

PLAIN_SHARE = 0.5
"""Of the utterances: these have no prompt in training."""
LONGEST_PROMPT = 0.6
"""Share of an utterance's words that can be its prompt in training."""
PAUSE_SECONDS, LETTER_SECONDS = 0.8, 0.16
"""A word with the pause behind it is cut where it takes longer: so much, and for each letter."""

STRETCH_SECONDS = 0.8
"""Of speech that is heard before words are written."""
DELAY_SECONDS = 0.16
"""A word is written when this much has been heard behind it."""
MOST_WRITTEN = 64
"""Tokens of text behind a stretch."""


def write_edges(path: str | Path, edges: Iterable[tuple[str, Sequence[int]]]) -> None:
    with atomic_file(Path(path)) as temporary, gzip.open(temporary, "wt") as file:
        file.writelines(
            json.dumps({"id": name, "edges": list(map(int, one))}) + "\n" for name, one in edges
        )


def read_edges(paths: Sequence[str | Path]) -> dict[str, list[int]]:
    """Of all files. Raises ValueError for one that is missing or damaged."""
    found: dict[str, list[int]] = {}
    for path in map(Path, paths):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                for line in file:
                    record = json.loads(line)
                    found[record["id"]] = list(map(int, record["edges"]))
        except (OSError, EOFError, KeyError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(
                f"{path}: missing or damaged ({type(error).__name__}: {error}); "
                "recipes/make_clips.py makes such files"
            ) from error
    return found


def spelt_words(tokenizer: SpeechTextTokenizer, text: str) -> list[str]:
    """The words of a text as they are spoken, one for each of `text.split()`."""
    words, whole = text.split(), tokenizer.spelt(text).split()
    return whole if len(whole) == len(words) else [tokenizer.spelt(word) for word in words]


def edges_fit(edges: Sequence[int] | None, num_words: int, num_frames: int) -> bool:
    """Whether these are the edges of so many words in so many frames."""
    return edges is not None and len(edges) == num_words + 1 and edges[-1] == num_frames


def word_ids(tokenizer: SpeechTextTokenizer, words: Sequence[str]) -> list[list[int]]:
    """The ids of words that are spelt already."""
    return tokenizer.text_ids("tts", words)


def script_of(
    tokenizer: SpeechTextTokenizer, words: Sequence[str]
) -> tuple[list[int], ForcedTokens]:
    """What an AR is given to say words one by one: what comes behind the prompt, before the first
    word, and all else. `words` are spelt."""
    vocabulary, rate = tokenizer.vocabulary, tokenizer.vocabulary.codec.frame_rate
    leads = [word_lead(vocabulary, ids) for ids in word_ids(tokenizer, words)]
    most = tuple(round(rate * (PAUSE_SECONDS + LETTER_SECONDS * len(word))) for word in words)
    return [vocabulary.speech_end, *leads[0]], ForcedTokens(tuple(leads[1:]), most, least=1)


def stretches_of(
    tokenizer: SpeechTextTokenizer, codes: Int[np.ndarray, " T"]
) -> tuple[list[int], ForcedTokens]:
    """What an AR is given to hear speech stretch by stretch: what comes before the first words, and
    all else."""
    vocabulary = tokenizer.vocabulary
    parts = [
        tokenizer.speech_ids("asr", codes[start:stop])
        for start, stop in pairwise(_bounds(len(codes), vocabulary.codec.frame_rate))
    ]
    last = len(parts) - 1
    leads = [stretch_lead(vocabulary, one, number == last) for number, one in enumerate(parts)]
    return leads[0], ForcedTokens(tuple(leads[1:]), (MOST_WRITTEN,) * len(leads))


def _bounds(num_frames: int, frame_rate: float) -> list[int]:
    """Frames between stretches."""
    size = max(1, round(STRETCH_SECONDS * frame_rate))
    count = max(1, round(num_frames / size))
    return [*range(0, size * count, size), num_frames]


def hearing_layout(
    tokenizer: SpeechTextTokenizer,
    text: str,
    codes: Int[np.ndarray, " T"],
    edges: Sequence[int] | None,
) -> Layout:
    """An utterance stretch by stretch, each followed by the words that have been over for
    DELAY_SECONDS; the last by all the others. Each word has a space behind it."""
    vocabulary, words = tokenizer.vocabulary, in_small_letters(text).split()
    rate = vocabulary.codec.frame_rate
    bounds = _bounds(len(codes), rate)
    if edges is None or not edges_fit(edges, len(words), len(codes)):
        bounds, edges = [0, len(codes)], [len(codes)] * (len(words) + 1)
    over = np.array(edges[1:]) + round(DELAY_SECONDS * rate)
    said = [int((over <= stop).sum()) for stop in bounds[1:-1]] + [len(words)]
    texts = [
        "".join(f"{word} " for word in words[first:last]) for first, last in pairwise([0, *said])
    ]
    ids = tokenizer.text_ids("asr", texts)
    parts = [tokenizer.speech_ids("asr", codes[start:stop]) for start, stop in pairwise(bounds)]
    return heard_in_stretches(
        vocabulary, [Stretch(speech, text) for speech, text in zip(parts, ids, strict=True)]
    )


def speaking_layout(
    tokenizer: SpeechTextTokenizer,
    text: str,
    codes: Int[np.ndarray, " T"],
    edges: Sequence[int] | None,
    random: np.random.Generator,
) -> Layout:
    """An utterance word by word, behind a prompt of its first words or none, by chance."""
    vocabulary = tokenizer.vocabulary
    spelt = spelt_words(tokenizer, text)
    if edges is None or not edges_fit(edges, len(spelt), len(codes)):
        spelt, edges = [tokenizer.spelt(text)], [0, len(codes)]
    first = 0
    most = int(len(spelt) * LONGEST_PROMPT)
    if random.random() >= PLAIN_SHARE and most:
        first = int(random.integers(1, most + 1))
    (whole,) = tokenizer.text_ids("tts", [text])
    ids = word_ids(tokenizer, spelt[first:])
    spans = list(pairwise(edges))[first:]
    said = [tokenizer.speech_ids("tts", codes[start:stop]) for start, stop in spans]
    words = [Word(text, speech) for text, speech in zip(ids, said, strict=True)]
    prompt = tokenizer.speech_ids("tts", codes[: edges[first]])
    return interleaved(vocabulary, whole, prompt, words)
