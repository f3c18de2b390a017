"""Sequences of the AR: the layouts of the tasks and what the loss covers.

    tts            <|text|> prompt text + target text <|speech|> | s1 s2 ... <|/speech|>
    asr            <|speech|> s1 s2 ... <|/speech|> <|text|> | transcript eos
    continuation   <|speech|> | s1 s2 ... <|/speech|>
    text           t1 | t2 ... eos     (eos at the end of a document)

The loss covers what follows the bar, the end token included. A zero-shot prompt is the prompt's
codes right after <|speech|>. slm/data/interleaving.py has the interleaved layouts of tts and asr.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from slm.data.corpus import Corpus, Ragged
from slm.tokenization.text_normalization import NormalizedText
from slm.tokenization.tokenizer import SpeechTextTokenizer
from slm.tokenization.vocabulary import Vocabulary

TASKS = ("tts", "asr", "continuation", "text")
TTS, ASR, CONTINUATION, TEXT = range(len(TASKS))
TEXTS_AT_ONCE = 4096
"""Texts that are encoded in one call."""


class Layout(NamedTuple):
    """A training sequence; what follows its first `num_context` tokens is the target."""

    tokens: Int[np.ndarray, " L"]
    num_context: int
    forced: Bool[np.ndarray, " F"] | None = None
    """Forced tokens behind the context (F = L - num_context), which the loss skips; None: none."""


class ForcedTokens(NamedTuple):
    """Tokens that are inserted during generation, instead of sampled: behind each end token."""

    parts: tuple[Sequence[int], ...] = ()
    """Ids behind the first end token, behind the second, ...; the end token after the last part
    ends the sequence."""
    most: tuple[int, ...] = ()
    """Maximum frames (or text tokens) before the first end token, before the second, ...; then the
    end token is forced. One more than `parts`, or empty. A sequence whose last segment, or more
    than one, was ended so is truncated."""
    least: int = 0
    """Minimum frames (or text tokens) before each end token."""

    @property
    def ids(self) -> list[int]:
        """All parts, with one id (0) in place of the end token before each."""
        return [token for part in self.parts for token in (0, *part)]


NO_FORCED_TOKENS = ForcedTokens()


class Context(NamedTuple):
    """Prompt tokens of a generation, and the tokens that are inserted into it."""

    tokens: list[int]
    forced: ForcedTokens = NO_FORCED_TOKENS

    @property
    def ids(self) -> list[int]:
        """Everything that is not sampled."""
        return [*self.tokens, *self.forced.ids]


@runtime_checkable
class Examples(Protocol):
    """The training sequences of a corpus in one task."""

    lengths: Int[np.ndarray, " N"]
    """Positions."""
    targets: Int[np.ndarray, " N"]
    """Positions under the loss."""

    def __getitem__(self, row: int) -> Layout: ...


@runtime_checkable
class SequenceFormat(Protocol):
    """How text and speech alternate in TTS and ASR; `sequence_format` chooses one."""

    asr_tokens_per_second: float
    """Transcript tokens of a second of fast speech, forced tokens included."""
    scores_text: bool
    """Whether a given transcript has a likelihood without its word boundaries."""

    def examples(self, task: int, corpus: Corpus, codes: Ragged, seed: int) -> Examples:
        """Training sequences of `task`, TTS or ASR; `codes` are those of codebook 1."""
        ...

    def tts_context(
        self,
        prompt_text: NormalizedText,
        text: NormalizedText,
        prompt: Int[np.ndarray, " T"],
        num_prompt_words: Callable[[], int] | None = None,
    ) -> Context:
        """The context of TTS.

        Args:
            prompt: its codes of codebook 1.
            num_prompt_words: for a prompt that is the beginning of `text`: counts the words in it.
        """
        ...

    def num_forced(self, text: NormalizedText) -> int:
        """Forced tokens of TTS for a text, the first ones included."""
        ...

    def asr_context(self, codes: Int[np.ndarray, " T"]) -> Context:
        """The context of ASR for codes of codebook 1."""
        ...


def tts_context(
    vocabulary: Vocabulary, text: Sequence[int], prompt: Sequence[int] | np.ndarray
) -> list[int]:
    """Ids before the first generated speech token; `text` and `prompt` are ids."""
    return [vocabulary.text, *text, vocabulary.speech, *map(int, prompt)]


def asr_context(vocabulary: Vocabulary, speech: Sequence[int] | np.ndarray) -> list[int]:
    """Ids before a transcript; `speech` is ids."""
    return [vocabulary.speech, *map(int, speech), vocabulary.speech_end, vocabulary.text]


def continuation_context(vocabulary: Vocabulary, prompt: Sequence[int] | np.ndarray) -> list[int]:
    """Ids before a continuation without a text; `prompt` is ids."""
    return [vocabulary.speech, *map(int, prompt)]


def layout(
    task: int, vocabulary: Vocabulary, text: Sequence[int], speech: Sequence[int] | np.ndarray
) -> Layout:
    """The training sequence of a task (an index into TASKS) from ids of its text and speech."""
    to_speech = [*map(int, speech), vocabulary.speech_end]
    to_text = [*text, vocabulary.eos]
    context, target = {
        TTS: lambda: (tts_context(vocabulary, text, []), to_speech),
        ASR: lambda: (asr_context(vocabulary, speech), to_text),
        CONTINUATION: lambda: (continuation_context(vocabulary, []), to_speech),
        TEXT: lambda: (text[:1], text[1:]),
    }[task]()
    return Layout(np.array([*context, *target]), len(context))


def encoded(
    tokenizer: SpeechTextTokenizer, task: str, texts: Sequence[str]
) -> Iterator[Sequence[int]]:
    """Ids of many texts."""
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        yield from tokenizer.text_ids(task, texts[start : start + TEXTS_AT_ONCE])


class PlainExamples:
    """Sequences with all text on one side and all speech on the other."""

    def __init__(self, tokenizer: SpeechTextTokenizer, task: int, corpus: Corpus, codes: Ragged):
        name, number = TASKS[task], len(codes)
        self._tokenizer, self._task, self._codes = tokenizer, task, codes
        self._texts = Ragged(
            [[]] * number if task == CONTINUATION else encoded(tokenizer, name, corpus.texts)
        )
        self._bpe_ids: Ragged | None = None
        if tokenizer.uses_bpe(name):
            rows = (codes[row].astype(np.int64) for row in range(number))
            self._bpe_ids = Ragged(tokenizer.speech_ids(name, row) for row in rows)
        num_speech = (codes if self._bpe_ids is None else self._bpe_ids).lengths
        self.targets = (self._texts.lengths if task == ASR else num_speech) + 1
        self.lengths = self._texts.lengths + num_speech + {TTS: 3, ASR: 4, CONTINUATION: 2}[task]

    def __getitem__(self, row: int) -> Layout:
        if self._bpe_ids is not None:
            speech = self._bpe_ids[row]
        else:
            codes = self._codes[row].astype(np.int64)
            speech = self._tokenizer.speech_ids(TASKS[self._task], codes)
        return layout(self._task, self._tokenizer.vocabulary, self._texts[row].tolist(), speech)


class PlainFormat:
    """The format of the layouts above."""

    asr_tokens_per_second = 8.0
    scores_text = True

    def __init__(self, tokenizer: SpeechTextTokenizer):
        self.tokenizer = tokenizer

    def examples(self, task: int, corpus: Corpus, codes: Ragged, seed: int) -> Examples:
        """Training sequences of `task`; `codes` are those of codebook 1, and `seed` is not used."""
        return PlainExamples(self.tokenizer, task, corpus, codes)

    def tts_context(
        self,
        prompt_text: NormalizedText,
        text: NormalizedText,
        prompt: Int[np.ndarray, " T"],
        num_prompt_words: Callable[[], int] | None = None,
    ) -> Context:
        """The context of TTS; `num_prompt_words` is not used."""
        ids = self.tokenizer.joined_ids(prompt_text, text)
        speech = self.tokenizer.speech_ids("tts", prompt)
        return Context(tts_context(self.tokenizer.vocabulary, ids, speech))

    def num_forced(self, text: NormalizedText) -> int:
        """0: all tokens after the context are sampled."""
        return 0

    def asr_context(self, codes: Int[np.ndarray, " T"]) -> Context:
        """The context of ASR for codes of codebook 1."""
        speech = self.tokenizer.speech_ids("asr", codes)
        return Context(asr_context(self.tokenizer.vocabulary, speech))
