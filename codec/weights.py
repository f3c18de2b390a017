"""Untrusted weights files: a model's sizes are compared with them before memory is allocated."""

import threading
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from codec.io import parse_json
from codec.program import reason_of

Module = TypeVar("Module", bound=nn.Module)

VALUES_PER_BYTE = 4
"""Maximum number of a model's values for each byte of its files: that of 2-bit weights."""
MAX_LAYERS = 10_000
"""Maximum number of layers of a model of transformers."""
SPARE_VALUES = 2**20
"""Values that need not be in a file, such as windows and position tables."""
MAX_TENSORS = 50_000
"""Of a model whose number of stored tensors is not known."""


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file by name; only its header is read.

    Raises:
        ValueError: a damaged file, also one that is shorter than its header states.
    """
    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: not a complete safetensors file ({reason_of(error)}); copy it again"
        ) from error


def build_outline(build: Callable[[], Module], num_tensors: int) -> Module:
    """A model on the meta device, without memory for its tensors.

    Raises:
        ValueError: its configuration asks for many more parameters and buffers than there are
            stored tensors, or for tensors that cannot exist.
    """
    # Weight norm replaces a parameter by two, and tied tensors have two names.
    thread, count, most = threading.get_ident(), 0, 64 + 2 * num_tensors

    def check(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal count
        if threading.get_ident() != thread:
            return
        count += 1
        if count > most:
            raise ValueError(
                f"its configuration asks for more tensors than its weights have ({num_tensors})"
            )

    hooks = [
        register_module_parameter_registration_hook(check),  # pyright: ignore[reportArgumentType]
        register_module_buffer_registration_hook(check),  # pyright: ignore[reportArgumentType]
    ]
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"its configuration asks for impossible sizes ({reason})") from error
    finally:
        for hook in hooks:
            hook.remove()


def check_shapes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], file: Path, may_lack: str | None = None
) -> None:
    """Raises `ValueError` that names the first difference between a model's tensors and the
    `shapes` of a file.

    Args:
        may_lack: suffix of tensors that the file need not have.
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in shapes:
            if may_lack is not None and name.endswith(may_lack):
                continue
            raise ValueError(
                f"{file}: the tensor {name} is missing; is its configuration of another model?"
            )
        if shapes[name] != tuple(tensor.shape):
            raise ValueError(
                f"{file}: the tensor {name} has shape {shapes[name]}, its configuration asks for "
                f"{tuple(tensor.shape)}"
            )
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise ValueError(
            f"{file}: has the unknown tensor {unknown[0]!r}; is its configuration of another model?"
        )


def check_layers(folder: Path) -> None:
    """Raises ValueError for a config.json that no model can have: transformers makes lists of its
    numbers of layers when it reads it. Does nothing for a hub id."""
    file = folder / "config.json"
    waiting = [parse_json(file.read_text(encoding="utf-8"))] if file.is_file() else []
    while waiting:
        node = waiting.pop()
        for key, value in node.items() if isinstance(node, dict) else ():
            if "layer" in key and type(value) in (int, float) and value > MAX_LAYERS:
                raise ValueError(f"its {key} is {value}")
            waiting.append(value)


def check_pickled(file: Path) -> None:
    """Compares the tensors of a file of torch.save with the file's size, before their memory is
    allocated; no code of the file is run.

    Raises:
        ValueError: a file of torch before 1.6, or tensors that need more memory than the file has
            bytes. torch.load raises other errors.
    """
    size, storages = file.stat().st_size, {}
    try:
        waiting: list[Any] = [torch.load(file, map_location="meta", weights_only=True)]
    except RuntimeError:
        raise ValueError("not a complete file of torch.save") from None
    if not zipfile.is_zipfile(file):
        raise ValueError("a file of torch before 1.6; load and save it with a newer one")
    while waiting:
        node = waiting.pop()
        if isinstance(node, torch.Tensor):
            storage: Any = node.untyped_storage()
            # Tensors of one storage, such as tied weights, have one place in the file.
            place = storage._checkpoint_offset
            storages[place] = max(storages.get(place, 0), storage.nbytes())
        elif isinstance(node, dict):
            waiting += node.values()
        elif isinstance(node, list | tuple):
            waiting += node
    if sum(storages.values()) > size:
        raise ValueError(f"its tensors need {sum(storages.values())} bytes, but it has {size}")


def weights_of(folder: Path) -> list[Path]:
    """The weights files of a folder that transformers saved; none for a hub id."""
    files = sorted(folder.glob("*.safetensors"))
    return files or sorted(folder.glob("pytorch_model*.bin"))


def check_sizes(build: Callable[[], nn.Module], files: Iterable[Path]) -> None:
    """Compares the sizes of a model of transformers with its files, whose tensors may have other
    names.

    Args:
        files: the model's weights; none: nothing is compared.

    Raises:
        ValueError: a damaged file, or a configuration that asks for much more than the files have.
    """
    files = list(files)
    if not files:
        return
    stored = [stored_shapes(file) for file in files if file.suffix == ".safetensors"]
    is_known = len(stored) == len(files)
    outline = build_outline(build, sum(map(len, stored)) if is_known else MAX_TENSORS)
    tensors = {id(each): each for each in (*outline.parameters(), *outline.buffers())}
    wanted = sum(each.numel() for each in tensors.values())
    size = sum(file.stat().st_size for file in files)
    if wanted > VALUES_PER_BYTE * size + SPARE_VALUES:
        raise ValueError(
            f"its configuration asks for {wanted} values, but its weights have {size} bytes"
        )
