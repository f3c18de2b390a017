"""How a task's text and speech become vocabulary ids, and back.

Text that is spoken (tts) is spelt out first: numbers and abbreviations in words, or phonemes. What
is written (asr) is not: a model writes numbers as its transcripts do, and scores count words. What
is all in capitals is lowered in both. Text alone is the LLM's own tokens whatever the form of the
others, so that it stays what the LLM knows.
"""

import json
import logging
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers.pre_tokenizers import ByteLevel

from codec.io import atomic_file
from codec.tokens import CodecStamp
from slm.config import SpeechFormConfig, TextConfig, from_json
from slm.data.sequences import in_small_letters
from slm.tokenization.acoustic_bpe import AcousticBPE
from slm.tokenization.text_normalization import normalize, phonemes
from slm.tokenization.vocabulary import Vocabulary, encode_texts

logger = logging.getLogger(__name__)

FILE_NAME = "alphabet.json"
UNITS_FILE = "units.model"


class SpeechTextTokenizer:
    """The vocabulary, and which of its ids a task's text and speech are made of.

    Make it by `create` or `load`; the constructor is for what has no pieces.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text_tokenizer: Any,
        text: TextConfig | None = None,
        units: SpeechFormConfig | None = None,
        pieces: AcousticBPE | None = None,
        by_bytes: bool = True,
    ):
        """`by_bytes`: transcripts in characters are made of bytes' tokens, where there are such."""
        self.by_bytes = by_bytes
        self.vocabulary, self.text_tokenizer = vocabulary, text_tokenizer
        self.text, self.units = text or TextConfig(), units or SpeechFormConfig()
        self.pieces = pieces
        self._characters: dict[str, list[int]] = {}
        self._in_bytes: dict[str, list[int]] = {}
        if (pieces is not None) != ("bpe" in (self.units.tts_form, self.units.asr_form)):
            raise ValueError(
                "units of bpe and their model belong together; use SpeechTextTokenizer.create"
            )
        if pieces is None:
            return
        pieces.check_codec(vocabulary.codec, self.units.bpe_model or "the units model")
        if pieces.num_merges != vocabulary.num_merges:
            raise ValueError(
                f"the units model has {pieces.num_merges} merges, the vocabulary "
                f"{vocabulary.num_merges}; copy the voice again"
            )
        if pieces.remove_runs and self.units.tts_form == "bpe":
            raise ValueError(
                f"speech.tts_form=bpe: {self.units.bpe_model} removes runs: durations would be "
                "lost; train units with remove_runs=false, or use it for speech.asr_form alone"
            )

    @classmethod
    def create(
        cls,
        lm: Any,
        text_tokenizer: Any,
        codec: CodecStamp,
        text: TextConfig,
        units: SpeechFormConfig,
    ) -> "SpeechTextTokenizer":
        """For a causal LM as it was loaded. Reads the units model where a task uses it."""
        pieces = None
        if "bpe" in (units.tts_form, units.asr_form):
            assert units.bpe_model is not None
            pieces = AcousticBPE.load(units.bpe_model)
            pieces.check_codec(codec, units.bpe_model)
        elif units.bpe_model is not None:
            logger.warning(
                "speech.bpe_model %s is not used: speech.asr_form and speech.tts_form are codes",
                units.bpe_model,
            )
        num_merges = 0 if pieces is None else pieces.num_merges
        vocabulary = Vocabulary.of(lm, text_tokenizer, codec, num_merges)
        return cls(vocabulary, text_tokenizer, text, units, pieces)

    def text_ids(self, task: str, texts: Sequence[str]) -> list[list[int]]:
        """Texts as `task` reads (tts) or writes (asr, text) them."""
        if task == "tts":
            texts = [self.spelt(text) for text in texts]
        elif task == "asr":
            texts = [in_small_letters(text) for text in texts]
        form = {"tts": self.text.tts_form, "asr": self.text.asr_form}.get(task, "tokens")
        if form == "tokens":
            return encode_texts(self.text_tokenizer, texts)
        if task == "asr" and self.writes_bytes:
            return _spelt(texts, self._in_bytes, lambda one: _byte_ids(self.text_tokenizer, one))
        return self.spelling_ids(texts)

    def text_range(self, task: str) -> range:
        """Ids that `task`'s text is made of: those of bytes, where it is spelt in characters and
        the tokenizer has them in one stretch; else all of the tokenizer's."""
        made = self._bytes if task == "asr" and self.writes_bytes else None
        return made or range(self.vocabulary.num_text)

    @property
    def writes_bytes(self) -> bool:
        """Whether a transcript is made of the tokens of its characters' bytes."""
        return self.text.asr_form == "characters" and self._bytes is not None

    def text_of(self, ids: Sequence[int]) -> str:
        """A transcript's ids, without their end, back to text."""
        return self.vocabulary.decode_text(self.text_tokenizer, ids)

    def num_tokens(self, text: str) -> int:
        """How much there is to say: the LLM's own tokens of the text, whatever its form here."""
        text = in_small_letters(text)
        spelt = normalize(text) if self.text.normalize else text
        return len(encode_texts(self.text_tokenizer, [spelt])[0])

    def speech_ids(self, task: str, codes: Int[np.ndarray, " T"]) -> Int[np.ndarray, " N"]:
        """Codes of codebook 1 as `task` hears (asr) or makes (tts, continuation) them."""
        if self.pieces is None or not self.has_pieces(task):
            return self.vocabulary.encode_speech(codes)
        return self.vocabulary.encode_pieces(self.pieces.encode(codes))

    def has_pieces(self, task: str) -> bool:
        """Whether `task`'s speech is in pieces of several codes (acoustic BPE)."""
        return (self.units.asr_form if task == "asr" else self.units.tts_form) == "bpe"

    def speech_range(self, task: str) -> range:
        """Ids that `task`'s speech is made of: codes, and merges where it has pieces."""
        first, vocabulary = self.vocabulary.first_speech, self.vocabulary
        number = vocabulary.num_pieces if self.has_pieces(task) else vocabulary.codebook_size
        return range(first, first + number)

    def codes_of(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " T"]:
        """Speech ids back to codes of codebook 1."""
        if self.pieces is None:
            return self.vocabulary.decode_speech(ids)
        return self.pieces.decode(self.vocabulary.decode_pieces(ids))

    def frames(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " N"]:
        """How many codes each speech id stands for."""
        if self.pieces is None:
            return np.ones(len(ids), dtype=np.int64)
        return self.pieces.lengths[self.vocabulary.decode_pieces(ids)]

    def in_words(self, text: str) -> str:
        """The text in letters, numbers and abbreviations in words: what is counted, and compared
        with what is heard."""
        return normalize(text) if self.text.normalize else text

    def spelt(self, text: str) -> str:
        """The text as it is spoken: numbers and abbreviations in words, or phonemes.

        The NAR reads its bytes. What is spelt already stays as it is.
        """
        text = in_small_letters(text)
        if self.text.normalize:
            text = normalize(text)
        return phonemes(text) if self.text.tts_form == "phonemes" else text

    @cached_property
    def _bytes(self) -> range | None:
        """The stretch of ids that has those of single bytes; None: the tokenizer is not byte-level,
        or has them scattered."""
        names, convert = sorted(_BYTES.alphabet()), self.text_tokenizer.convert_tokens_to_ids
        space = convert([_BYTES.pre_tokenize_str(" ")[0][0]])
        # Some have no token for bytes that no text has, or hardly any.
        unknown = {None, getattr(self.text_tokenizer, "unk_token_id", None)}
        if (
            not self.by_bytes
            or space[0] in unknown
            or encode_texts(self.text_tokenizer, [" "]) != [space]
        ):
            return None
        ids = sorted(set(convert(names)) - unknown)
        return range(ids[0], ids[-1] + 1) if ids[-1] - ids[0] < 2 * len(names) else None

    def spelling_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Each character's own tokens, case and spaces kept. ValueError for one that has none."""
        return _spelt(texts, self._characters, lambda one: _character_ids(self.text_tokenizer, one))

    def save(self, folder: str | Path) -> None:
        """The units model goes with it: a voice does not need the file that it was made with."""
        self.vocabulary.save(folder)
        units = replace(self.units, bpe_model=None if self.pieces is None else UNITS_FILE)
        if self.pieces is not None:
            self.pieces.save(Path(folder) / UNITS_FILE)
        with atomic_file(Path(folder) / FILE_NAME) as temporary:
            record = {"text": asdict(self.text), "speech": asdict(units), "bytes": self.by_bytes}
            temporary.write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: str | Path, text_tokenizer: Any) -> "SpeechTextTokenizer":
        vocabulary, path = Vocabulary.load(folder), Path(folder) / FILE_NAME
        if not path.is_file():  # Older voices knew the LLM's tokens and codes alone.
            return cls(vocabulary, text_tokenizer, TextConfig(normalize=False))
        try:
            record = json.loads(path.read_text())
            text = from_json(TextConfig, record["text"])
            # Older voices say `units`.
            units = from_json(SpeechFormConfig, record.get("speech") or record["units"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: missing or damaged ({error}); copy the voice again"
            ) from error
        used = "bpe" in (units.tts_form, units.asr_form)
        pieces = AcousticBPE.load(Path(folder) / UNITS_FILE) if used else None
        # Older voices wrote each character's own tokens.
        return cls(vocabulary, text_tokenizer, text, units, pieces, record.get("bytes", False))


def _spelt(
    texts: Sequence[str], known: dict[str, list[int]], spell: Callable[[str], list[int]]
) -> list[list[int]]:
    """Character by character, composed (NFC) before; `known` grows."""
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    for character in sorted(set().union(*map(set, texts)) - known.keys()):
        known[character] = spell(character)
    return [[token for one in text for token in known[one]] for text in texts]


_BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
"""Names of bytes in byte-level vocabularies."""


def _byte_ids(text_tokenizer: Any, character: str) -> list[int]:
    """The tokens of a character's bytes, one each."""
    (named,) = _BYTES.pre_tokenize_str(character)
    return _first_that_spells(
        text_tokenizer, character, [text_tokenizer.convert_tokens_to_ids([*named[0]])]
    )


def _character_ids(text_tokenizer: Any, character: str) -> list[int]:
    """Ids that are this character and nothing else: what the tokenizer makes of it alone, or,
    where that puts a space before it, its own piece or its bytes'."""
    pieces = [character.replace(" ", "\u2581")]
    spelt = [f"<0x{byte:02X}>" for byte in character.encode()]
    named = [text_tokenizer.convert_tokens_to_ids(names) for names in (pieces, spelt)]
    return _first_that_spells(
        text_tokenizer, character, [*encode_texts(text_tokenizer, [character]), *named]
    )


def _first_that_spells(
    text_tokenizer: Any, character: str, tries: Iterable[list[Any]]
) -> list[int]:
    unknown = getattr(text_tokenizer, "unk_token_id", None)
    for ids in tries:
        if None in ids or unknown in ids:
            continue
        if text_tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) == character:
            return list(ids)
    raise ValueError(
        f"the LLM's tokenizer cannot spell {character!r} by itself; "
        "use the LLM's own tokens (text.tts_form and text.asr_form)"
    )
