"""The files of a feature cache: cache.json and safetensors shards, written whole and checked."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from codec.tokens import written_whole

logger = logging.getLogger(__name__)

FORMAT = 1
SHARD_BYTES = 256 * 2**20
"""A shard is written once it has so many; what is not yet written a kill costs."""
AGAIN = "write the cache again (recipes/cache_teachers.py): what is whole in it stays"
ANEW = "write another cache with one (recipes/cache_teachers.py), into a new folder"


class Entry(NamedTuple):
    """Where a recording lies, how long it is, and its number of speech features."""

    shard: str
    seconds: float
    frames: int


class DamagedFeatures(ValueError):
    """A shard that was not written whole."""


def read_facts(folder: Path) -> dict[str, Any]:
    """What made the cache, and its shards if it is finished. ValueError: it is no cache of ours."""
    path = folder / "cache.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no feature cache; make it with recipes/cache_teachers.py")
    try:
        facts = json.loads(path.read_text())
        version = facts["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not whole; remove it and {AGAIN}") from error
    if version != FORMAT:
        raise ValueError(
            f"{folder}: the cache has format {version!r}, this program knows {FORMAT}; write it "
            "into a new folder"
        )
    return facts


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    with written_whole(folder / "cache.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")


def claim(folder: Path, facts: Mapping[str, Any]) -> None:
    """Begins a cache, or checks that the folder's was made by the same teachers."""
    if not (folder / "cache.json").exists():
        if any(shard_files(folder)):
            raise ValueError(f"{folder}: has features but no cache.json; choose another folder")
        write_facts(folder, facts)
        return
    before = read_facts(folder)
    for kind in ("speech", "text", "words"):
        if before[kind] != facts[kind]:
            raise ValueError(
                f"{folder}: the cache there was made with {kind} {before[kind]}, not "
                f"{facts[kind]}; choose another folder, or remove this one"
            )


def check_teacher(
    folder: Path, kind: str, made: Mapping[str, Any] | None, expected: tuple[str, str] | None
) -> None:
    """ValueError unless the teacher is the (model, layer) that is expected."""
    if expected is None:
        return
    if made is None:
        raise ValueError(f"{folder}: the cache has no {kind} teacher; {ANEW}")
    same = Path(made["name"]).resolve() == Path(expected[0]).resolve()
    if not same or made["layer"] != expected[1]:
        raise ValueError(
            f"{folder}: the cache's {kind} teacher is {made['name']}, layer {made['layer']}, not "
            f"{expected[0]}, layer {expected[1]}; name that one, or write another cache"
        )


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*.safetensors"))


def check_length(
    where: Path,
    recording: str,
    frames: int,
    seconds: float,
    facts: Mapping[str, Any],
) -> None:
    """ValueError unless a recording of so many seconds has so many features, give or take one."""
    speech = facts["speech"]
    samples = round(seconds * speech["sample_rate"])
    expected = max(1, 1 + (samples - speech["receptive_field"]) // speech["hop_length"])
    if abs(frames - expected) > 1:
        raise ValueError(
            f"{where}: {recording} has {frames} features, but its {seconds:.3f} s make {expected}; "
            f"the recording or the file has changed: remove {where.name} and {AGAIN}"
        )


def read_shard(path: Path, facts: Mapping[str, Any]) -> dict[str, Entry]:
    """The recordings of a shard, from its header alone.

    Raises DamagedFeatures when the file is cut, ValueError when it is whole and wrong.
    """
    header = _header(path)
    notes = header.pop("__metadata__", {})
    if notes.get("stamp") != _stamp(facts):
        raise ValueError(f"{path}: made by other teachers; remove it and {AGAIN}")
    entries = {}
    for recording, seconds in json.loads(notes["seconds"]).items():
        frames = 0
        for kind, rank in (("speech", 2), ("words", 2), ("sentence", 1), ("spoken", 1)):
            teacher = facts[
                "words" if kind == "spoken" else "speech" if kind == "speech" else "text"
            ]
            if teacher is None:
                continue
            tensor = header.get(f"{kind}/{recording}")
            if tensor is None:
                raise ValueError(
                    f"{path}: {recording} lacks its {kind}; remove the file and {AGAIN}"
                )
            _check_tensor(path, f"{kind}/{recording}", tensor, rank, teacher.get("dimension"))
            frames = tensor["shape"][0] if kind == "speech" else frames
        if facts["speech"]:
            check_length(path, recording, frames, seconds, facts)
        entries[recording] = Entry(path.name, seconds, frames)
    return entries


def _check_tensor(
    path: Path, name: str, tensor: Mapping[str, Any], rank: int, dimension: int | None
) -> None:
    shape, kind = tensor["shape"], tensor["dtype"]
    wanted = "U8" if dimension is None else "F16"
    if len(shape) != rank or kind != wanted or dimension not in (None, shape[-1]):
        raise ValueError(
            f"{path}: {name} has shape {shape} of {kind}, where rank {rank} of {wanted} and a last "
            f"size of {dimension or 'any'} belong; remove the file and {AGAIN}"
        )


def _header(path: Path) -> dict[str, Any]:
    """A safetensors file's header: 8 bytes of its size, then JSON, then the tensors' bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if length < size else b"")
        except ValueError as error:
            raise DamagedFeatures(f"{path}: the shard is cut; {AGAIN}") from error
    ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
    if size != 8 + length + max(ends, default=0):
        raise DamagedFeatures(f"{path}: the shard is cut; {AGAIN}")
    return header


def _stamp(facts: Mapping[str, Any]) -> str:
    made = {key: facts[key] for key in ("format", "speech", "text", "words")}
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


class ShardWriter:
    """Collects recordings and writes them, a shard at a time."""

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
            with written_whole(path) as temporary:
                save_file(self.tensors, temporary, notes)
                # safetensors lets nobody else read its files; others may read the cache.
                temporary.chmod((self.folder / "cache.json").stat().st_mode & 0o777)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error}); is the disk full?") from error
        self.tensors, self.seconds, self.num_bytes = {}, {}, 0
