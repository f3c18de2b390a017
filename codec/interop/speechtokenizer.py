"""SpeechTokenizer's and DM-Codec's checkpoint files into our codecs, and ours into theirs.

Both publish a config.json and a state_dict (torch.save) with the same tensors.
"""

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from codec.folder import WEIGHTS_FILE, check_out_folder, written_together
from codec.model import Codec
from codec.original import WEIGHT_NORM, config_from_original, filled_codec, renamed, to_original

CONFIG_FILE = "config.json"
CHECKPOINT_FILE = "SpeechTokenizer.pt"


def import_speechtokenizer(config_file: str | Path, checkpoint_file: str | Path) -> Codec:
    """The codec of a published config.json and checkpoint, ready to use or to train further.

    The checkpoint is a bare state_dict or the trainers' dictionary with a generator, saved with
    torch.save or as safetensors, with old or new names of weight norm. Settings of training in
    config.json are ignored. Raises `ValueError` when a file is damaged or they do not fit.
    """
    try:
        config = config_from_original(read_json(Path(config_file)))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    try:
        return filled_codec(config, read_state(Path(checkpoint_file)))
    except ValueError as error:
        raise ValueError(f"{checkpoint_file}: {error}") from error


def export_speechtokenizer(
    codec: Codec, folder: str | Path, *, parametrized: bool = False, overwrite: bool = False
) -> None:
    """Writes config.json and SpeechTokenizer.pt, which the original's load_from_checkpoint reads.

    `parametrized` names weight norm's tensors as torch.nn.utils.parametrizations does; the
    original does not load those. Raises `ValueError` for another family, a folded codec, a folder
    that holds a codec of ours, and files that are there already unless `overwrite`.
    """
    original, folder = to_original(codec), Path(folder)
    check_export_folder(folder)
    for file in (folder / CONFIG_FILE, folder / CHECKPOINT_FILE):
        if file.exists() and not overwrite:
            raise ValueError(f"{file}: is there already; choose another folder")
    state = original.state
    if parametrized:
        new_endings = {old: new for new, old in WEIGHT_NORM.items()}
        state = {renamed(name, new_endings): tensor for name, tensor in state.items()}
    with written_together(folder) as temporary:
        config = json.dumps(original.config, indent=4) + "\n"
        (temporary / CONFIG_FILE).write_text(config, encoding="utf-8")
        torch.save(state, temporary / CHECKPOINT_FILE)


def check_export_folder(folder: Path) -> None:
    """Raises `ValueError` for a file, and where config.json is or would be a codec's of ours."""
    check_out_folder(folder)
    if (folder / WEIGHTS_FILE).exists():
        raise ValueError(
            f"{folder}: holds {WEIGHTS_FILE}, whose {CONFIG_FILE} an export would replace; choose "
            "another folder"
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in another project's JSON file, or a `ValueError`."""
    text = read_config_text(file)
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        if file.suffix in (".yaml", ".yml"):
            raise ValueError("is YAML; this kind has a config.json (LM-SPT has YAML: import lmspt)")
        raise ValueError("not a whole JSON object; copy it again")
    check_foreign(config)
    return config


def read_config_text(file: Path) -> str:
    """What a configuration file says, or a `ValueError`. Bytes that are no text become marks."""
    if file.is_dir():
        raise ValueError("is a folder; name the configuration file in it")
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def check_foreign(config: dict[str, Any]) -> None:
    """Raises `ValueError` for the config.json of a codec of ours."""
    if {"family", "quantizer"} <= config.keys():
        raise ValueError("is of a codec of ours already: its folder needs no import")


def read_state(file: Path) -> dict[str, Tensor]:
    """A state_dict, or the generator's in a trainer's checkpoint, saved with torch.save or as
    safetensors. Raises `ValueError` for anything else."""
    from safetensors.torch import load_file

    if file.is_dir():
        raise ValueError("is a folder; name the checkpoint file in it")
    if not file.is_file():
        raise ValueError("no such file")
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch.load has a dozen kinds of them for damaged files.
        other = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if isinstance(error, UnpicklingError) and other:
            raise ValueError(
                f"holds more than tensors ({other[1]}), and loading that could run code of the "
                "file; save the state_dict of its generator alone"
            ) from error
        raise ValueError("not a whole checkpoint; copy it again") from error
    if isinstance(found, dict) and isinstance(found.get("generator"), dict):
        found = found["generator"]
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(tensor, Tensor) for tensor in found.values())
    ):
        raise ValueError("neither a state_dict nor a trainer's checkpoint with a generator in it")
    return {str(name): tensor for name, tensor in found.items()}
