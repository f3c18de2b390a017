"""Where numbers come from: the git revision, package versions and machine of a start."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "accelerate", "transformers", "peft", "deepspeed", "numpy", "lhotse")
"""Packages whose versions a run notes."""


def git_revision() -> str:
    """The revision of this checkout, with `-dirty` when tracked files differ; else `unknown`."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != REPOSITORY:
            return "unknown"  # Installed inside somebody else's repository.
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def note_start(folder: Path, seed: int, precision: str, world: dict[str, Any]) -> None:
    """Adds this start to run.json."""
    path = folder / "run.json"
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git": git_revision(),
            "packages": {name: _version(name) for name in PACKAGES},
            "machine": {
                "python": platform.python_version(),
                "system": platform.platform(),
                "cores": os.cpu_count(),
                "gpu": gpu,
            },
            "precision": precision,
            **world,
        }
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"seed": seed, "starts": starts}, indent=2) + "\n")
    temporary.rename(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
