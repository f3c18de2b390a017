"""Files of published checkpoints: reading them, and matching their tensors to ours by name."""

import re
from collections.abc import Mapping, Set
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codec.config import CodecConfig
from codec.io import parse_json
from codec.models.codec import Codec
from codec.weights import check_pickled

# PyTorch's new and old names of weight norm's tensors.
WEIGHT_NORM = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


class Original(NamedTuple):
    """A codec in the form of its original release."""

    config: dict[str, Any]
    """The model's keys of the configuration file, without those of training."""
    state: dict[str, Tensor]
    """Tensors with the names of torch.nn.utils.weight_norm (weight_g, weight_v)."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of another project. Raises `ValueError` if there is none."""
    text = read_config_text(file)
    try:
        config = parse_json(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        if file.suffix in (".yaml", ".yml"):
            raise ValueError("is YAML; this kind has a config.json (LM-SPT has YAML: import lmspt)")
        raise ValueError("not a complete JSON object; copy it again")
    check_foreign(config)
    return config


def read_config_text(file: Path) -> str:
    """The text of a configuration file, with U+FFFD for invalid bytes. Raises `ValueError` if it
    cannot be read."""
    if file.is_dir():
        raise ValueError("is a folder; name the configuration file in it")
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def check_foreign(config: dict[str, Any]) -> None:
    """Raises `ValueError` for the config.json of a codec of this project."""
    if {"family", "quantizer"} <= config.keys():
        raise ValueError("is the configuration of a codec of ours: its folder needs no import")


def read_state(file: Path) -> dict[str, Tensor]:
    """A state_dict, or the generator's in a trainer's checkpoint (torch.save or safetensors).

    Raises `ValueError` for anything else.
    """
    from safetensors.torch import load_file

    if file.is_dir():
        raise ValueError("is a folder; name the checkpoint file in it")
    if not file.is_file():
        raise ValueError("no such file")
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            check_pickled(file)
            found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch.load raises a dozen types for corrupted files.
        other = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if isinstance(error, UnpicklingError) and other:
            raise ValueError(
                f"has more than tensors ({other[1]}), and loading it could run code of the file; "
                "save the state_dict of its generator alone"
            ) from error
        raise ValueError("not a complete checkpoint; copy it again") from error
    if isinstance(found, dict) and isinstance(found.get("generator"), dict):
        found = found["generator"]
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(tensor, Tensor) for tensor in found.values())
    ):
        raise ValueError("neither a state_dict nor a trainer's checkpoint with a generator")
    for name, tensor in found.items():
        if tensor.is_complex() or tensor.layout != torch.strided:
            raise ValueError(f"{name} is not a plain tensor of real numbers ({tensor.dtype})")
    return {str(name): tensor for name, tensor in found.items()}


def codec_on_meta(config: CodecConfig, counts: Mapping[str, int], num_tensors: int) -> Codec:
    """The codec on the meta device, so that a bad configuration cannot exhaust memory or time.

    Raises `ValueError` if a key asks for more modules (`counts`) than there are tensors.
    """
    for key, count in counts.items():
        if count > num_tensors:
            raise ValueError(
                f"does not match its configuration: {key} asks for {count}, and there are only "
                f"{num_tensors} tensors"
            )
    try:
        with torch.device("meta"):
            return Codec(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(
            "does not match its configuration, which asks for tensors of more than 2^63 elements"
        ) from error


def match_tensors(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    flags: Set[str] = frozenset(),
) -> dict[str, Tensor]:
    """The tensors of `state` by the old names of weight norm, with exactly these names and shapes.

    Raises `ValueError` that names the missing, unknown, misshapen and unusable ones. Tensors in
    `flags` may have any data type.
    """
    old_names = {replace_suffix(name, WEIGHT_NORM): name for name in state}
    found = {name: state[given] for name, given in old_names.items()}
    unusable = [
        name
        for name in shapes.keys() & found.keys()
        if found[name].layout != torch.strided
        or found[name].is_meta
        or _is_expanded(found[name])
        or not (name in flags or found[name].is_floating_point())
    ]
    problems = {
        "under their old and their new name": sorted(state.keys() - set(old_names.values())),
        "missing": sorted(shapes.keys() - found.keys()),
        "unknown": sorted(found.keys() - shapes.keys()),
        "of another shape": [
            f"{name} {tuple(found[name].shape)} and not {shape}"
            for name, shape in shapes.items()
            if name in found and tuple(found[name].shape) != shape
        ],
        "not dense or not floating-point": sorted(unusable),
        "with NaN or infinity": [
            name
            for name in shapes
            if name in found
            and name not in unusable
            and not bool(found[name].float().isfinite().all())
        ],
    }
    if messages := [f"{what}: {first_three(which)}" for what, which in problems.items() if which]:
        raise ValueError(f"does not match its configuration: tensors {'; '.join(messages)}")
    return found


def _is_expanded(tensor: Tensor) -> bool:
    """Whether a tensor has more elements than its storage: terabytes may be a few bytes of file."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def integer(key: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> int:
    """An integer, which JSON may store as 8 or 8.0. Raises `ValueError` that names the key."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value % 1 != 0 or not least <= value <= most:
        raise ValueError(f"{key} must be an integer from {least} to {most}, got {value!r}")
    return int(value)


def first_three(names: list[str]) -> str:
    """The first three names and the number of the rest."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def replace_suffix(name: str, suffixes: Mapping[str, str]) -> str:
    """The name with its last part replaced if it is one of `suffixes`."""
    for old, new in suffixes.items():
        if name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name


def check_files_absent(files: list[Path], *, overwrite: bool) -> None:
    """Raises `ValueError` if one of the files to write exists, unless `overwrite`."""
    for file in files:
        if file.exists() and not overwrite:
            raise ValueError(f"{file}: exists already; choose another folder")
