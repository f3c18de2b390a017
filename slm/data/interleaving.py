"""Interleaved sequences: TTS word by word, ASR by stretches of speech.

    tts   <|text|> prompt text + target text <|speech|> p1 p2 ...
          then for each word <|/speech|> word <|speech|> | s1 s2 ..., and a last <|/speech|>
    asr   for each stretch <|speech|> s1 s2 ... <|text|> | words that have ended eos
          (the speech of the last stretch ends with <|/speech|>)

TTS follows ELLA-V (arXiv 2401.07333, section 3), which interleaves phonemes and codes: the order of
the words is forced, not learned, so that none is omitted, repeated or swapped. The full text comes
first, because pronunciation depends on context. The loss covers what follows each bar: in TTS each
word's codes and the <|/speech|> behind them, in ASR the words and the eos of each stretch.

Training needs word boundaries, in frames, by utterance id: the edges.jsonl.gz of
recipes/make_clips.py. A text without them counts as one word.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from codec.json_lines import read_json_lines, write_json_lines
from codec.program import reason_of
from codec.transcripts import lowercase_if_all_caps
from slm.data.corpus import Corpus, Ragged, name_of
from slm.data.sequences import (
    ASR,
    Context,
    Examples,
    ForcedTokens,
    Layout,
    PlainFormat,
    SequenceFormat,
    tts_context,
)
from slm.tokenization.text_normalization import NormalizedText
from slm.tokenization.tokenizer import SpeechTextTokenizer

logger = logging.getLogger(__name__)

PLAIN_SHARE = 0.5
"""Share of training utterances without a prompt."""
LONGEST_PROMPT = 0.6
"""Maximum share of an utterance's words in its training prompt."""
PAUSE_SECONDS, LETTER_SECONDS = 0.8, 0.16
"""Maximum length of a word: this pause, and this per letter."""

STRETCH_SECONDS = 0.8
"""Length of a stretch of speech in ASR."""
DELAY_SECONDS = 0.16
"""A word is transcribed once the speech continues for this long behind it."""
MAX_STRETCH_TOKENS = 64
"""Maximum text tokens behind a stretch."""


def write_word_boundaries(
    path: str | Path, boundaries: Iterable[tuple[str, Sequence[int]]]
) -> None:
    """Writes an edges.jsonl.gz: (utterance id, word boundaries in frames) of each utterance."""
    write_json_lines(path, ({"id": name, "edges": list(map(int, one))} for name, one in boundaries))


