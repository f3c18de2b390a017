"""Teachers' features of entire recordings, computed once and read crop by crop.

A cache is a folder of safetensors shards and cache.json, which lists the teachers (`facts`) and,
once the cache is complete, the shards with their sizes. A shard has for each recording
`speech/ID` (T,D), `words/ID` (W,D) and `sentence/ID` (D,) in float16, and `spoken/ID`, words with
start and end in seconds as UTF-8 JSON; kinds that were not computed are absent.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor

from codec.audio import resample_batch
from codec.distillation.teachers import SpeechTeacher, TextTeacher
from codec.distillation.word_alignment import Word
from codec.io import DAMAGE, atomic_file, parse_json, sha256_of
from codec.json_lines import read_json_lines, write_json_lines
from codec.tokenize import SkippedRecording, batches_of, loaded, text_of

if TYPE_CHECKING:
    from lhotse.cut import Cut

    from codec.distillation.word_alignment import Transcriber

logger = logging.getLogger(__name__)


FORMAT = 1
SHARD_BYTES = 256 * 2**20
"""A shard is written when its tensors reach this size; an interrupted run loses less than one."""
WORDS_PER_HOUR = 10_000
"""Of fluent reading, to estimate the size of a cache."""
AGAIN = "run recipes/cache_teachers.py again (complete shards are kept)"
NEW_CACHE = "write another cache with one into a new folder (recipes/cache_teachers.py)"


class CacheEntry(NamedTuple):
    """Position of a recording in the cache."""

    shard: str
    seconds: float
    frames: int
    """Of its speech features; 0 without a speech teacher."""


class CorruptedShard(ValueError):
    """A truncated shard."""


class CachedWords(NamedTuple):
    """Words of a recording, the text teacher's state of each, and the sentence's state.

    D is 0 in a cache without a text teacher.
    """

    words: list[Word]
    states: Float16[Tensor, "W D"]
    sentence: Float16[Tensor, " D"]


class CacheSummary(NamedTuple):
    """Size of a cache, and the recordings that were skipped."""

    num_recordings: int
    hours: float
    num_bytes: int
    skipped: list[SkippedRecording]


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of cache.json: format, speech, text, words, and shards once it is complete.

    Raises:
        ValueError: there is no cache.json, or it is corrupted or of another format version.
    """
    path = folder / "cache.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no feature cache; recipes/cache_teachers.py writes one")
    try:
        facts = parse_json(path.read_text())
        version = facts["format"]
    except DAMAGE as error:
        raise ValueError(f"{path}: corrupted file; remove it and {AGAIN}") from error
    if version != FORMAT:
        raise ValueError(
            f"{folder}: the cache has format {version!r}, this version reads {FORMAT}; write it "
            "into a new folder"
        )
    return facts


def _write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    with atomic_file(folder / "cache.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")


