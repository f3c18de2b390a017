"""Teachers' features of whole recordings, written once and read crop by crop.

A cache is a folder of safetensors shards in float16 beside cache.json, which says what made them.
A shard holds of each recording `speech/ID` (T,D), `words/ID` (W,D), `sentence/ID` (D,) and
`spoken/ID`, the words and their seconds as JSON in UTF-8; what was not asked for is not there.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float16
from torch import Tensor

from codec.feature_shards import (
    AGAIN,
    ANEW,
    Entry,
    check_length,
    check_teacher,
    read_facts,
    read_shard,
)
from codec.words import Word

if TYPE_CHECKING:
    from lhotse.cut import Cut


logger = logging.getLogger(__name__)


class CachedWords(NamedTuple):
    """A recording's words, a state of the text teacher for each (W,D), and the sentence's (D,).

    D is 0 where the cache was written without a text teacher.
    """

    words: list[Word]
    states: Float16[Tensor, "W D"]
    sentence: Float16[Tensor, " D"]


class FeatureCache:
    """Random access to a written cache, also from loader processes: each opens the files once."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], index: Mapping[str, Entry]) -> None:
        self.folder, self.facts, self._index = folder, facts, index
        self._files: dict[str, Any] = {}
        self._process = os.getpid()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        speech: tuple[str, str] | None = None,
        text: tuple[str, str] | None = None,
    ) -> "FeatureCache":
        """Reads what lies where, and checks it; no feature is read.

        `speech` and `text` are the (model, layer) that the caller expects. Raises ValueError that
        says what to do when the cache is unfinished, of other teachers or another format version,
        lacks a shard or has a cut one, and, naming the recording, when features are of a wrong
        rank or do not fit the recording's length.
        """
        folder = Path(folder)
        facts = read_facts(folder)
        for kind, expected in (("speech", speech), ("text", text)):
            check_teacher(folder, kind, facts[kind], expected)
        index: dict[str, Entry] = {}
        if "shards" not in facts:
            raise ValueError(f"{folder}: the cache is not finished; {AGAIN}")
        for name, size in facts["shards"].items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path}: the shard is missing; {AGAIN}")
            if path.stat().st_size != size:
                raise ValueError(f"{path}: the shard has been cut or changed; {AGAIN}")
            index.update(read_shard(path, facts))
        return cls(folder, facts, index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, recording: object) -> bool:
        return recording in self._index

    @property
    def skipped(self) -> set[str]:
        """The ids of recordings that could not be used when the cache was written."""
        lines = (self.folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
        return {json.loads(line)["id"] for line in lines}

    def missing(self, cuts: Iterable["Cut"]) -> list[str]:
        """The ids of cuts that are not in the cache.

        Raises ValueError naming a cut whose length is not that of its features by more than one.
        """
        absent = []
        for cut in cuts:
            entry = self._index.get(cut.id)
            if entry is None:
                absent.append(cut.id)
            elif self.facts["speech"]:
                check_length(self.folder, cut.id, entry.frames, cut.duration, self.facts)
        return absent

    def speech(
        self,
        recording: str,
        start: float | int,
        seconds: float | int,
    ) -> Float16[Tensor, "T D"]:
        """Features of a crop: round(seconds * frame rate) frames, fewer at the recording's end."""
        entry = self._entry(recording)
        if not self.facts["speech"]:
            raise ValueError(
                f"{self.folder}: holds no speech features, for want of a teacher; {ANEW}"
            )
        rate = self.facts["speech"]["frame_rate"]
        first = min(max(0, round(start * rate)), entry.frames - 1)
        stop = min(first + max(1, round(seconds * rate)), entry.frames)
        return self._file(entry.shard).get_slice(f"speech/{recording}")[first:stop]

    def text(self, recording: str) -> CachedWords:
        """The words of a whole recording with their seconds, and the text teacher's states."""
        file = self._file(self._entry(recording).shard)
        if not self.facts["words"]:
            raise ValueError(f"{self.folder}: holds no words, for want of a transcriber; {ANEW}")
        spoken = json.loads(file.get_tensor(f"spoken/{recording}").numpy().tobytes())
        words = [Word(*word) for word in spoken]
        if not self.facts["text"]:
            nothing = torch.zeros(len(words), 0, dtype=torch.float16)
            return CachedWords(words, nothing, nothing.new_zeros(0))
        states, sentence = (
            file.get_tensor(f"{kind}/{recording}") for kind in ("words", "sentence")
        )
        return CachedWords(words, states, sentence)

    def _entry(self, recording: str) -> Entry:
        if recording not in self._index:
            raise ValueError(f"{self.folder}: has no recording {recording!r}; {AGAIN}")
        return self._index[recording]

    def _file(self, shard: str) -> Any:
        from safetensors import safe_open

        if self._process != os.getpid():  # Forked: the parent's files are not ours.
            self._files, self._process = {}, os.getpid()
        if shard not in self._files:
            self._files[shard] = safe_open(self.folder / shard, framework="pt")
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}
