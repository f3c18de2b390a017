"""What makes a checkpoint whole: its seal, and the files around it."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Syncs a checkpoint's files and notes their sizes in whole.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    seal = folder / "whole.json"
    seal.write_text(json.dumps({**facts, "sizes": sizes}))
    for path in [*files, seal]:
        sync(path)


def is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "whole.json").read_text())["sizes"]
        short = [name for name, size in sizes.items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, KeyError):
        short = ["whole.json"]
    if short:
        logger.warning("%s: not whole (%s), skipped", folder, short[0])
    return not short


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint so that a kill half-way leaves nothing that looks like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def step_of(checkpoint: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    assert match
    return int(match[1])


def is_write_failure(error: Exception) -> bool:
    """torch and safetensors report a failed write with classes of their own."""
    said = ("pytorchstreamwriter", "unexpected pos", "file write failed", "iostream", "os error")
    return isinstance(error, OSError) or any(words in str(error).lower() for words in said)


def cut_metrics(path: Path, step: int) -> None:
    """Keeps the lines before `step`, but none that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] < step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.rename(path)
