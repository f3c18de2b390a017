"""Speaker similarity of synthesized speech to its speaker's recordings, and to other speakers'.

Reference recordings are decoded from their codes, so that the codec's own loss of similarity is in
both.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from codec.io import parse_json
from codec.tokens import TokenShard
from eval.benchmark import Embed
from eval.speaker import similarity
from recipes.scoring.eval_items import EvalItem, codes_of
from slm.voice import Voice

NUM_RECORDINGS = 3
"""Reference recordings of a speaker, whose similarities are averaged."""
NUM_OTHERS = 20
"""Other speakers, evenly spaced over the shard."""


class SpeakerSimilarity:
    """Similarities of synthesized waves to the speakers of a shard."""

    def __init__(self, voice: Voice, shard: TokenShard, embed: Embed, sexes: Path | None = None):
        """
        Args:
            sexes: JSON file, speaker to sex. Other speakers are then of the prompt's sex, and
                speakers that are not in the file are compared with no others.

        Raises:
            ValueError: `sexes` is no such file, or has no speaker of the shard.
        """
        self._voice, self._shard, self._embed = voice, shard, embed
        self._recordings: dict[str, list[int]] = {}
        for index, speaker in enumerate(shard.speakers):
            if speaker and shard.num_frames[index] > 0:
                self._recordings.setdefault(speaker, []).append(index)
        self.files = [*shard.files, *([sexes] if sexes is not None else [])]
        """Files that the similarities depend on."""
        self._sexes = read_sexes(sexes, shard) if sexes is not None else None
        self._embeddings: dict[int, np.ndarray | None] = {}

    def of(self, item: EvalItem, wave: Float[np.ndarray, " S"]) -> dict[str, float]:
        """Returns `similarity_speaker` and `similarity_others` of a wave at the codec's sample
        rate, those that are defined."""
        try:
            embedding = self._embed(wave, self._voice.codec.sample_rate)
        except ValueError:  # Silent, or too short.
            return {}
        values = {
            "similarity_speaker": self._to_speaker(item, embedding),
            "similarity_others": self._to_others(item, embedding),
        }
        return {name: value for name, value in values.items() if value is not None}

    def _to_speaker(self, item: EvalItem, embedding: np.ndarray) -> float | None:
        """To the speaker's other recordings, or to the prompt's recording after the prompt."""
        indices = [
            index
            for index in self._recordings.get(item.speaker, [])
            if self._shard.ids[index] not in (item.prompt_id, item.source_id)
        ]
        found = self._to_recordings(indices, embedding)
        if found is None and item.remainder is not None and item.remainder.size:
            try:
                wave = self._voice.decode(item.prompt.codes, item.remainder)
                return similarity(embedding, self._embed(wave, self._voice.codec.sample_rate))
            except ValueError:
                return None
        return found

    def _to_others(self, item: EvalItem, embedding: np.ndarray) -> float | None:
        names = [name for name in self._recordings if name != item.speaker]
        if self._sexes is not None:
            sex = self._sexes.get(item.speaker)
            names = [name for name in names if sex is not None and self._sexes.get(name) == sex]
        if not names:
            return None
        picks = np.linspace(0, len(names) - 1, min(NUM_OTHERS, len(names))).round().astype(int)
        found = [self._to_recordings(self._recordings[names[pick]], embedding) for pick in picks]
        defined = [value for value in found if value is not None]
        return float(np.mean(defined)) if defined else None

    def _to_recordings(self, indices: list[int], embedding: np.ndarray) -> float | None:
        """The mean over the first NUM_RECORDINGS that have an embedding."""
        found: list[float] = []
        for index in indices:
            if index not in self._embeddings:
                codes = codes_of(self._shard[index])
                try:
                    wave = self._voice.decode(codes[:, :0], codes)
                    self._embeddings[index] = self._embed(wave, self._voice.codec.sample_rate)
                except ValueError:
                    self._embeddings[index] = None
            reference = self._embeddings[index]
            if reference is not None:
                found.append(similarity(embedding, reference))
            if len(found) == NUM_RECORDINGS:
                break
        return float(np.mean(found)) if found else None


def read_sexes(path: Path, shard: TokenShard) -> dict[str, str]:
    """Returns speaker to sex.

    Raises:
        ValueError: the file holds no JSON object, or no speaker of the shard.
    """
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: must hold a JSON object, speaker to sex")
    if set(shard.speakers).isdisjoint(record):
        raise ValueError(f"{path}: has no speaker of {shard.files[0].parent}")
    return {str(speaker): str(sex) for speaker, sex in record.items()}
