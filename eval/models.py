"""Models that score, by folder or hub id: their files, digests, devices and loading."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS = ("model.bin", "model*.safetensors", "pytorch_model*.bin", "*.onnx")
"""Patterns of weights files; a folder's are those of the first pattern that it has."""
FULLY_READ_BYTES = 2**30
"""Size of a weights file up to which its digest is the SHA-256 of all its bytes."""
NUM_BLOCKS, BLOCK_BYTES = 64, 2**20
"""Of a larger file: blocks that are read, evenly spaced."""


class ModelFolder(NamedTuple):
    """A model's files on this machine."""

    name: str
    """The folder's name, or the hub id."""
    folder: Path
    weights: tuple[Path, ...]

    @property
    def digest(self) -> str:
        """Digest of the weights, 16 hexadecimal digits."""
        return weights_digest(self.weights)

    @property
    def label(self) -> str:
        """Name and digest, as in rows."""
        return f"{self.name}@{self.digest}"


def find_model(source: str | Path, remedy: str) -> ModelFolder:
    """Returns a model's folder; a model of the hub is downloaded, or taken from the hub's cache.

    Args:
        source: a folder, or a hub id (owner/name).
        remedy: how to get such a model, for the message.

    Raises:
        ValueError: there is no such folder, the hub does not provide it, or it holds no weights.
    """
    folder, name = Path(source), Path(source).resolve().name
    if not folder.is_dir():
        parts = folder.parts
        if len(parts) > 2 or folder.exists() or (len(parts) == 2 and Path(parts[0]).is_dir()):
            raise ValueError(f"{source}: no such folder; {remedy}")
        name = str(source)
        folder = _download(
            name, ("*.json", "*.txt", "*.model", *WEIGHTS[:1], *_SAFETENSORS), remedy
        )
        if not _weights_of(folder):
            folder = _download(name, ("pytorch_model*.bin", "*.onnx"), remedy)
    weights = _weights_of(folder)
    if not weights:
        raise ValueError(f"{source}: holds no weights ({', '.join(WEIGHTS)}); {remedy}")
    return ModelFolder(name, folder, weights)


# Not the copies in other precisions that repositories have: model.fp32-00001-of-00002.safetensors.
_SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors")


def _weights_of(folder: Path) -> tuple[Path, ...]:
    found = (tuple(sorted(folder.glob(pattern))) for pattern in WEIGHTS)
    return next(filter(None, found), ())


def _download(name: str, patterns: Iterable[str], remedy: str) -> Path:
    """Returns the folder of a hub model's files of these patterns."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ValueError(f"{name}: no such folder, nor a hub id (owner/name); {remedy}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name}: no such folder, and the hub has no such model or restricts it; {remedy}"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name}: no such folder, and the hub cannot be reached and its cache lacks the model; "
            f"where there is a network: hf download {name} --local-dir DIR, then name DIR; {remedy}"
        ) from error


def weights_digest(files: Iterable[Path]) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 of a file, or of the digests of several.

    A file of more than FULLY_READ_BYTES is represented by its size and NUM_BLOCKS blocks.

    Raises:
        OSError: a file cannot be read.
    """
    digests = [_file_digest(file) for file in files]
    if len(digests) > 1:
        digests = [hashlib.sha256(" ".join(digests).encode()).hexdigest()]
    return digests[0][:16]


def _file_digest(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= FULLY_READ_BYTES:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(NUM_BLOCKS):
            opened.seek((size - BLOCK_BYTES) * block // (NUM_BLOCKS - 1))
            digest.update(opened.read(BLOCK_BYTES))
    return digest.hexdigest()


def torch_device(device: str) -> str:
    """Returns the device of `auto`: cuda where there is one, else cpu."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def without_reports() -> Iterator[None]:
    """Suppresses transformers' warnings inside the block, and its progress bars from then on."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def loading_scorer(source: ModelFolder, purpose: str) -> Iterator[None]:
    """Suppresses transformers' warnings inside the block; turns its exceptions, and those of other
    readers of models, into a ValueError of one line."""
    try:
        with without_reports():
            yield
    except Exception as error:  # tokenizers and onnxruntime raise bare Exceptions.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source.folder}: cannot be loaded as a {purpose}: {reason}") from error


def read_config(source: ModelFolder, purpose: str) -> Any:
    """Returns the configuration of a folder that transformers saved.

    Raises:
        ValueError: config.json is missing or of no known model.
    """
    from transformers import AutoConfig

    with loading_scorer(source, purpose):
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