def _create_or_check(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes cache.json, or checks that the existing one names the same teachers."""
    if not (folder / "cache.json").exists():
        if any(_shard_files(folder)):
            raise ValueError(f"{folder}: has features but no cache.json; choose another folder")
        _write_facts(folder, facts)
        return
    before = read_facts(folder)
    for kind in ("speech", "text", "words"):
        if before[kind] != facts[kind]:
            raise ValueError(
                f"{folder}: the cache there was made with {kind} {before[kind]}, not "
                f"{facts[kind]}; choose another folder, or remove this one"
            )


def _check_teacher(
    folder: Path, kind: str, cached: Mapping[str, Any] | None, expected: tuple[str, str] | None
) -> None:
    """ValueError unless the cached teacher is the expected (model, layer)."""
    if expected is None:
        return
    if cached is None:
        raise ValueError(f"{folder}: the cache has no {kind} teacher; {NEW_CACHE}")
    same = Path(cached["name"]).resolve() == Path(expected[0]).resolve()
    if not same or cached["layer"] != expected[1]:
        raise ValueError(
            f"{folder}: the cache's {kind} teacher is {cached['name']}, layer {cached['layer']}, "
            f"not {expected[0]}, layer {expected[1]}; name that one, or write another cache"
        )


def _shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*.safetensors"))


def _check_length(
    where: Path, recording: str, frames: int, seconds: float, speech: Mapping[str, Any]
) -> None:
    """ValueError unless `frames` is the number of features of `seconds` of audio, within one."""
    samples = round(seconds * speech["sample_rate"])
    expected = max(1, 1 + (samples - speech["receptive_field"]) // speech["hop_length"])
    if abs(frames - expected) > 1:
        raise ValueError(
            f"{where}: {recording} has {frames} features, but {seconds:.3f} s have {expected}; "
            f"the recording or the file has changed: remove {where.name} and {AGAIN}"
        )


def _read_shard(path: Path, facts: Mapping[str, Any]) -> dict[str, CacheEntry]:
    """The recordings of a shard, from its header alone.

    Raises CorruptedShard for a truncated file, ValueError for other wrong content.
    """
    header = _header(path)
    notes = header.pop("__metadata__", {})
    if notes.get("stamp") != _stamp(facts):
        raise ValueError(f"{path}: features of other teachers; remove it and {AGAIN}")
    entries = {}
    for recording, seconds in parse_json(notes["seconds"]).items():
        frames = 0
        for kind, rank in (("speech", 2), ("words", 2), ("sentence", 1), ("spoken", 1)):
            teacher = facts[
                "words" if kind == "spoken" else "speech" if kind == "speech" else "text"
            ]
            if teacher is None:
                continue
            tensor = header.get(f"{kind}/{recording}")
            if tensor is None:
                raise ValueError(f"{path}: {recording} has no {kind}; remove the file and {AGAIN}")
            _check_tensor(path, f"{kind}/{recording}", tensor, rank, teacher.get("dimension"))
            frames = tensor["shape"][0] if kind == "speech" else frames
        if facts["speech"]:
            _check_length(path, recording, frames, seconds, facts["speech"])
        entries[recording] = CacheEntry(path.name, seconds, frames)
    return entries


def _check_tensor(
    path: Path, name: str, tensor: Mapping[str, Any], rank: int, dimension: int | None
) -> None:
    shape, kind = tensor["shape"], tensor["dtype"]
    wanted = "U8" if dimension is None else "F16"
    if len(shape) != rank or kind != wanted or dimension not in (None, shape[-1]):
        raise ValueError(
            f"{path}: {name} has shape {shape} of {kind}, expected rank {rank} of {wanted} and a "
            f"last size of {dimension or 'any'}; remove the file and {AGAIN}"
        )


def _header(path: Path) -> dict[str, Any]:
    """Header of a safetensors file, which is: 8 bytes of its length, JSON, the tensors' bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = parse_json(file.read(length) if length < size else b"")
        except ValueError as error:
            raise CorruptedShard(f"{path}: the shard is truncated; {AGAIN}") from error
    ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
    if size != 8 + length + max(ends, default=0):
        raise CorruptedShard(f"{path}: the shard is truncated; {AGAIN}")
    return header


def _stamp(facts: Mapping[str, Any]) -> str:
    made = {key: facts[key] for key in ("format", "speech", "text", "words")}
    return sha256_of(json.dumps(made, sort_keys=True), 16)


class FeatureCache:
    """Random access to a complete cache, also from loader processes: each opens the files once."""

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], index: Mapping[str, CacheEntry]
    ) -> None:
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
        """Reads and checks the headers of all shards.

        Args:
            speech: (model, layer) of the expected speech teacher.
            text: (model, layer) of the expected text teacher.

        Raises:
            ValueError: the cache is incomplete, of other teachers or another format version; a
                shard is missing or truncated; features have a wrong rank or length.
        """
        folder = Path(folder)
        facts = read_facts(folder)
        for kind, expected in (("speech", speech), ("text", text)):
            _check_teacher(folder, kind, facts[kind], expected)
        index: dict[str, CacheEntry] = {}
        if "shards" not in facts:
            raise ValueError(f"{folder}: the cache is incomplete; {AGAIN}")
        for name, size in facts["shards"].items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path}: the shard is missing; {AGAIN}")
            if path.stat().st_size != size:
                raise ValueError(f"{path}: the shard is truncated or changed; {AGAIN}")
            index.update(_read_shard(path, facts))
        return cls(folder, facts, index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, recording: object) -> bool:
        return recording in self._index

    @property
    def skipped(self) -> set[str]:
        """Ids of the recordings that were skipped when the cache was written (skipped.jsonl)."""
        return {line.value["id"] for line in read_json_lines(self.folder / "skipped.jsonl")}

    def missing(self, cuts: Iterable["Cut"]) -> list[str]:
        """Ids of the cuts that are not in the cache.

        Raises:
            ValueError: a cut's duration and features differ by more than one frame.
        """
        absent = []
        for cut in cuts:
            entry = self._index.get(cut.id)
            if entry is None:
                absent.append(cut.id)
            elif self.facts["speech"]:
                _check_length(self.folder, cut.id, entry.frames, cut.duration, self.facts["speech"])
        return absent

    def speech(
        self, recording: str, start: float | int, seconds: float | int
    ) -> Float16[Tensor, "T D"]:
        """Features of a crop: T = round(seconds * frame rate), less at the recording's end.

        Raises:
            ValueError: the cache lacks the recording or has no speech teacher.
        """
        entry = self._entry(recording)
        if not self.facts["speech"]:
            raise ValueError(f"{self.folder}: the cache has no speech teacher; {NEW_CACHE}")
        rate = self.facts["speech"]["frame_rate"]
        first = min(max(0, round(start * rate)), entry.frames - 1)
        stop = min(first + max(1, round(seconds * rate)), entry.frames)
        return self._file(entry.shard).get_slice(f"speech/{recording}")[first:stop]

    def text(self, recording: str) -> CachedWords:
        """Words of an entire recording and the text teacher's states.

        Raises:
            ValueError: the cache lacks the recording or has no transcriber.
        """
        file = self._file(self._entry(recording).shard)
        if not self.facts["words"]:
            raise ValueError(f"{self.folder}: the cache has no transcriber; {NEW_CACHE}")
        listed = parse_json(file.get_tensor(f"spoken/{recording}").numpy().tobytes())
        words = [Word(*word) for word in listed]
        if not self.facts["text"]:
            empty = torch.zeros(len(words), 0, dtype=torch.float16)
            return CachedWords(words, empty, empty.new_zeros(0))
        states, sentence = (
            file.get_tensor(f"{kind}/{recording}") for kind in ("words", "sentence")
        )
        return CachedWords(words, states, sentence)

    def _entry(self, recording: str) -> CacheEntry:
        if recording not in self._index:
            raise ValueError(f"{self.folder}: no recording {recording!r}; {AGAIN}")
        return self._index[recording]

    def _file(self, shard: str) -> Any:
        from safetensors import safe_open

        if self._process != os.getpid():  # After a fork, do not share the parent's files.
            self._files, self._process = {}, os.getpid()
        if shard not in self._files:
            self._files[shard] = safe_open(self.folder / shard, framework="pt")
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


