"""Text and speech of each task to vocabulary ids, and back.

TTS reads normalized text: numbers and abbreviations in words, or phonemes. ASR writes text as its
transcripts have it: digits stay digits. Texts all in capitals are lowered in both. Text-only
training always uses the LLM's own tokens.
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

from codec.io import DAMAGE, atomic_file, parse_json
from codec.program import reason_of
from codec.tokens import CodecStamp
from codec.transcripts import check_unicode, lowercase_if_all_caps
from slm.config import SpeechFormConfig, TextConfig, from_json
from slm.tokenization.acoustic_bpe import AcousticBPE
from slm.tokenization.text_normalization import (
    NormalizedText,
    clean_text,
    join_texts,
    normalize,
    phonemes,
)
from slm.tokenization.vocabulary import Vocabulary, encode_texts

logger = logging.getLogger(__name__)

FILE_NAME = "alphabet.json"
BPE_FILE = "units.model"


class SpeechTextTokenizer:
    """The vocabulary, and how each task's text and speech are written in its ids.

    Make it by `create` or `load`; the constructor is for tokenizers without acoustic BPE.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text_tokenizer: Any,
        text: TextConfig | None = None,
        speech: SpeechFormConfig | None = None,
        bpe: AcousticBPE | None = None,
        by_bytes: bool = True,
    ):
        """
        Args:
            text_tokenizer: the LLM's own.
            by_bytes: transcripts in characters are the tokens of their UTF-8 bytes, where the
                LLM's tokenizer has these.

        Raises:
            ValueError: an acoustic BPE model that does not fit the vocabulary or the forms.
        """
        self.vocabulary, self.text_tokenizer, self.by_bytes = vocabulary, text_tokenizer, by_bytes
        self.text, self.speech = text or TextConfig(), speech or SpeechFormConfig()
        self.bpe = bpe
        self._characters: dict[str, list[int]] = {}
        self._in_bytes: dict[str, list[int]] = {}
        name = self.speech.bpe_model or "the acoustic BPE model"
        if (bpe is not None) != ("bpe" in (self.speech.tts_form, self.speech.asr_form)):
            raise ValueError(
                "the form bpe and its model belong together; use SpeechTextTokenizer.create"
            )
        if bpe is None:
            return
        bpe.check_codec(vocabulary.codec, name)
        if bpe.num_merges != vocabulary.num_merges:
            raise ValueError(
                f"the acoustic BPE model has {bpe.num_merges} merges, the vocabulary "
                f"{vocabulary.num_merges}; copy the voice again"
            )
        if bpe.remove_runs and self.speech.tts_form == "bpe":
            raise ValueError(
                f"speech.tts_form=bpe: {name} removes runs: durations would be lost; train one "
                "with remove_runs=false, or use it for speech.asr_form alone"
            )

    @classmethod
    def create(
        cls,
        lm: Any,
        text_tokenizer: Any,
        codec: CodecStamp,
        text: TextConfig,
        speech: SpeechFormConfig,
    ) -> "SpeechTextTokenizer":
        """For a causal LM before it is extended. Reads the acoustic BPE model if a task uses it.

        Raises:
            ValueError: an acoustic BPE model of another codec, and a text tokenizer that has one of
                the new tokens.
        """
        bpe = None
        if "bpe" in (speech.tts_form, speech.asr_form):
            assert speech.bpe_model is not None
            bpe = AcousticBPE.load(speech.bpe_model)
            bpe.check_codec(codec, speech.bpe_model)
        elif speech.bpe_model is not None:
            logger.warning(
                "speech.bpe_model %s is not used: speech.asr_form and speech.tts_form are codes",
                speech.bpe_model,
            )
        vocabulary = Vocabulary.of(lm, text_tokenizer, codec, 0 if bpe is None else bpe.num_merges)
        vocabulary.check_free(text_tokenizer)
        return cls(vocabulary, text_tokenizer, text, speech, bpe)

    def normalize(self, text: str) -> NormalizedText:
        """A text with its normalized form and ids: the only place that normalizes for TTS.

        Raises:
            ValueError: a character that the LLM's tokenizer cannot spell (form `characters`).
        """
        return self.from_normalized(self._clean_words(text), text)

    def from_normalized(self, text: str, original: str | None = None) -> NormalizedText:
        """The same for a text that is normalized already, such as a piece of one."""
        tts_form = phonemes(text) if self.text.tts_form == "phonemes" else text
        (tokens,) = encode_texts(self.text_tokenizer, [text])
        plain = self.text.tts_form == "tokens"
        return NormalizedText(
            original=text if original is None else original,
            text=text,
            tts_form=tts_form,
            ids=tuple(tokens if plain else self.tts_ids([tts_form])[0]),
            num_tokens=len(tokens),
        )

    def in_words(self, text: str) -> str:
        """A text with numbers and abbreviations in words, if `text.normalize`.

        Raises:
            ValueError: half of a surrogate pair.
        """
        check_unicode(text)
        return normalize(text) if self.text.normalize else text

    def _clean_words(self, text: str) -> str:
        return self.in_words(lowercase_if_all_caps(clean_text(text)))

    def tts_form(self, text: str) -> str:
        """The text input of TTS and of the NAR for a text that is not normalized yet."""
        text = self._clean_words(text)
        return phonemes(text) if self.text.tts_form == "phonemes" else text

    def tts_ids(self, tts_forms: Sequence[str]) -> list[list[int]]:
        """Ids of texts in their TTS form."""
        if self.text.tts_form == "tokens":
            return encode_texts(self.text_tokenizer, tts_forms)
        return self.character_ids(tts_forms)

    def joined_ids(self, prompt_text: NormalizedText, text: NormalizedText) -> Sequence[int]:
        """Ids of the prompt's text followed by a text: encoded together, as in training."""
        if not prompt_text.tts_form and text.tts_form == text.tts_form.strip():
            return text.ids
        return self.tts_ids([join_texts(prompt_text.tts_form, text.tts_form)])[0]

    def text_ids(self, task: str, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as `task` reads (tts) or writes (asr, text) them."""
        if task == "tts":
            return self.tts_ids([self.tts_form(text) for text in texts])
        if task == "asr":
            texts = [lowercase_if_all_caps(text) for text in texts]
            if self.writes_bytes:
                return _by_character(texts, self._in_bytes, self._byte_ids)
            if self.text.asr_form == "characters":
                return self.character_ids(texts)
        return encode_texts(self.text_tokenizer, texts)

    def text_range(self, task: str) -> range:
        """Allowed ids of `task`'s text: the tokens of bytes if `writes_bytes`, else all tokens."""
        made = self._bytes if task == "asr" and self.writes_bytes else None
        return made or range(self.vocabulary.num_text)

    @property
    def writes_bytes(self) -> bool:
        """Whether transcripts consist of the tokens of their UTF-8 bytes."""
        return self.text.asr_form == "characters" and self._bytes is not None

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of a transcript's ids, without the end token."""
        return self.vocabulary.decode_text(self.text_tokenizer, ids)

    def speech_ids(self, task: str, codes: Int[np.ndarray, " T"]) -> Int[np.ndarray, " N"]:
        """Ids of codes of codebook 1, as `task` reads (asr) or writes (tts, continuation) them."""
        if self.bpe is None or not self.uses_bpe(task):
            return self.vocabulary.encode_speech(codes)
        return self.vocabulary.encode_pieces(self.bpe.encode(codes))

    def uses_bpe(self, task: str) -> bool:
        """Whether `task`'s speech is in pieces of acoustic BPE."""
        return (self.speech.asr_form if task == "asr" else self.speech.tts_form) == "bpe"

    def speech_range(self, task: str) -> range:
        """Allowed ids of `task`'s speech: codes, and merges of acoustic BPE."""
        first, vocabulary = self.vocabulary.first_speech, self.vocabulary
        number = vocabulary.num_pieces if self.uses_bpe(task) else vocabulary.codebook_size
        return range(first, first + number)

    def codes_of(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " T"]:
        """Codes of codebook 1 from speech ids."""
        if self.bpe is None:
            return self.vocabulary.decode_speech(ids)
        return self.bpe.decode(self.vocabulary.decode_pieces(ids))

    def frames(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " N"]:
        """Number of codes of each speech id."""
        if self.bpe is None:
            return np.ones(len(ids), dtype=np.int64)
        return self.bpe.lengths[self.vocabulary.decode_pieces(ids)]

    @cached_property
    def _bytes(self) -> range | None:
        """Range of ids with those of all single bytes; None: the LLM's tokenizer is not byte-level,
        or its byte tokens are not contiguous."""
        names, convert = sorted(_BYTES.alphabet()), self.text_tokenizer.convert_tokens_to_ids
        space = convert([_BYTES.pre_tokenize_str(" ")[0][0]])
        # Some tokenizers lack tokens for bytes that never occur in UTF-8.
        unknown = {None, getattr(self.text_tokenizer, "unk_token_id", None)}
        if (
            not self.by_bytes
            or space[0] in unknown
            or encode_texts(self.text_tokenizer, [" "]) != [space]
        ):
            return None
        ids = sorted(set(convert(names)) - unknown)
        return range(ids[0], ids[-1] + 1) if ids[-1] - ids[0] < 2 * len(names) else None

    def character_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, character by character, case and spaces kept.

        Raises:
            ValueError: a character that the LLM's tokenizer cannot spell.
        """
        return _by_character(texts, self._characters, self._own_ids)

    def _byte_ids(self, character: str) -> list[int]:
        """The tokens of a character's bytes."""
        (named,) = _BYTES.pre_tokenize_str(character)
        return self._spelling_of(
            character, [self.text_tokenizer.convert_tokens_to_ids([*named[0]])]
        )

    def _own_ids(self, character: str) -> list[int]:
        """The tokens of a character alone; where the tokenizer prepends a space, its own piece or
        its bytes."""
        convert = self.text_tokenizer.convert_tokens_to_ids
        names = (
            [character.replace(" ", "\u2581")],
            [f"<0x{byte:02X}>" for byte in character.encode()],
        )
        alone = encode_texts(self.text_tokenizer, [character])
        return self._spelling_of(character, [*alone, *map(convert, names)])

    def _spelling_of(self, character: str, options: Iterable[list[Any]]) -> list[int]:
        """The first of `options` that decodes to the character."""
        unknown = getattr(self.text_tokenizer, "unk_token_id", None)
        for ids in options:
            if None in ids or unknown in ids:
                continue
            decoded = self.text_tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
            if decoded == character:
                return list(ids)
        raise ValueError(
            f"the LLM's tokenizer cannot spell {character!r} by itself; "
            "use the LLM's own tokens (text.tts_form and text.asr_form)"
        )

    def save(self, folder: str | Path) -> None:
        """Writes vocabulary.json, alphabet.json and, with acoustic BPE, its model."""
        self.vocabulary.save(folder)
        speech = replace(self.speech, bpe_model=None if self.bpe is None else BPE_FILE)
        if self.bpe is not None:
            self.bpe.save(Path(folder) / BPE_FILE)
        with atomic_file(Path(folder) / FILE_NAME) as temporary:
            record = {"text": asdict(self.text), "speech": asdict(speech), "bytes": self.by_bytes}
            temporary.write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: str | Path, text_tokenizer: Any) -> "SpeechTextTokenizer":
        """From the folder ar/ of a voice.

        Raises:
            ValueError: a missing or damaged file.
        """
        vocabulary, path = Vocabulary.load(folder), Path(folder) / FILE_NAME
        if not path.is_file():  # Older voices: the LLM's tokens and codes, not normalized.
            return cls(vocabulary, text_tokenizer, TextConfig(normalize=False))
        try:
            record = parse_json(path.read_text())
            text = from_json(TextConfig, record["text"])
            # Older voices have it under `units`.
            speech = from_json(SpeechFormConfig, record.get("speech") or record["units"])
        except DAMAGE as error:
            raise ValueError(
                f"{path}: missing or damaged ({reason_of(error)}); copy the voice again"
            ) from error
        used = "bpe" in (speech.tts_form, speech.asr_form)
        bpe = AcousticBPE.load(Path(folder) / BPE_FILE) if used else None
        # Older voices have transcripts of each character's own tokens.
        return cls(vocabulary, text_tokenizer, text, speech, bpe, record.get("bytes") is True)


def _by_character(
    texts: Sequence[str], known: dict[str, list[int]], spell: Callable[[str], list[int]]
) -> list[list[int]]:
    """Ids by character, after Unicode composition (NFC); `known` is a cache."""
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    for character in sorted(set().union(*map(set, texts)) - known.keys()):
        known[character] = spell(character)
    return [[token for one in text for token in known[one]] for text in texts]


_BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
"""Names of bytes in byte-level vocabularies."""