def read_word_boundaries(paths: Sequence[str | Path]) -> dict[str, list[int]]:
    """Word boundaries of all files, by utterance id. Raises ValueError for a damaged file."""
    found: dict[str, list[int]] = {}
    for path in map(Path, paths):
        try:
            for line in read_json_lines(path):
                found[line.value["id"]] = list(map(int, line.value["edges"]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: missing or damaged ({reason_of(error)}); "
                "recipes/make_clips.py makes such files"
            ) from error
    return found


class Segment(NamedTuple):
    """A segment of an interleaved sequence, as ids: forced tokens, then targets."""

    forced: Sequence[int]
    targets: Sequence[int] | np.ndarray


def interleave(context: Sequence[int], segments: Sequence[Segment], end: int) -> Layout:
    """The training sequence of segments behind `context`; `end` follows the targets of each."""
    tokens = list(context)
    forced: list[bool] = []
    for segment in segments:
        tokens += [*segment.forced, *map(int, segment.targets), end]
        forced += [*[True] * len(segment.forced), *[False] * (len(segment.targets) + 1)]
    first = forced.index(False)
    return Layout(np.array(tokens), len(context) + first, np.array(forced[first:]))


def spelled_words(tokenizer: SpeechTextTokenizer, text: NormalizedText) -> list[str]:
    """The TTS form of each word of `text.original.split()`: several words for a number."""
    words, spelled = text.original.split(), text.tts_form.split()
    return spelled if len(spelled) == len(words) else [tokenizer.tts_form(word) for word in words]


def boundaries_fit(boundaries: Sequence[int] | None, num_words: int, num_frames: int) -> bool:
    """Whether these are the boundaries of `num_words` words in `num_frames` frames."""
    return (
        boundaries is not None and len(boundaries) == num_words + 1 and boundaries[-1] == num_frames
    )


class InterleavedFormat:
    """The format of the sequences above (ar.text.interleaved)."""

    asr_tokens_per_second = 12.0
    scores_text = False

    def __init__(self, tokenizer: SpeechTextTokenizer):
        self.tokenizer = tokenizer
        self._rate = tokenizer.vocabulary.codec.frame_rate

    def examples(self, task: int, corpus: Corpus, codes: Ragged, seed: int) -> Examples:
        """Training sequences of `task`, TTS or ASR. Raises ValueError if no item has fitting word
        boundaries."""
        return InterleavedExamples(self, task, corpus, codes, seed)

    def tts_context(
        self,
        prompt_text: NormalizedText,
        text: NormalizedText,
        prompt: Int[np.ndarray, " T"],
        num_prompt_words: Callable[[], int] | None = None,
    ) -> Context:
        """The context of TTS up to the first word, and the other words as forced tokens."""
        tokenizer, vocabulary = self.tokenizer, self.tokenizer.vocabulary
        words = text.words
        if num_prompt_words is not None:
            words = words[min(num_prompt_words(), len(words) - 1) :]
        ids = tokenizer.joined_ids(prompt_text, text)
        context = tts_context(vocabulary, ids, tokenizer.speech_ids("tts", prompt))
        leads = [[*word, vocabulary.speech] for word in tokenizer.tts_ids(words)]
        most = tuple(
            round(self._rate * (PAUSE_SECONDS + LETTER_SECONDS * len(word))) for word in words
        )
        context += [vocabulary.speech_end, *leads[0]]
        return Context(context, ForcedTokens(tuple(leads[1:]), most, least=1))

    def num_forced(self, text: NormalizedText) -> int:
        """Forced tokens of TTS for a text: each word, the end token before it and <|speech|>."""
        return sum(len(ids) + 2 for ids in self.tokenizer.tts_ids(text.words))

    def asr_context(self, codes: Int[np.ndarray, " T"]) -> Context:
        """The first stretch of speech, and the others as forced tokens."""
        leads = self._stretches(codes, self._bounds(len(codes)))
        forced = ForcedTokens(tuple(leads[1:]), (MAX_STRETCH_TOKENS,) * len(leads))
        return Context(leads[0], forced)

    def _bounds(self, num_frames: int) -> list[int]:
        """Frames between stretches."""
        size = max(1, round(STRETCH_SECONDS * self._rate))
        count = max(1, round(num_frames / size))
        return [*range(0, size * count, size), num_frames]

    def _stretches(self, codes: Int[np.ndarray, " T"], bounds: Sequence[int]) -> list[list[int]]:
        """The forced tokens of each stretch."""
        tokenizer, vocabulary = self.tokenizer, self.tokenizer.vocabulary
        leads = [
            [vocabulary.speech, *map(int, tokenizer.speech_ids("asr", codes[start:stop]))]
            for start, stop in pairwise(bounds)
        ]
        leads[-1].append(vocabulary.speech_end)
        return [[*lead, vocabulary.text] for lead in leads]

    def asr_layout(
        self, text: str, codes: Int[np.ndarray, " T"], boundaries: Sequence[int] | None
    ) -> Layout:
        """A training sequence of ASR: behind each stretch the words that have ended for
        DELAY_SECONDS, behind the last all others. A space follows each word."""
        words = lowercase_if_all_caps(text).split()
        bounds = self._bounds(len(codes))
        if boundaries is None or not boundaries_fit(boundaries, len(words), len(codes)):
            bounds, boundaries = [0, len(codes)], [len(codes)] * (len(words) + 1)
        ended = np.array(boundaries[1:]) + round(DELAY_SECONDS * self._rate)
        counts = [int((ended <= stop).sum()) for stop in bounds[1:-1]] + [len(words)]
        texts = [
            "".join(f"{word} " for word in words[first:last])
            for first, last in pairwise([0, *counts])
        ]
        ids = self.tokenizer.text_ids("asr", texts)
        segments = map(Segment, self._stretches(codes, bounds), ids)
        return interleave([], list(segments), self.tokenizer.vocabulary.eos)

    def tts_layout(
        self,
        text: NormalizedText,
        codes: Int[np.ndarray, " T"],
        boundaries: Sequence[int] | None,
        random: np.random.Generator,
    ) -> Layout:
        """A training sequence of TTS; with probability 1 - PLAIN_SHARE its first words are the
        prompt."""
        tokenizer, vocabulary = self.tokenizer, self.tokenizer.vocabulary
        words = spelled_words(tokenizer, text)
        if boundaries is None or not boundaries_fit(boundaries, len(words), len(codes)):
            words, boundaries = [text.tts_form], [0, len(codes)]
        first = 0
        most = int(len(words) * LONGEST_PROMPT)
        if random.random() >= PLAIN_SHARE and most:
            first = int(random.integers(1, most + 1))
        prompt = tokenizer.speech_ids("tts", codes[: boundaries[first]])
        # The end token before a word is the end of the word before it; of the prompt, forced.
        spans = list(pairwise(boundaries))[first:]
        segments = [
            Segment([*ids, vocabulary.speech], tokenizer.speech_ids("tts", codes[start:stop]))
            for ids, (start, stop) in zip(tokenizer.tts_ids(words[first:]), spans, strict=True)
        ]
        context = [*tts_context(vocabulary, text.ids, prompt), vocabulary.speech_end]
        return interleave(context, segments, vocabulary.speech_end)


class InterleavedExamples:
    """The interleaved sequences of a corpus, in memory."""

    def __init__(
        self, form: InterleavedFormat, task: int, corpus: Corpus, codes: Ragged, seed: int
    ):
        layouts, known = [], 0
        for row, text in enumerate(corpus.texts):
            frames, boundaries = codes[row].astype(np.int64), corpus.boundaries_of(row)
            known += boundaries_fit(boundaries, len(text.split()), len(frames))
            if task == ASR:
                layouts.append(form.asr_layout(text, frames, boundaries))
            else:
                random = np.random.default_rng((seed, row, 6))
                normalized = form.tokenizer.normalize(text)
                layouts.append(form.tts_layout(normalized, frames, boundaries, random))
        if not known:
            raise ValueError(
                f"word_boundaries: none are those of {name_of(corpus.shard)}; name the "
                "edges.jsonl.gz that recipes/make_clips.py wrote for these tokens"
            )
        if known < len(layouts):
            logger.warning(
                "%s: %d of %d items have no word boundaries that fit: each is trained as one word "
                "(texts with digits, and boundaries of other tokens)",
                name_of(corpus.shard), len(layouts) - known, len(layouts),
            )  # fmt: skip
        self._tokens = Ragged(one.tokens for one in layouts)
        self._forced = Ragged((one.forced for one in layouts if one.forced is not None), np.bool_)
        self.lengths = self._tokens.lengths
        rows = range(len(layouts))
        self.targets = np.array([int((~self._forced[row]).sum()) for row in rows])

    def __getitem__(self, row: int) -> Layout:
        tokens, forced = self._tokens[row].astype(np.int64), self._forced[row]
        return Layout(tokens, len(tokens) - len(forced), forced)


def sequence_format(tokenizer: SpeechTextTokenizer) -> SequenceFormat:
    """The format that `ar.text.interleaved` asks for."""
    return InterleavedFormat(tokenizer) if tokenizer.text.interleaved else PlainFormat(tokenizer)
