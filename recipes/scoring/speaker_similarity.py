"""Whose voice a wave has: like the prompt's speaker in other recordings, and like other speakers.

Recordings are heard through the codec, as shards hold them: a voice cannot be more like its speaker
than its codec lets it be.
"""

import json
from pathlib import Path

import numpy as np

from codec.tokens import TokenShard
from eval.benchmark import Embed
from eval.speaker import similarity
from recipes.scoring.eval_items import Line, codes_of
from slm.voice import Voice

NUM_RECORDINGS = 3
"""Of a speaker, that stand for the voice."""
NUM_OTHERS = 20
"""Other speakers, spread over the list."""


class Likeness:
    """Similarities of what was said to the speakers of a shard."""

    def __init__(self, voice: Voice, shard: TokenShard, embed: Embed, sexes: Path | None = None):
        """`sexes`: a JSON object, speaker to sex; other speakers are then of the prompt's sex, and
        speakers whose sex it does not tell are compared with nobody."""
        self._voice, self._shard, self._embed = voice, shard, embed
        self._recordings: dict[str, list[int]] = {}
        for index, speaker in enumerate(shard.speakers):
            if speaker and shard.num_frames[index] > 0:
                self._recordings.setdefault(speaker, []).append(index)
        self.files = [*shard.files, *([sexes] if sexes is not None else [])]
        """What the similarities come from."""
        self._sexes = sexes_of(shard, sexes) if sexes is not None else None
        self._known: dict[int, np.ndarray | None] = {}

    def of(self, line: Line, wave: np.ndarray) -> dict[str, float]:
        """`similarity_speaker` and `similarity_others`, where there is something to compare."""
        try:
            ours = self._embed(wave, self._voice.codec.sample_rate)
        except ValueError:  # Silent, or too short to be a voice.
            return {}
        values = {
            "similarity_speaker": self._own(line, ours),
            "similarity_others": self._others(line, ours),
        }
        return {name: value for name, value in values.items() if value is not None}

    def _own(self, line: Line, ours: np.ndarray) -> float | None:
        """To the speaker's other recordings, or to what the prompt left of its own."""
        indices = [
            index
            for index in self._recordings.get(line.speaker, [])
            if self._shard.ids[index] not in (line.prompt_id, line.item)
        ]
        found = self._alike(indices, ours)
        if found is None and line.rest is not None and line.rest.size:
            try:
                rest = self._voice.decode(line.prompt.codes, line.rest)
                return similarity(ours, self._embed(rest, self._voice.codec.sample_rate))
            except ValueError:
                return None
        return found

    def _others(self, line: Line, ours: np.ndarray) -> float | None:
        names = [name for name in self._recordings if name != line.speaker]
        if self._sexes is not None:
            sex = self._sexes.get(line.speaker)
            names = [name for name in names if sex is not None and self._sexes.get(name) == sex]
        if not names:
            return None
        picks = np.linspace(0, len(names) - 1, min(NUM_OTHERS, len(names))).round().astype(int)
        found = [self._alike(self._recordings[names[pick]], ours) for pick in picks]
        heard = [value for value in found if value is not None]
        return float(np.mean(heard)) if heard else None

    def _alike(self, indices: list[int], ours: np.ndarray) -> float | None:
        """The mean over the first recordings that can be heard."""
        vectors: list[np.ndarray] = []
        for index in indices:
            vector = self._vector(index)
            if vector is not None:
                vectors.append(vector)
            if len(vectors) == NUM_RECORDINGS:
                break
        return float(np.mean([similarity(ours, one) for one in vectors])) if vectors else None

    def _vector(self, index: int) -> np.ndarray | None:
        if index not in self._known:
            codes = codes_of(self._shard[index])
            try:
                wave = self._voice.decode(codes[:, :0], codes)
                self._known[index] = self._embed(wave, self._voice.codec.sample_rate)
            except ValueError:
                self._known[index] = None
        return self._known[index]


def sexes_of(shard: TokenShard, path: Path) -> dict[str, str]:
    """Speaker to sex. Raises ValueError for a file that tells it of no speaker of the shard."""
    sexes = read_sexes(path)
    if set(shard.speakers).isdisjoint(sexes):
        raise ValueError(f"{path}: tells the sex of no speaker of {shard.files[0].parent}")
    return sexes


def read_sexes(path: Path) -> dict[str, str]:
    """Speaker to sex. Raises ValueError for what is no such file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not to be read as JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: give a JSON object, speaker to sex")
    return {str(speaker): str(sex) for speaker, sex in record.items()}
