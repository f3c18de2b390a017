"""The models that score, stored scores of utterances, digests and safe file names."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from codec.io import parse_json, sha256_of
from codec.weights import check_layers, check_sizes
from eval.benchmark import (
    Embed,
    Transcribe,
)
from eval.speaker import XVectorEncoder, load_speaker_encoder
from eval.transcribe import TransformersJudge, load_judge

logger = logging.getLogger(__name__)

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,119}")


class Judges(NamedTuple):
    """The ASR and the speaker encoder that score, and their names in rows."""

    transcribe: Transcribe | None
    """None: there is no ASR."""
    embed: Embed | None
    judge_name: str
    """Name, digest and arithmetic of the ASR; "" where there is none."""
    speaker_name: str


def load_judges(
    judge: str | Path | None,
    speaker: str | Path | None,
    *,
    num_threads: int = 2,
    language: str = "en",
    device: str = "auto",
) -> Judges:
    """Loads the ASR and the speaker encoder, where they are named: folders or hub ids, see
    `eval.transcribe.load_judge` and `eval.speaker.load_speaker_encoder`. On a GPU a Whisper in
    CTranslate2's format first transcribes a second of noise; if it fails, it is on the CPU.

    Args:
        device: of the ASR; cpu, cuda or auto.

    Raises:
        ValueError: a model cannot be found, is of another kind, or lacks the language.
    """
    transcribe, embed, judge_name, speaker_name = None, None, "", ""
    if judge is not None:
        check_layers(Path(judge))
        asr = load_judge(judge, num_threads=num_threads, language=language, device=device)
        _check_size(asr)
        transcribe, judge_name = asr.transcribe, asr.name
    if speaker is not None:
        check_layers(Path(speaker))
        encoder = load_speaker_encoder(speaker)
        _check_size(encoder)
        embed, speaker_name = encoder.embed, encoder.name
    return Judges(transcribe, embed, judge_name, speaker_name)


def _check_size(scorer: object) -> None:
    """Raises ValueError for a configuration that asks for much more memory than its weights."""
    if isinstance(scorer, TransformersJudge | XVectorEncoder):
        try:
            check_sizes(scorer.build, scorer.source.weights)
        except ValueError as error:
            raise ValueError(f"{scorer.source.folder}: {error}") from error


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
