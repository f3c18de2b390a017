"""Writes a cache of teachers' features (codec/feature_cache.py reads it), resumable, over ranks."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from codec.audio import resample_batch
from codec.export import Skipped, batches_of, loaded, text_of
from codec.feature_shards import (
    FORMAT,
    DamagedFeatures,
    Entry,
    ShardWriter,
    claim,
    read_facts,
    read_shard,
    shard_files,
    write_facts,
)
from codec.speech_teachers import SpeechTeacher
from codec.teachers import TextTeacher
from codec.tokens import written_whole

if TYPE_CHECKING:
    from lhotse.cut import Cut

    from codec.words import Transcriber

logger = logging.getLogger(__name__)

WORDS_PER_HOUR = 10_000
"""Fluent reading; for the estimate of a cache's size only."""


class CacheSummary(NamedTuple):
    """What lies in a cache, and the recordings that could not be read."""

    num_recordings: int
    hours: float
    num_bytes: int
    skipped: list[Skipped]


def write_cache(
    folder: str | Path,
    cuts: Sequence["Cut"],
    *,
    speech: SpeechTeacher | None = None,
    text: TextTeacher | None = None,
    transcriber: "Transcriber | None" = None,
    recorded: bool = True,
    batch_seconds: float | int = 120.0,
    share: tuple[int, int] = (0, 1),
) -> CacheSummary:
    """Writes the features of this rank's share of whole recordings that are not in the folder yet.

    `share` is this process's rank and their number. With a `transcriber` the words are stored, with
    `text` their states as well: of the cuts' transcripts, aligned, or (`recorded=False`) of what is
    recognised. A batch holds up to `batch_seconds` of audio, padding included. Recordings that
    cannot be used are skipped and listed in skipped.jsonl. A process that is alone seals the cache;
    of several, one calls `seal_cache` when all are done. Raises ValueError, before anything is
    computed, when the disk is too small or the folder's cache was made by other teachers.
    """
    from tqdm import tqdm

    folder, (rank, world) = Path(folder), share
    work = _Work(speech, text, transcriber, recorded)
    facts = work.facts()
    if len({cut.id for cut in cuts}) < len(cuts):
        raise ValueError("an id comes twice in the list of cuts; ids must be unique")
    claim(folder, facts)
    done = _done(folder, rank, facts)
    _announce(folder, [cut for cut in cuts if cut.id not in done], facts)
    mine = [cut for cut in cuts[rank::world] if cut.id not in done]
    shards, skipped = ShardWriter(folder, rank, facts), []
    with tqdm(total=len(mine), desc="cache", unit="cut", disable=rank > 0) as bar:
        for batch in loaded(batches_of(mine, float(batch_seconds)), work.sample_rate):
            for cut, result in work.compute(batch):
                if isinstance(result, str):
                    logger.warning("skipped %s: %s", cut.id, result)
                    skipped.append(Skipped(cut.id, result))
                else:
                    shards.add(cut.id, *result)
            bar.update(len(batch))
    shards.flush()
    with written_whole(folder / f"skipped-{rank:03d}.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(entry._asdict()) + "\n" for entry in skipped))
    return seal_cache(folder) if world == 1 else _summary(folder, facts)


def seal_cache(folder: str | Path) -> CacheSummary:
    """Notes in cache.json what a whole cache consists of, once all ranks are done (one calls it).

    Raises ValueError when nothing at all could be read.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    summary = _summary(folder, facts)
    with written_whole(folder / "skipped.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(one._asdict()) + "\n" for one in summary.skipped))
    if summary.num_recordings == 0:
        reason = f"; the first: {summary.skipped[0].reason}" if summary.skipped else ""
        raise ValueError(f"{folder}: none of the recordings could be used{reason}")
    facts["shards"] = {path.name: path.stat().st_size for path in shard_files(folder)}
    write_facts(folder, facts)
    return summary


class _Work(NamedTuple):
    """What is computed of each recording."""

    speech: SpeechTeacher | None
    text: TextTeacher | None
    transcriber: Any
    recorded: bool

    def facts(self) -> dict[str, Any]:
        if self.text is not None and self.transcriber is None:
            raise ValueError("a text teacher needs a transcriber, which says when words are spoken")
        if self.speech is None and self.transcriber is None:
            raise ValueError("nothing to cache: name a speech teacher, a transcriber, or both")
        speech = text = words = None
        if self.speech is not None:
            keys = ("name", "layer", "dimension", "frame_rate", "sample_rate", "hop_length")
            speech = {key: getattr(self.speech, key) for key in (*keys, "receptive_field")}
        if self.text is not None:
            text = {key: getattr(self.text, key) for key in ("name", "layer", "dimension")}
        if self.transcriber is not None:
            words = {"transcriber": self.transcriber.name, "recorded": self.recorded}
            # Caches of format 1 from before there was a choice are English ones.
            if (language := getattr(self.transcriber, "language", "en")) != "en":
                words["language"] = language
        return {"format": FORMAT, "speech": speech, "text": text, "words": words}

    @property
    def sample_rate(self) -> int:
        return (self.speech or self.transcriber).sample_rate

    @torch.no_grad()
    def compute(
        self, batch: list[tuple["Cut", np.ndarray | str]]
    ) -> list[tuple["Cut", tuple[float, dict[str, Tensor]] | str]]:
        """Each cut with its seconds and tensors, or with why it has none."""
        results: dict[str, tuple[float, dict[str, Tensor]] | str] = {}
        readable: list[tuple[Cut, np.ndarray]] = []
        for cut, wave in batch:
            if isinstance(wave, str):
                results[cut.id] = wave
            elif self.transcriber is not None and self.recorded and not text_of(cut).strip():
                results[cut.id] = f"{cut.id}: has no transcript; use recognised words"
            else:
                readable.append((cut, wave))
        if readable:
            results.update(self._together(readable))
        return [(cut, results[cut.id]) for cut, _ in batch]

    def _together(self, readable: list[tuple["Cut", np.ndarray]]) -> dict[str, Any]:
        try:
            tensors = self._tensors(readable)
        except ValueError as error:
            if len(readable) == 1:
                return {readable[0][0].id: str(error)}
            # One of them, say a transcript that does not fit: the others need not suffer.
            return {cut.id: self._together([(cut, wave)])[cut.id] for cut, wave in readable}
        return {
            cut.id: (len(wave) / self.sample_rate, found)
            for (cut, wave), found in zip(readable, tensors, strict=True)
        }

    def _tensors(self, readable: list[tuple["Cut", np.ndarray]]) -> list[dict[str, Tensor]]:
        lengths = torch.tensor([len(wave) for _, wave in readable])
        padded = torch.zeros(len(readable), 1, int(lengths.max()))
        for row, (_, wave) in zip(padded, readable, strict=True):
            row[0, : len(wave)] = torch.from_numpy(wave)
        found: list[dict[str, Tensor]] = [{} for _ in readable]
        if self.speech is not None:
            device = self.speech.place["device"]
            values, frames = self.speech(padded.to(device), lengths.to(device))
            for tensors, states, count in zip(found, values, frames.tolist(), strict=True):
                tensors["speech"] = _stored(states[:count])
        if self.transcriber is not None:
            rate = self.transcriber.sample_rate
            waves = resample_batch(padded, self.sample_rate, rate)
            counts = (lengths * rate / self.sample_rate).ceil().long()
            texts = [text_of(cut) for cut, _ in readable] if self.recorded else None
            spoken = self.transcriber.words(waves, counts, texts)
            for tensors, words in zip(found, spoken, strict=True):
                tensors["spoken"] = _as_bytes([list(word) for word in words])
            if self.text is not None:
                texts_states = self.text([[word.text for word in words] for words in spoken])
                for tensors, states in zip(found, texts_states, strict=True):
                    tensors["words"] = _stored(states.words)
                    tensors["sentence"] = _stored(states.sentence)
        return found


def _stored(states: Tensor) -> Tensor:
    halved = states.to("cpu", torch.float16, copy=True)
    if not halved.isfinite().all():
        raise ValueError("its features do not fit into float16; choose another layer")
    return halved


def _as_bytes(words: list[list[Any]]) -> Tensor:
    return torch.from_numpy(np.frombuffer(json.dumps(words).encode(), np.uint8).copy())


def _done(folder: Path, rank: int, facts: Mapping[str, Any]) -> dict[str, Entry]:
    """What is there already. Shards that are cut, and a killed run's temporary files, go."""
    for leftover in folder.glob(f".features-{rank:03d}-*.tmp"):
        leftover.unlink(missing_ok=True)
    index: dict[str, Entry] = {}
    for path in shard_files(folder):
        try:
            index.update(read_shard(path, facts))
        except DamagedFeatures as error:
            logger.warning("%s: removed", error)
            path.unlink(missing_ok=True)
        except FileNotFoundError:  # Another rank has just removed it.
            continue
    return index


def _announce(folder: Path, cuts: Sequence["Cut"], facts: Mapping[str, Any]) -> None:
    """Tells what the cache will cost. ValueError: it is more than the disk has."""
    hours = sum(cut.duration for cut in cuts) / 3600
    parts, an_hour = [], 0.0
    if facts["speech"]:
        rate, dimension = facts["speech"]["frame_rate"], facts["speech"]["dimension"]
        parts.append(f"{rate:g} Hz x {dimension} x 2 bytes")
        an_hour += rate * 3600 * dimension * 2
    if facts["text"]:
        dimension = facts["text"]["dimension"]
        parts.append(f"about {WORDS_PER_HOUR} words an hour x {dimension} x 2 bytes")
        an_hour += WORDS_PER_HOUR * dimension * 2
    if facts["words"]:
        parts.append(f"about {WORDS_PER_HOUR} words an hour x 32 bytes")
        an_hour += WORDS_PER_HOUR * 32
    needed, free = hours * an_hour, shutil.disk_usage(folder).free
    logger.info(
        "%s: %d recordings to write, %.2f hours, %s = %.0f MB an hour, %.0f MB in all; %.0f MB of "
        "disk are free", folder, len(cuts), hours, " + ".join(parts), an_hour / 1e6, needed / 1e6,
        free / 1e6,
    )  # fmt: skip
    if needed > free:
        raise ValueError(
            f"{folder}: the cache needs {needed / 1e6:.0f} MB, but {free / 1e6:.0f} MB are free; "
            "make room, choose another disk, or compute the features while training"
        )


def _summary(folder: Path, facts: Mapping[str, Any]) -> CacheSummary:
    index: dict[str, Entry] = {}
    for path in shard_files(folder):
        index.update(read_shard(path, facts))
    num_bytes = sum(path.stat().st_size for path in shard_files(folder))
    lines = [
        line
        for path in sorted(folder.glob("skipped-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    skipped = {one["id"]: Skipped(**one) for one in map(json.loads, lines)}
    left = [one for one in skipped.values() if one.id not in index]
    hours = sum(entry.seconds for entry in index.values()) / 3600
    return CacheSummary(len(index), hours, num_bytes, left)