class _ShardWriter:
    """Collects tensors of recordings and writes a shard when it is full."""

    def __init__(self, folder: Path, rank: int, facts: Mapping[str, Any]) -> None:
        self.folder, self.rank, self.stamp = folder, rank, _stamp(facts)
        self.tensors: dict[str, Tensor] = {}
        self.seconds: dict[str, float] = {}
        self.num_bytes = 0

    def add(self, recording: str, seconds: float, tensors: Mapping[str, Tensor]) -> None:
        self.tensors |= {f"{kind}/{recording}": tensor for kind, tensor in tensors.items()}
        self.seconds[recording] = seconds
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.num_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self.seconds:
            return
        number = 0
        while (path := self.folder / f"features-{self.rank:03d}-{number:05d}.safetensors").exists():
            number += 1
        notes = {"stamp": self.stamp, "seconds": json.dumps(self.seconds)}
        try:
            with atomic_file(path) as temporary:
                save_file(self.tensors, temporary, notes)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error}); is the disk full?") from error
        self.tensors, self.seconds, self.num_bytes = {}, {}, 0


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
    """Computes and writes this rank's share of the recordings that are not in the folder yet.

    Recordings that cannot be used are skipped and listed in skipped.jsonl. A single process
    completes the cache; of several, one calls `complete_cache` when all are done.

    Args:
        text: needs a `transcriber`.
        transcriber: stores words with times: of the cuts' transcripts, by forced alignment, or
            (`recorded=False`) recognized ones.
        batch_seconds: audio in a batch, including padding.
        share: this process's rank, and the number of processes.

    Raises:
        ValueError: the disk is too small, the folder has a cache of other teachers, an id occurs
            twice, or there is nothing to compute; before anything is computed.
    """
    from tqdm import tqdm

    folder, (rank, world) = Path(folder), share
    extractor = _Extractor(speech, text, transcriber, recorded)
    facts = extractor.facts()
    if len({cut.id for cut in cuts}) < len(cuts):
        raise ValueError("an id occurs twice in the list of cuts; ids must be unique")
    _create_or_check(folder, facts)
    done = _existing(folder, rank, facts)
    _check_disk(folder, [cut for cut in cuts if cut.id not in done], facts)
    mine = [cut for cut in cuts[rank::world] if cut.id not in done]
    shards, skipped = _ShardWriter(folder, rank, facts), []
    with tqdm(total=len(mine), desc="cache", unit="cut", disable=rank > 0) as bar:
        for batch in loaded(batches_of(mine, float(batch_seconds)), extractor.sample_rate):
            for cut, result in extractor.compute(batch):
                if isinstance(result, str):
                    logger.warning("skipped %s: %s", cut.id, result)
                    skipped.append(SkippedRecording(cut.id, result))
                else:
                    shards.add(cut.id, *result)
            bar.update(len(batch))
    shards.flush()
    listed = folder / f"skipped-{rank:03d}.jsonl"
    write_json_lines(listed, (entry._asdict() for entry in skipped))
    return complete_cache(folder) if world == 1 else _summary(folder, facts)


