"""The models that score, stored scores of utterances, digests and safe file names."""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from codec.io import WriteError, parse_json, sha256_of
from codec.json_lines import append_json_lines, read_appended, write_json_lines
from eval.benchmark import (
    Embed,
    ScoredUtterance,
    Transcribe,
    all_libraries,
)
from eval.speaker import SpeakerEncoder
from eval.transcribe import Judge

logger = logging.getLogger(__name__)

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,119}")


class Judges(NamedTuple):
    """The ASR and the speaker encoder that score, and their names in rows."""

    transcribe: Transcribe
    """Returns "" where there is no ASR."""
    embed: Embed | None
    judge_name: str
    """Name, digest and arithmetic of the ASR; "" where there is none."""
    speaker_name: str


class Task(NamedTuple):
    """An utterance to score."""

    id: str
    score: Callable[[], ScoredUtterance]


def load_judges(
    judge: str | Path | None,
    speaker: str | Path | None,
    *,
    num_threads: int = 2,
    language: str = "en",
) -> Judges:
    """Loads the ASR (a CTranslate2 Whisper folder) and the speaker encoder, where they are named.

    Raises:
        ValueError: a folder does not hold its model.
    """
    transcribe, embed, judge_name, speaker_name = _no_transcript, None, "", ""
    if judge is not None:
        whisper = Judge(judge, num_threads=num_threads, language=language)
        transcribe = whisper.transcribe
        digest = sha256_of(Path(judge) / "model.bin", 16)
        judge_name = f"{Path(judge).name}@{digest} {whisper.compute_type}"
    if speaker is not None:
        embed = SpeakerEncoder.from_folder(speaker).embed
        digest = sha256_of(Path(speaker) / "model.safetensors", 16)
        speaker_name = f"{Path(speaker).name}@{digest}"
    return Judges(transcribe, embed, judge_name, speaker_name)


def _no_transcript(_wave: np.ndarray, _rate: int) -> str:
    return ""


def score_all(folder: Path, tasks: Sequence[Task], key: str, label: str) -> list[ScoredUtterance]:
    """Returns the scores of the tasks; computes those that FOLDER/utterances/ does not have yet.

    A recording that cannot be scored is left out and listed in FOLDER/skipped-LABEL.jsonl.

    Args:
        key: everything that the scores depend on besides library versions; scores of another key
            are in another file.
        label: name of the system, for files and logs.

    Raises:
        ValueError: no utterance could be scored.
        WriteError: the disk is full.
    """
    digest = sha256_of(f"{key} {all_libraries()}", 12)
    stored = folder / "utterances" / f"{safe_name(label)}-{digest}.jsonl"
    before = [ScoredUtterance.from_record(line.value) for line in read_appended(stored)]
    done = {one.id: one for one in before}
    skipped: list[dict[str, str]] = []
    with tqdm(tasks, label, unit="utterance") as progress:
        for task in progress:
            if task.id in done:
                continue
            try:
                done[task.id] = task.score()
            except WriteError:
                raise
            except (ValueError, OSError) as error:
                skipped.append({"id": task.id, "reason": str(error)})
                continue
            append_json_lines(stored, [done[task.id].to_record()])
    if skipped:
        logger.warning("%d of %d utterances of %s skipped", len(skipped), len(tasks), label)
    write_json_lines(folder / f"skipped-{safe_name(label)}.jsonl", skipped)
    scored = [done[task.id] for task in tasks if task.id in done]
    for metric in sorted({metric for one in scored for metric in one.missing}):
        count = sum(metric in one.missing for one in scored)
        logger.warning("%s is not defined for %d utterances of %s", metric, count, label)
    if not scored:
        reasons = "; ".join(one["reason"] for one in skipped[:2])
        raise ValueError(f"no utterance of {label} could be scored: {reasons}")
    return scored


def digest_of_voice(folder: str | Path) -> str:
    """Returns one digest of a voice's weights: codec, AR, NAR and the base LLM.

    Raises:
        ValueError: the folder holds no weights.
    """
    folder = Path(folder)
    weights = sorted(
        path for part in ("codec", "ar", "nar") for path in (folder / part).rglob("*.safetensors")
    )
    if not weights:
        raise ValueError(f"{folder}: is no voice folder")
    parts = [f"{path.relative_to(folder).as_posix()} {sha256_of(path, 16)}" for path in weights]
    base = folder / "ar" / "base.json"
    if base.is_file():
        parts.append(str(parse_json(base.read_text(encoding="utf-8")).get("digest")))
    return sha256_of("\n".join(parts), 16)


def state_of_files(paths: Iterable[Path]) -> str:
    """Returns a digest of the files' paths, sizes and modification times."""
    lines = []
    for path in paths:
        try:
            found = path.stat()
            lines.append(f"{path} {found.st_size} {found.st_mtime_ns}")
        except OSError:
            lines.append(f"{path} missing")
    return sha256_of("\n".join(lines), 16)


def safe_name(name: str) -> str:
    """Returns a file name for an id: without folders, not hidden, and different for different
    ids."""
    if PLAIN_NAME.fullmatch(name):
        return name
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80]
    return f"{readable or 'unnamed'}-{sha256_of(name, 16)}"
