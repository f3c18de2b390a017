"""A codec's folder: what must be in it, and in words what is wrong with it."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS_FILE = "model.safetensors"
SUMS = "entry_sum"
"""What a codebook's moving averages add up; a folder in half precision leaves these tensors out."""


def check_device(device: str) -> None:
    """Raises `ValueError` for a device that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}); try cpu") from error


def check_source(name: str | Path) -> None:
    """Raises `ValueError` for a model that is no folder here and whose name can be no hub id.

    A path whose first part is a folder (or the root) was meant as one.
    """
    path = Path(name)
    if len(path.parts) > 1 and Path(path.parts[0]).is_dir() and not path.exists():
        owner, is_id = path.parts[0], len(path.parts) == 2 and path.parts[0] not in ("..", "/")
        why = f" ({owner} is a folder here, so it is not looked up on the hub)" if is_id else ""
        raise ValueError(f"{name}: no such folder; give a hub id (owner/name) or a folder{why}")


def check_config_file(file: Path) -> None:
    """Raises `ValueError` when config.json is missing or no JSON object."""
    if not file.is_file():
        raise ValueError(f"{file.parent}: no config.json there; is it the folder of a codec?")
    try:
        whole = isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(f"{file}: not a whole JSON object; copy it again")


def check_trainable(config: dict[str, Any], name: str | Path) -> None:
    """Raises `ValueError` for a config.json of transformers: all of theirs name a model_type."""
    if "model_type" in config:
        raise ValueError(
            f"{name}: is a model of transformers ({config['model_type']}): load_codec uses it; it "
            "cannot be trained here"
        )


def check_out_folder(folder: Path) -> None:
    """Raises `ValueError` for a folder to write that is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a folder to write")


@contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder; its files move into `folder` once all of them are whole.

    Files of other names stay. After an error `folder` is as it was.
    """
    check_out_folder(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Inside, for `folder` may be the only place of its disk that can be written.
        with TemporaryDirectory(prefix=".partial-", dir=folder) as temporary:
            yield Path(temporary)
            files = sorted(Path(temporary).iterdir())
            for file in files:
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
            for file in files:
                os.replace(file, folder / file.name)
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise


def _add_sums(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Those that are left out follow from the entries, in the precision of the codec."""
    for name in expected:
        stem = name.removesuffix(SUMS)
        parts = [f"{stem}entries", f"{stem}cluster_size"]
        if stem != name and name not in found and all(part in found for part in parts):
            entries, size = (found[part].to(expected[part].dtype) for part in parts)
            if entries.shape[:1] == size.shape:
                found[name] = entries * size[:, None]


def load_weights(codec: nn.Module, file: Path) -> None:
    """Every tensor, with its shape, or a `ValueError` that names the first misfit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; a codec folder holds config.json and {WEIGHTS_FILE}"
        )
    try:
        found = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file}: not a whole safetensors file ({error}); copy it again"
        ) from error
    expected = codec.state_dict()
    _add_sums(found, expected)
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(
                f"{file}: the tensor {name} is missing; is config.json another codec's?"
            )
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{file}: the tensor {name} has shape {tuple(found[name].shape)}, config.json asks "
                f"for {tuple(tensor.shape)}"
            )
        if not bool(found[name].isfinite().all()):
            raise ValueError(f"{file}: the tensor {name} holds NaN or infinity: a failed training?")
    if unknown := sorted(set(found) - set(expected)):
        raise ValueError(
            f"{file}: holds the unknown tensor {unknown[0]}; is config.json another's?"
        )
    codec.load_state_dict(found)
