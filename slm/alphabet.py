"""How a task's text and speech become vocabulary ids, and back."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from codec.tokens import written_whole
from slm.config import TextConfig, UnitsConfig
from slm.vocab import Vocabulary, encode_texts

FILE_NAME = "alphabet.json"


class Alphabet:
    """The vocabulary, and which of its ids a task's text and speech are made of."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokenizer: Any,
        text: TextConfig | None = None,
        units: UnitsConfig | None = None,
    ):
        self.vocabulary, self.tokenizer = vocabulary, tokenizer
        self.text, self.units = text or TextConfig(), units or UnitsConfig()

    def text_ids(self, task: str, texts: Sequence[str]) -> list[list[int]]:
        """Texts as `task` reads (tts) or writes (asr, text) them."""
        return encode_texts(self.tokenizer, texts)

    def text_of(self, ids: Sequence[int]) -> str:
        """A transcript's ids, without their end, back to text."""
        return self.vocabulary.decode_text(self.tokenizer, ids)

    def speech_ids(self, task: str, codes: Int[np.ndarray, " T"]) -> Int[np.ndarray, " N"]:
        """Codes of codebook 1 as `task` hears (asr) or makes (tts, continuation) them."""
        return self.vocabulary.encode_speech(codes)

    def has_pieces(self, task: str) -> bool:
        """Whether `task`'s speech is in pieces of several codes (acoustic BPE)."""
        return (self.units.heard if task == "asr" else self.units.spoken) == "bpe"

    def codes_of(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " T"]:
        """Speech ids back to codes of codebook 1."""
        return self.vocabulary.decode_speech(ids)

    def frames(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " N"]:
        """How many codes each speech id stands for."""
        return np.ones(len(ids), dtype=np.int64)

    def spelt(self, text: str) -> str:
        """The text as it is spoken: numbers and abbreviations in words. The NAR reads its bytes."""
        return text

    def save(self, folder: str | Path) -> None:
        self.vocabulary.save(folder)
        with written_whole(Path(folder) / FILE_NAME) as temporary:
            record = {"text": asdict(self.text), "units": asdict(self.units)}
            temporary.write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Any) -> "Alphabet":
        vocabulary, path = Vocabulary.load(folder), Path(folder) / FILE_NAME
        if not path.is_file():  # Older voices knew the LLM's tokens and codes alone.
            return cls(vocabulary, tokenizer, TextConfig(normalize=False))
        try:
            record = json.loads(path.read_text())
            return cls(
                vocabulary, tokenizer, TextConfig(**record["text"]), UnitsConfig(**record["units"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: missing or damaged ({error}); copy the voice again"
            ) from error
