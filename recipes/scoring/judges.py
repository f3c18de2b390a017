"""What the programs that score share: judges, scores kept by utterance, digests, names of files."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from codec.io import sha256_of
from eval.benchmark import (
    Embed,
    Transcribe,
    Utterance,
    all_libraries,
    append_lines,
    digest_of,
    read_lines,
)
from eval.speaker import SpeakerEncoder
from eval.transcribe import Judge

logger = logging.getLogger(__name__)

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,119}")


class Judges(NamedTuple):
    """The models that score, and what the rows call them."""

    transcribe: Transcribe
    """Hears nothing where there is no judge."""
    embed: Embed | None
    judge_name: str
    """Name, digest and arithmetic; "" where there is no judge."""
    speaker_name: str


class Task(NamedTuple):
    """One utterance that has still to be scored."""

    id: str
    score: Callable[[], Utterance]


def score_all(folder: Path, tasks: Sequence[Task], key: str, label: str) -> list[Utterance]:
    """Scores what is not stored yet and stores it; a bad recording is left out and listed.

    `key` tells apart the systems, lists and judges that share a folder; other versions of the
    libraries score anew.
    """
    digest = sha256_of(f"{key} {all_libraries()}", 12)
    stored = folder / "utterances" / f"{safe_name(label)}-{digest}.jsonl"
    done = {one.id: one for one in map(Utterance.from_json, read_lines(stored))}
    skipped: list[str] = []
    for task in tqdm(tasks, label, unit="utterance"):
        if task.id in done:
            continue
        try:
            done[task.id] = task.score()
        except (ValueError, OSError) as error:
            skipped.append(json.dumps({"id": task.id, "reason": str(error)}, ensure_ascii=False))
            continue
        append_lines(stored, [done[task.id].to_json()])
    if skipped:
        logger.warning("%d of %d utterances of %s skipped", len(skipped), len(tasks), label)
    (folder / f"skipped-{safe_name(label)}.jsonl").write_text(
        "".join(line + "\n" for line in skipped), encoding="utf-8"
    )
    scored = [done[task.id] for task in tasks if task.id in done]
    for metric in sorted({metric for one in scored for metric in one.missing}):
        count = sum(metric in one.missing for one in scored)
        logger.warning("%s is not defined for %d utterances of %s", metric, count, label)
    if not scored:
        raise ValueError(f"no utterance of {label} could be scored: {'; '.join(skipped[:2])}")
    return scored


def load_judges(
    judge: str | Path | None,
    speaker: str | Path | None,
    *,
    num_threads: int = 2,
    language: str = "en",
) -> Judges:
    """The judge and the speaker encoder from their folders, where they are named."""
    transcribe, judge_name = _deaf, ""
    if judge is not None:
        whisper = Judge(judge, num_threads=num_threads, language=language)
        digest = digest_of(Path(judge) / "model.bin")
        transcribe = whisper.transcribe
        judge_name = f"{Path(judge).name}@{digest} {whisper.compute_type}"
    if speaker is None:
        return Judges(transcribe, None, judge_name, "")
    encoder = SpeakerEncoder.from_folder(speaker)
    digest = digest_of(Path(speaker) / "model.safetensors")
    return Judges(transcribe, encoder.embed, judge_name, f"{Path(speaker).name}@{digest}")


def _deaf(_wave: Any, _rate: int) -> str:
    return ""


def digest_of_voice(folder: str | Path) -> str:
    """One digest of a voice: the weights of its codec, AR and NAR, and the LLM it grew from."""
    folder = Path(folder)
    weights = sorted(
        path for part in ("codec", "ar", "nar") for path in (folder / part).rglob("*.safetensors")
    )
    if not weights:
        raise ValueError(f"{folder}: holds no voice")
    parts = [f"{path.relative_to(folder).as_posix()} {digest_of(path)}" for path in weights]
    base = folder / "ar" / "base.json"
    if base.is_file():
        parts.append(str(json.loads(base.read_text(encoding="utf-8")).get("digest")))
    return sha256_of("\n".join(parts), 16)


def state_of_files(paths: Iterable[Path]) -> str:
    """Changes when one of the files does: their paths, sizes and times of writing."""
    lines = []
    for path in paths:
        try:
            found = path.stat()
            lines.append(f"{path} {found.st_size} {found.st_mtime_ns}")
        except OSError:
            lines.append(f"{path} missing")
    return sha256_of("\n".join(lines), 16)


def safe_name(name: str) -> str:
    """A file name for an id: no folder, never hidden, and never the same for two ids."""
    if PLAIN_NAME.fullmatch(name):
        return name
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80]
    return f"{readable or 'unnamed'}-{sha256_of(name, 16)}"
