"""Recorded telephone prompts from Debian packages, as FLAC files and a list, without root.

568 prompts, 25 minutes, one American woman (Allison Smith), 16 kHz G.722, CC BY-SA 3.0. apt-get
downloads the packages and checks their signatures.
"""

import gzip
import logging
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from codec.audio import write_audio
from codec.json_lines import write_json_lines

logger = logging.getLogger(__name__)

PACKAGES = ("asterisk-core-sounds-en-g722", "asterisk-core-sounds-en")
SOUNDS = Path("usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
SAMPLE_RATE = 16000
SPEAKER = "allison-smith"
CREDIT = """\
---
license: cc-by-sa-3.0
---
# Recorded prompts

Spoken by Allison Smith, recorded for the Asterisk project with contributions by Digium, Inc.;
taken from Debian's packages asterisk-core-sounds-en and asterisk-core-sounds-en-g722.
Decoded from G.722 to 16 kHz FLAC.
"""


def unpack_prompts(out: Path, packages: Path | None = None) -> Path:
    """Writes OUT/prompts.jsonl and OUT/prompts/*.flac, unless they exist; returns the list.

    Args:
        packages: folder of the .deb files; None: apt-get downloads them.
    """
    out.mkdir(parents=True, exist_ok=True)
    listed, folder = out / "prompts.jsonl", out / "prompts"
    if listed.exists():
        logger.info("%s exists", listed)
        return listed
    with tempfile.TemporaryDirectory(dir=out, prefix=".packages-") as temporary:
        tree = Path(temporary) / "tree"
        debs = find_packages(PACKAGES, packages) if packages else None
        for deb in debs or fetch_packages(PACKAGES, Path(temporary)):
            run_command(["dpkg-deb", "-x", str(deb), str(tree)])
        if not (tree / SOUNDS).is_dir() or not (tree / TRANSCRIPTS).is_file():
            raise ValueError(f"the packages {', '.join(PACKAGES)} are not laid out as expected")
        lines: list[dict[str, str]] = []
        for name, text in tqdm(list(_transcripts(tree / TRANSCRIPTS)), "prompts", unit="file"):
            source = tree / SOUNDS / f"{name}.g722"
            if not source.is_file():
                continue
            flac = folder / f"{name.replace('/', '-')}.flac"
            if not flac.exists():
                write_audio(flac, decode_g722(source), SAMPLE_RATE)
            line = {"id": flac.stem, "audio": f"prompts/{flac.name}", "text": text}
            lines.append(line | {"speaker": SPEAKER, "language": "en"})
    (folder / "README.md").write_text(CREDIT, encoding="utf-8")
    write_json_lines(listed, lines)
    return listed


def decode_g722(path: Path) -> Float[np.ndarray, " S"]:
    """Returns the float32 samples at 16 kHz of a raw 64 kbit/s G.722 file.

    Raises:
        ValueError: FFmpeg cannot decode the file.
    """
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path), format="g722") as container:
            frames = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
    except FFmpegError as error:
        raise ValueError(f"{path}: cannot be read as G.722 ({error})") from error
    return np.concatenate(frames).astype(np.float32) / 32768


def _transcripts(path: Path) -> Iterator[tuple[str, str]]:
    """Yields name and text of every prompt without sound effects."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            name, colon, text = line.strip().partition(": ")
            is_speech = colon and not line.startswith(";") and not re.search(r"[\[\]<>()]", text)
            if is_speech and re.search(r"\w", text):
                yield name, " ".join(text.split())


def fetch_packages(names: Sequence[str], folder: Path) -> list[Path]:
    """Downloads .deb files to `folder`; returns them in the order of the names.

    Raises:
        ValueError: there is no apt-get.
        ConnectionError: apt-get failed.
    """
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise ValueError(
            f"{' and '.join(names)} are Debian packages, but there is no apt-get; name a "
            "folder with them, or use other data"
        )
    folder = folder.resolve()  # The working directory of apt-get.
    try:
        run_command(["apt-get", "download", *names], folder)
    except ConnectionError:
        # Package lists are missing or stale, and may need root to update: use private ones.
        logger.info("updating the package lists")
        (folder / "lists" / "partial").mkdir(parents=True)
        (folder / "cache" / "archives" / "partial").mkdir(parents=True)
        own = [f"Dir::State::Lists={folder / 'lists'}", f"Dir::Cache={folder / 'cache'}"]
        own.append("APT::Sandbox::User=")  # apt's own user cannot write here.
        options = [word for option in own for word in ("-o", option)]
        run_command(["apt-get", *options, "update"], folder)
        run_command(["apt-get", *options, "download", *names], folder)
    return find_packages(names, folder)


def find_packages(names: Sequence[str], folder: Path) -> list[Path]:
    """Returns the newest .deb file of each name.

    Raises:
        ValueError: one is missing.
    """
    found: list[Path] = []
    for name in names:
        matches = sorted(folder.glob(f"{name}_*.deb"))
        if not matches:
            raise ValueError(f"{folder}: holds no {name}_*.deb")
        found.append(matches[-1])
    return found


def run_command(command: Sequence[str], folder: Path | None = None) -> None:
    """Runs a command; raises ConnectionError with its error output if it fails."""
    result = subprocess.run(command, cwd=folder, stdout=2, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        raise ConnectionError(
            f"{' '.join(command[:1])} failed ({' '.join(reasons) or result.stderr.strip()}); check "
            "the network and apt's sources"
        )
