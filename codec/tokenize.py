"""Encoding of cuts to token shards: batched, shared by ranks, resumable after a kill.

The cuts are split into numbered parts by their durations alone, so that any number of ranks writes
the same files. Parts are written atomically: a restart writes those that are missing.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt16

from codec.audio import stream_audio
from codec.io import parse_json, sha256_of
from codec.json_lines import write_json_lines
from codec.models.base import SpeechCodec
from codec.tokens import CodecStamp, DamagedShard, TokenRow, TokenShard, read_notes, write_shard
from codec.training.data import _single_file, load_cut

if TYPE_CHECKING:
    from lhotse.cut import Cut

logger = logging.getLogger(__name__)

PART_HOURS = 1.0
"""Of speech in a part: a few megabytes of codes."""


class SkippedRecording(NamedTuple):
    """A cut or recording that could not be used."""

    id: str
    reason: str
    """One line for the user."""


class Encoded(NamedTuple):
    """Codes of a recording, and its duration."""

    codes: UInt16[np.ndarray, "Q T"]
    seconds: float


class Summary(NamedTuple):
    """Size of a finished export."""

    num_utterances: int
    hours: float
    """Of audio, without the skipped recordings."""
    skipped: list[SkippedRecording]


def export_tokens(
    cuts: Sequence["Cut"],
    codec: SpeechCodec,
    folder: str | Path,
    *,
    numbers: Iterable[int] | None = None,
    part_hours: float = PART_HOURS,
    batch_seconds: float = 120.0,
    retry_skipped: bool = False,
    on_part: Callable[[int], object] = lambda num_cuts: None,
) -> None:
    """Encodes cuts and writes missing parts, `tokens-00003-of-00042.parquet` and so on.

    Only one export may run in a folder. Cuts that cannot be read are skipped and listed in the
    metadata of their part.

    Args:
        numbers: ascending numbers of the parts that this process writes, from 0; the first one
            beyond the last part ends it. None: all parts.
        part_hours: as `parts_of` has it.
        batch_seconds: maximum duration of a batch, with padding. A longer cut is a batch by itself;
            it is read in blocks if it spans an entire recording.
        retry_skipped: export parts again that list skipped cuts.
        on_part: called after each part, also one that exists already, with the number of cuts up
            to its end.

    Raises:
        ValueError: the list of cuts is empty or has an id twice, or the folder has parts of another
            codec, another list of cuts or another `part_hours`.
    """
    folder = Path(folder)
    _check_ids(cuts)
    parts = parts_of(cuts, part_hours)
    names = part_names(len(parts))
    strangers = sorted({path.name for path in folder.glob("*.parquet")} - set(names))
    if strangers:
        raise ValueError(
            f"{folder}: {strangers[0]} is no part of this export, which has {len(parts)} parts; "
            "choose an empty folder"
        )
    stamp = codec.stamp  # It hashes all weights: compute it once.
    for number in numbers if numbers is not None else itertools.count():
        if number >= len(parts):
            break
        path = folder / names[number]
        part = [cuts[index] for index in parts[number]]
        digest = _list_digest(part)
        if not _is_done(path, stamp, digest, retry_skipped):
            for leftover in folder.glob(f".{path.name}.*.tmp"):  # Of a run that was killed.
                leftover.unlink(missing_ok=True)
            rows, skipped = _encode_part(part, codec, batch_seconds)
            notes = {"cuts": digest, "skipped": json.dumps(skipped)}
            write_shard(path, rows, stamp, notes)
        on_part(parts[number].stop)


def summarize(folder: str | Path, num_parts: int) -> Summary:
    """Reads all parts and writes skipped.jsonl; one rank calls it once all ranks are done.

    Raises:
        ValueError: a part is missing or corrupted, or no recording could be read.
    """
    folder = Path(folder)
    files = [folder / name for name in part_names(num_parts)]
    shard = TokenShard.open(folder)
    skipped = [
        SkippedRecording(*entry)
        for file in files
        for entry in parse_json(read_notes(file)["skipped"])
    ]
    write_json_lines(folder / "skipped.jsonl", (entry._asdict() for entry in skipped))
    if len(shard) == 0:
        raise ValueError(
            f"none of the {len(skipped)} recordings could be read; the first: {skipped[0].reason}"
        )
    return Summary(len(shard), float(shard.durations.sum()) / 3600, skipped)


def parts_of(cuts: Sequence["Cut"], part_hours: float = PART_HOURS) -> list[range]:
    """Returns the positions of each part's cuts.

    Args:
        part_hours: duration of a part. A cut is in the part in which it begins, so that a longer
            cut makes a longer part.
    """
    milliseconds = np.array([round(1000 * cut.duration) for cut in cuts], dtype=np.int64)
    begin = np.cumsum(milliseconds) - milliseconds
    _, starts = np.unique(begin // max(1, round(3600_000 * part_hours)), return_index=True)
    ends = [*starts.tolist(), len(cuts)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def part_names(num_parts: int) -> list[str]:
    """File names of the parts of an export, in order."""
    return [f"tokens-{part:05d}-of-{num_parts:05d}.parquet" for part in range(num_parts)]


def _check_ids(cuts: Sequence["Cut"]) -> None:
    if not cuts:
        raise ValueError("the list of cuts is empty: nothing to export")
    seen: set[str] = set()
    for cut in cuts:
        if cut.id in seen:
            raise ValueError(f"the cut id {cut.id!r} occurs twice in the list; ids must be unique")
        seen.add(cut.id)


def _list_digest(cuts: Sequence["Cut"]) -> str:
    listed = "\n".join(f"{cut.id}\t{cut.duration}\t{text_of(cut)}" for cut in cuts)
    return sha256_of(listed, 16)


def _is_done(path: Path, stamp: CodecStamp, digest: str, retry_skipped: bool) -> bool:
    if not path.exists():
        return False
    try:
        for _ in TokenShard.open(path, expect=stamp):  # Reads and checks all codes.
            pass
        notes = read_notes(path)
    except DamagedShard as error:
        logger.warning("%s; writing it again", error)
        return False
    if notes.get("cuts") != digest:
        raise ValueError(f"{path}: made from another list of cuts; choose an empty folder")
    return not (retry_skipped and parse_json(notes["skipped"]))


def _encode_part(
    cuts: Sequence["Cut"], codec: SpeechCodec, batch_seconds: float
) -> tuple[list[TokenRow], list[SkippedRecording]]:
    rows: dict[str, TokenRow] = {}
    skipped: list[SkippedRecording] = []

    def skip(cut: "Cut", reason: str) -> None:
        logger.warning("skipped %s: %s", cut.id, reason)
        skipped.append(SkippedRecording(cut.id, reason))

    short: list[Cut] = []
    for cut in cuts:
        source = _entire_file(cut) if cut.duration > batch_seconds else None
        if source is None:
            short.append(cut)
            continue
        try:
            rows[cut.id] = _row(cut, *encode_recording(source, codec))
        except ValueError as error:
            skip(cut, str(error))
    for batch in loaded(batches_of(short, batch_seconds), codec.sample_rate):
        readable = [(cut, wave) for cut, wave in batch if isinstance(wave, np.ndarray)]
        for cut, reason in batch:
            if isinstance(reason, str):
                skip(cut, reason)
        if readable:
            all_codes = _encode([wave for _, wave in readable], codec)
            for (cut, wave), codes in zip(readable, all_codes, strict=True):
                rows[cut.id] = _row(cut, codes, len(wave) / codec.sample_rate)
    return [rows[cut.id] for cut in cuts if cut.id in rows], skipped


def encode_recording(path: str | Path, codec: SpeechCodec) -> Encoded:
    """Codes of one recording of any length, in bounded memory.

    Raises:
        ValueError: the recording cannot be read, or is empty or silent.
    """
    samples = 0

    def counted(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal samples
        for block in blocks:
            samples += len(block)
            yield block

    codes = codec.encode_stream(counted(stream_audio(path, codec.sample_rate)))
    return Encoded(codes.astype(np.uint16), samples / codec.sample_rate)


def _entire_file(cut: Any) -> str | None:
    """The file of a cut that spans an entire recording, else None."""
    source = _single_file(cut)
    starts = source is not None and cut.start == 0
    return source if starts and abs(cut.duration - cut.recording.duration) < 1e-6 else None


def batches_of(cuts: Sequence["Cut"], batch_seconds: float) -> Iterator[list["Cut"]]:
    """Yields batches of cuts of similar length, the longest first.

    Args:
        batch_seconds: maximum duration of a batch, with padding; a longer cut is a batch by itself.
    """
    batch: list[Cut] = []
    for cut in sorted(cuts, key=lambda cut: cut.duration, reverse=True):
        if batch and batch[0].duration * (len(batch) + 1) > batch_seconds:
            yield batch
            batch = []
        batch.append(cut)
    if batch:
        yield batch


def loaded(
    batches: Iterator[list["Cut"]], sample_rate: int
) -> Iterator[list[tuple["Cut", Float[np.ndarray, " _"] | str]]]:
    """Yields batches of cuts, each with its wave (S,) or the reason why it cannot be read.

    Threads read one batch ahead.
    """

    def load(cut: "Cut") -> np.ndarray | str:
        try:
            return load_cut(cut, sample_rate)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(max_workers=4) as pool:
        ahead: list[tuple[list[Cut], Iterator[np.ndarray | str]]] = []
        for batch in batches:
            ahead.append((batch, pool.map(load, batch)))
            if len(ahead) == 2:
                ready, waves = ahead.pop(0)
                yield list(zip(ready, waves, strict=True))
        for ready, waves in ahead:
            yield list(zip(ready, waves, strict=True))


def _encode(
    waves: Sequence[Float[np.ndarray, " _"]], codec: SpeechCodec
) -> list[Int[np.ndarray, "Q _"]]:
    """Codes of each wave, from one padded batch."""
    lengths = torch.tensor([len(wave) for wave in waves])
    padded = torch.zeros(len(waves), 1, int(lengths.max()))
    for row, wave in zip(padded, waves, strict=True):
        row[0, : len(wave)] = torch.from_numpy(wave)
    encoded = codec.encode(padded.to(codec.device), lengths.to(codec.device))
    batch = encoded.codes.cpu().numpy()
    frames = encoded.lengths.tolist()
    return [codes[:, :length] for codes, length in zip(batch, frames, strict=True)]


def _row(cut: "Cut", codes: np.ndarray, seconds: float) -> TokenRow:
    first = cut.supervisions[0] if cut.supervisions else None
    return TokenRow(
        id=cut.id,
        text=text_of(cut),
        speaker=(first and first.speaker) or "",
        language=(first and first.language) or "",
        duration=seconds,
        codes=codes.astype(np.uint16),
    )


def text_of(cut: "Cut") -> str:
    """The transcript of a cut: the texts of its supervisions, joined; "" without text."""
    return " ".join(part.text for part in cut.supervisions if part.text)
