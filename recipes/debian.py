"""Debian packages without root: fetched by apt-get, which checks them against its signed lists."""

import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


def fetch_packages(names: Sequence[str], folder: Path) -> list[Path]:
    """Their .deb files in `folder`, in the order of the names."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise ValueError(
            f"{' and '.join(names)} are Debian packages, but here is no apt-get; name a folder "
            "with them, or data of your own"
        )
    folder = folder.resolve()  # apt-get runs inside it
    try:
        run_command(["apt-get", "download", *names], folder)
    except ConnectionError:
        # No package lists, or stale ones, and perhaps no right to renew them: use lists of our own.
        logger.info("reading the package lists anew")
        (folder / "lists" / "partial").mkdir(parents=True)
        (folder / "cache" / "archives" / "partial").mkdir(parents=True)
        own = [f"Dir::State::Lists={folder / 'lists'}", f"Dir::Cache={folder / 'cache'}"]
        own.append("APT::Sandbox::User=")  # another user could not write here
        options = [word for option in own for word in ("-o", option)]
        run_command(["apt-get", *options, "update"], folder)
        run_command(["apt-get", *options, "download", *names], folder)
    return find_packages(names, folder)


def find_packages(names: Sequence[str], folder: Path) -> list[Path]:
    """The newest .deb file of each name. Raises ValueError where one is not there."""
    found: list[Path] = []
    for name in names:
        matches = sorted(folder.glob(f"{name}_*.deb"))
        if not matches:
            raise ValueError(f"{folder}: holds no {name}_*.deb")
        found.append(matches[-1])
    return found


def run_command(command: Sequence[str], folder: Path | None = None) -> None:
    """Raises ConnectionError with what it says where it fails."""
    result = subprocess.run(command, cwd=folder, stdout=2, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        raise ConnectionError(
            f"{' '.join(command[:1])} failed ({' '.join(reasons) or result.stderr.strip()}); check "
            "the network and apt's sources"
        )
