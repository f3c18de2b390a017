"""Layouts of the tasks, what the loss covers, and what may be said at all.

    tts            <|text|> prompt text + target text <|speech|> | s1 s2 ... <|/speech|>
    tts, word by word (ar.text.interleaved)
                   <|text|> prompt text + target text <|speech|> p1 p2 ...
                   then for each word <|/speech|> word <|speech|> | s1 s2 ... and a last <|/speech|>
    asr            <|speech|> s1 s2 ... <|/speech|> <|text|> | transcript eos
    asr, stretch by stretch (ar.text.interleaved)
                   for each stretch <|speech|> s1 s2 ... <|text|> | the words that are over eos
                   the last one's speech ends with <|/speech|>
    continuation   <|speech|> | s1 s2 ... <|/speech|>
    text           t1 | t2 ... eos     (the end where the document's is)

The loss covers what stands behind the bar, its end token included. A zero-shot prompt is the
prompt's codes right after <|speech|>: the model goes on from there. Word by word, the loss covers
the words' codes and the <|/speech|> behind each; the words themselves are given. So is the speech
of transcripts that are written stretch by stretch.
"""

import json
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from codec.io import atomic_file
from slm.tokenization.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

TASKS = ("tts", "asr", "continuation", "text")
TTS, ASR, CONTINUATION, TEXT = range(len(TASKS))
COVERAGE_FILE = "coverage.json"


class Layout(NamedTuple):
    """One sequence; what follows its first `num_context` tokens is the target."""

    tokens: np.ndarray
    """(L,) int64."""
    num_context: int
    given: np.ndarray | None = None
    """(L - num_context,) bool: what behind the context is no target after all; None: nothing."""


class Word(NamedTuple):
    """A word and its speech, as ids."""

    text: Sequence[int]
    speech: Sequence[int] | np.ndarray


class ForcedTokens(NamedTuple):
    """What is given while a sequence is made: speech that goes word by word has the words here."""

    parts: tuple[Sequence[int], ...]
    """Ids that come after the first end token, after the second, ...; the end token after the last
    is the end."""
    most: tuple[int, ...]
    """Tokens of text, or frames, that are drawn at most before the first end token, before the
    second, ...: it is put there then. One more than `parts`; or empty, without them. A sequence
    whose last part, or more than one, ended so is cut."""
    least: int = 0
    """And at least, before each."""

    @property
    def ids(self) -> list[int]:
        """All that is given, each part with the end token before it (any id in its place)."""
        return [token for part in self.parts for token in (0, *part)]


NO_FORCED_TOKENS = ForcedTokens((), ())


def tts_context(
    vocabulary: Vocabulary, text: Sequence[int], prompt: Sequence[int] | np.ndarray
) -> list[int]:
    """What stands before the first generated token; `text` and `prompt` are ids."""
    return [vocabulary.text, *text, vocabulary.speech, *map(int, prompt)]


def asr_context(vocabulary: Vocabulary, speech: Sequence[int] | np.ndarray) -> list[int]:
    """What stands before a transcript; `speech` is ids."""
    return [vocabulary.speech, *map(int, speech), vocabulary.speech_end, vocabulary.text]


def continuation_context(vocabulary: Vocabulary, prompt: Sequence[int] | np.ndarray) -> list[int]:
    """What stands before speech that goes on by itself; `prompt` is ids."""
    return [vocabulary.speech, *map(int, prompt)]


def layout(
    task: int, vocabulary: Vocabulary, text: Sequence[int], speech: Sequence[int] | np.ndarray
) -> Layout:
    """The training sequence of a task, an index into TASKS, from ids of its text and speech."""
    spoken = [*map(int, speech), vocabulary.speech_end]
    written = [*text, vocabulary.eos]
    context, target = {
        TTS: lambda: (tts_context(vocabulary, text, []), spoken),
        ASR: lambda: (asr_context(vocabulary, speech), written),
        CONTINUATION: lambda: (continuation_context(vocabulary, []), spoken),
        TEXT: lambda: (text[:1], text[1:]),
    }[task]()
    return Layout(np.array([*context, *target]), len(context))


def word_lead(vocabulary: Vocabulary, word: Sequence[int]) -> list[int]:
    """What is given between the end of the speech before a word and the word's own."""
    return [*word, vocabulary.speech]


def interleaved(
    vocabulary: Vocabulary, text: Sequence[int], prompt: Sequence[int] | np.ndarray,
    words: Sequence[Word],
) -> Layout:  # fmt: skip
    """The training sequence of speech that is made word by word, behind a prompt or none."""
    tokens, given = tts_context(vocabulary, text, prompt), []
    for number, word in enumerate(words):
        lead = word_lead(vocabulary, word.text)
        tokens += [vocabulary.speech_end, *lead, *map(int, word.speech)]
        given += [number == 0, *[True] * len(lead), *[False] * len(word.speech)]
    tokens.append(vocabulary.speech_end)
    given.append(False)
    first = given.index(False)
    num_context = len(tokens) - len(given) + first
    return Layout(np.array(tokens), num_context, np.array(given[first:]))


class Stretch(NamedTuple):
    """Some speech, and the text that is written when it has been heard, as ids."""

    speech: Sequence[int] | np.ndarray
    text: Sequence[int]


def stretch_lead(
    vocabulary: Vocabulary, speech: Sequence[int] | np.ndarray, last: bool
) -> list[int]:
    """What is given before a stretch's text."""
    end = [vocabulary.speech_end] if last else []
    return [vocabulary.speech, *map(int, speech), *end, vocabulary.text]


