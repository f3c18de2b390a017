"""Zero-shot prompts: codes and transcript of a recording; the prompts that a voice ships with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codec.io import DAMAGE, atomic_file, parse_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Codes and transcript of a recording, whose speaker is to be cloned."""

    codes: np.ndarray
    """(Q, T) integers; `check` reports others."""
    text: str
    """Its transcript."""
    credit: str = ""
    """Author and license of the recording."""
    continuation: bool = False
    """The codes are the beginning of the target utterance, whose text includes their words; `text`
    is empty."""

    def check(self, codebook_sizes: Sequence[int]) -> None:
        """Raises ValueError for codes of another shape, type or range than this codec's."""
        codes = np.asarray(self.codes)
        if codes.ndim != 2 or len(codes) != len(codebook_sizes) or not codes.size:
            raise ValueError(
                f"the prompt's codes have the shape {codes.shape}; this codec makes "
                f"({len(codebook_sizes)}, T)"
            )
        if codes.dtype.kind not in "iu":
            raise ValueError(f"the prompt's codes are {codes.dtype}, not integers")
        for codebook, (row, size) in enumerate(zip(codes, codebook_sizes, strict=True), start=1):
            outside = row[(row < 0) | (row >= size)]
            if outside.size:
                raise ValueError(
                    f"the prompt has code {outside[0]} in codebook {codebook}, which has {size} "
                    "entries; was it made by another codec?"
                )

    def save(self, folder: str | Path, name: str) -> None:
        """Writes `folder`/`name`.json."""
        record = {"text": self.text, "credit": self.credit, "codes": self.codes.tolist()}
        with atomic_file(Path(folder) / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")


def load_prompts(folder: str | Path) -> dict[str, Prompt]:
    """The shipped prompts of a voice by name; empty if there is no such folder.

    Raises:
        ValueError: a damaged file.
    """
    prompts = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = parse_json(path.read_text(encoding="utf-8"))
            codes = np.array(record["codes"], dtype=np.int64)
            if codes.ndim != 2:
                raise ValueError("its codes are not one row per codebook")
            if not isinstance(record["text"], str) or not isinstance(record["credit"], str):
                raise ValueError("text and credit are texts")
            prompts[path.stem] = Prompt(codes=codes, text=record["text"], credit=record["credit"])
        except DAMAGE as error:
            raise ValueError(f"{path}: not a prompt: {error}") from error
    return prompts