def complete_cache(folder: str | Path) -> CacheSummary:
    """Writes the list of shards into cache.json; one process calls it once all ranks are done.

    Raises:
        ValueError: no recording could be used.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    summary = _summary(folder, facts)
    write_json_lines(folder / "skipped.jsonl", (one._asdict() for one in summary.skipped))
    if summary.num_recordings == 0:
        reason = f"; the first: {summary.skipped[0].reason}" if summary.skipped else ""
        raise ValueError(f"{folder}: none of the recordings could be used{reason}")
    facts["shards"] = {path.name: path.stat().st_size for path in _shard_files(folder)}
    _write_facts(folder, facts)
    return summary


class _Extractor(NamedTuple):
    """Computes the tensors of recordings."""

    speech: SpeechTeacher | None
    text: TextTeacher | None
    transcriber: Any
    recorded: bool

    def facts(self) -> dict[str, Any]:
        if self.text is not None and self.transcriber is None:
            raise ValueError("a text teacher needs a transcriber, for the times of words")
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
            # Older caches of format 1 have no language: they are English.
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
        """Each cut with its seconds and tensors, or with the reason why it has none."""
        results: dict[str, tuple[float, dict[str, Tensor]] | str] = {}
        readable: list[tuple[Cut, np.ndarray]] = []
        for cut, wave in batch:
            if isinstance(wave, str):
                results[cut.id] = wave
            elif self.transcriber is not None and self.recorded and not text_of(cut).strip():
                results[cut.id] = f"{cut.id}: has no transcript; use recognized words"
            else:
                readable.append((cut, wave))
        if readable:
            results.update(self._compute_batch(readable))
        return [(cut, results[cut.id]) for cut, _ in batch]

    def _compute_batch(self, readable: list[tuple["Cut", np.ndarray]]) -> dict[str, Any]:
        try:
            tensors = self._tensors(readable)
        except ValueError as error:
            if len(readable) == 1:
                return {readable[0][0].id: str(error)}
            # An error in one item, e.g. in its transcript, must not affect the others.
            return {cut.id: self._compute_batch([(cut, wave)])[cut.id] for cut, wave in readable}
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
            device = self.speech.device
            values, frames = self.speech(padded.to(device), lengths.to(device))
            for tensors, states, count in zip(found, values, frames.tolist(), strict=True):
                tensors["speech"] = _to_float16(states[:count])
        if self.transcriber is not None:
            rate = self.transcriber.sample_rate
            waves = resample_batch(padded, self.sample_rate, rate)
            counts = (lengths * rate / self.sample_rate).ceil().long()
            texts = [text_of(cut) for cut, _ in readable] if self.recorded else None
            items = self.transcriber.words(waves, counts, texts)
            for tensors, words in zip(found, items, strict=True):
                encoded = json.dumps([list(word) for word in words]).encode()
                tensors["spoken"] = torch.from_numpy(np.frombuffer(encoded, np.uint8).copy())
            if self.text is not None:
                all_states = self.text([[word.text for word in words] for words in items])
                for tensors, states in zip(found, all_states, strict=True):
                    tensors["words"] = _to_float16(states.words)
                    tensors["sentence"] = _to_float16(states.sentence)
        return found


def _to_float16(states: Tensor) -> Tensor:
    halved = states.to("cpu", torch.float16, copy=True)
    if not halved.isfinite().all():
        raise ValueError("its features do not fit into float16; choose another layer")
    return halved


def _existing(folder: Path, rank: int, facts: Mapping[str, Any]) -> dict[str, CacheEntry]:
    """Recordings in the folder; removes truncated shards and temporary files of a killed run."""
    for leftover in folder.glob(f".features-{rank:03d}-*.tmp"):
        leftover.unlink(missing_ok=True)
    index: dict[str, CacheEntry] = {}
    for path in _shard_files(folder):
        try:
            index.update(_read_shard(path, facts))
        except CorruptedShard as error:
            logger.warning("%s: removed", error)
            path.unlink(missing_ok=True)
        except FileNotFoundError:  # Another rank has removed it.
            continue
    return index


def _check_disk(folder: Path, cuts: Sequence["Cut"], facts: Mapping[str, Any]) -> None:
    """Logs the expected size of the cache. ValueError: the disk has less space."""
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
    index: dict[str, CacheEntry] = {}
    for path in _shard_files(folder):
        index.update(_read_shard(path, facts))
    num_bytes = sum(path.stat().st_size for path in _shard_files(folder))
    files = sorted(folder.glob("skipped-*.jsonl"))
    lines = [line.value for path in files for line in read_json_lines(path)]
    skipped = {one["id"]: SkippedRecording(**one) for one in lines}
    skipped = [one for one in skipped.values() if one.id not in index]
    hours = sum(entry.seconds for entry in index.values()) / 3600
    return CacheSummary(len(index), hours, num_bytes, skipped)
