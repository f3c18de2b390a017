"""Similarity of speech to recordings of its speaker, and of other speakers, from a list."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codec.audio import read_audio
from eval.benchmark import Embed
from eval.speaker import similarity
from recipes.scoring.lists import locate, read_entries
from recipes.scoring.speaker_similarity import NUM_OTHERS, NUM_RECORDINGS


class SpeakerRecording(NamedTuple):
    """A recording of a known speaker."""

    audio: Path
    speaker: str
    sex: str | None


def read_speakers(path: Path) -> list[SpeakerRecording]:
    """Returns the recordings of a list with audio, speaker and perhaps sex (or gender).

    Raises:
        ValueError: it is no such list.
    """
    return [
        SpeakerRecording(
            locate(entry["audio"], path),
            str(entry["speaker"]),
            entry.get("sex", entry.get("gender")),
        )
        for entry in read_entries(path, ("audio", "speaker"), unique=False)
    ]


class SpeakerReferences:
    """Embeddings of recordings by speaker, computed when they are needed."""

    def __init__(self, recordings: Sequence[SpeakerRecording], embed: Embed, rate: int):
        self._embed, self._rate = embed, rate
        self._files: dict[str, list[Path]] = {}
        self._sexes: dict[str, str | None] = {}
        for one in recordings:
            self._files.setdefault(one.speaker, []).append(one.audio)
            self._sexes.setdefault(one.speaker, one.sex)
        self._embeddings: dict[Path, np.ndarray | None] = {}

    def of(
        self, speaker: str, embedding: np.ndarray, exclude: Collection[Path] = ()
    ) -> Mapping[str, float]:
        """Returns `similarity_speaker`, the mean over recordings of the speaker, and
        `similarity_others`, the mean over other speakers (of the same sex, where the list has it);
        those that are defined.

        Args:
            exclude: recordings that are not the speaker's references, such as the prompt.
        """
        if speaker not in self._files:
            return {}
        left_out = {path.resolve() for path in exclude}
        own = [path for path in self._files[speaker] if path.resolve() not in left_out]
        sex = self._sexes[speaker]
        others = [
            name for name in self._files
            if name != speaker and (sex is None or self._sexes[name] == sex)
        ]  # fmt: skip
        picks = np.linspace(0, len(others) - 1, min(NUM_OTHERS, len(others))).round().astype(int)
        found = [self._to_recordings(self._files[others[pick]], embedding) for pick in picks]
        defined = [value for value in found if value is not None]
        values = {
            "similarity_speaker": self._to_recordings(own, embedding),
            "similarity_others": float(np.mean(defined)) if defined else None,
        }
        return {name: value for name, value in values.items() if value is not None}

    def _to_recordings(self, files: Sequence[Path], embedding: np.ndarray) -> float | None:
        """The mean over the first NUM_RECORDINGS that have an embedding."""
        found: list[float] = []
        for file in files:
            if file not in self._embeddings:
                try:
                    self._embeddings[file] = self._embed(read_audio(file, self._rate), self._rate)
                except ValueError:  # Missing, silent or too short.
                    self._embeddings[file] = None
            reference = self._embeddings[file]
            if reference is not None:
                found.append(similarity(embedding, reference))
            if len(found) == NUM_RECORDINGS:
                break
        return float(np.mean(found)) if found else None


def check_speakers(entries: Sequence[Mapping[str, Any]], recordings: Sequence[SpeakerRecording],
                   path: Path) -> None:  # fmt: skip
    """Raises ValueError if no entry's `speaker` is in the list `path`."""
    known = {one.speaker for one in recordings}
    if not any(str(entry.get("speaker")) in known for entry in entries):
        raise ValueError(f"--speakers {path}: has no speaker of the list (its column speaker)")