def heard_in_stretches(vocabulary: Vocabulary, stretches: Sequence[Stretch]) -> Layout:
    """The training sequence of a transcript that is written stretch by stretch."""
    tokens: list[int] = []
    given: list[bool] = []
    for number, one in enumerate(stretches, start=1):
        lead = stretch_lead(vocabulary, one.speech, number == len(stretches))
        tokens += [*lead, *one.text, vocabulary.eos]
        given += [True] * len(lead) + [False] * (len(one.text) + 1)
    first = given.index(False)
    return Layout(np.array(tokens), first, np.array(given[first:]))


def join_texts(prompt_text: str, text: str) -> str:
    """The prompt's transcript and the text to speak, as one utterance's transcript reads."""
    parts = (in_small_letters(part.strip()) for part in (prompt_text, text))
    return " ".join(part for part in parts if part)


def in_small_letters(text: str) -> str:
    """The text; lower case where all of it is in capitals, as some corpora's transcripts are.

    So a letter is one and the same token in all of them. One word alone stays: it may be a name.
    """
    return text.lower() if text.isupper() and sum(map(has_words, text.split())) > 1 else text


def has_words(text: str) -> bool:
    """Whether there is anything to say."""
    return any(unicodedata.category(letter)[0] in "LN" for letter in text)


def script_of(letter: str) -> str:
    """LATIN, CYRILLIC, CJK, ... : the first word of the letter's Unicode name; that of the plain
    letter where it is a form of one, such as a raised or a wide one."""
    plain = unicodedata.normalize("NFKC", letter)
    letter = plain if len(plain) == 1 else letter
    return unicodedata.name(letter, "UNKNOWN").split()[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A recording whose voice is to be taken on."""

    codes: np.ndarray
    """(Q, T)."""
    text: str
    """Its transcript."""
    credit: str = ""
    """Whose recording it is, and under which licence."""
    continuation: bool = False
    """The codes begin the text that is to be spoken, whose words hold theirs; `text` is empty."""

    def check(self, codebook_sizes: Sequence[int]) -> None:
        """Raises ValueError for codes that a codec of these codebooks did not make."""
        codes = np.asarray(self.codes)
        if codes.ndim != 2 or len(codes) != len(codebook_sizes) or not codes.size:
            raise ValueError(
                f"the prompt's codes have the shape {codes.shape}; this codec makes "
                f"({len(codebook_sizes)}, T)"
            )
        if codes.dtype.kind not in "iu":
            raise ValueError(f"the prompt's codes are {codes.dtype}, not whole numbers")
        for codebook, (row, size) in enumerate(zip(codes, codebook_sizes, strict=True), start=1):
            outside = row[(row < 0) | (row >= size)]
            if outside.size:
                raise ValueError(
                    f"the prompt has code {outside[0]} in codebook {codebook}, which has {size} "
                    "entries; was it made by another codec?"
                )

    def save(self, folder: str | Path, name: str) -> None:
        record = {"text": self.text, "credit": self.credit, "codes": self.codes.tolist()}
        with atomic_file(Path(folder) / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")


def load_prompts(folder: str | Path) -> dict[str, Prompt]:
    """The shipped prompts of a voice by name; none where there is no such folder."""
    prompts = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            codes = np.array(record["codes"], dtype=np.int64)
            if codes.ndim != 2:
                raise ValueError("its codes are not one row per codebook")
            prompts[path.stem] = Prompt(codes=codes, text=record["text"], credit=record["credit"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a prompt: {error}") from error
    return prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """What a model's training texts held: which scripts and characters it can be asked to speak."""

    scripts: tuple[str, ...]
    characters: str
    """Every character that occurred, sorted."""
    longest_frames: int
    """Frames of the longest training utterance."""

    @classmethod
    def of(cls, texts: Iterable[str], longest_frames: int) -> "Coverage":
        characters = sorted(set().union(*map(set, texts)))
        scripts = sorted({script_of(letter) for letter in characters if letter.isalpha()})
        return cls(
            scripts=tuple(scripts), characters="".join(characters), longest_frames=longest_frames
        )

    def check(self, text: str, what: str = "the text") -> None:
        """Raises ValueError for a text with nothing to say, or a letter of an unknown script."""
        if not has_words(text):
            raise ValueError(f"{what} {text!r} has nothing to say; give it a letter or a number")
        for letter in text:
            if letter.isalpha() and script_of(letter) not in self.scripts:
                raise ValueError(
                    f"{what} has {letter!r} of the script {script_of(letter)}; this model was "
                    f"trained on {', '.join(self.scripts)}"
                )
        unseen = sorted({c for c in text if not c.isspace()} - set(self.characters))
        if unseen:
            logger.warning("characters that no training text had: %s", " ".join(unseen))

    def check_length(self, prompt: int, least: int, frame_rate: float) -> None:
        """Raises ValueError when `prompt` frames and `least` more are beyond all training."""
        if prompt + least > self.longest_frames:
            raise ValueError(
                f"the text is too long for the model: {prompt / frame_rate:.1f} s of prompt and at "
                f"least {least / frame_rate:.1f} s of speech, but it was trained on no more than "
                f"{self.longest_frames / frame_rate:.1f} s; split the text or shorten the prompt"
            )

    def save(self, folder: str | Path) -> None:
        with atomic_file(Path(folder) / COVERAGE_FILE) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> "Coverage":
        path = Path(folder) / COVERAGE_FILE
        try:
            record = json.loads(path.read_text())
            return cls(**{**record, "scripts": tuple(record["scripts"])})
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: missing or damaged ({error}); save the voice again"
            ) from error
