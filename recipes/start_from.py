"""What the training of a codec starts from: a folder, the hub, or an architecture alone."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from codec.config import CodecConfig, codec_config_from_dict
from codec.folder import check_config_file, check_source, check_trainable
from recipes.configuration import leaves, resolved


def starting_architecture(codec: CodecConfig, start_from: str) -> CodecConfig:
    """Of the codec that will be trained: `codec`, or what `start_from` names. Raises `ValueError`
    where that is missing or none of ours, and where `codec` names another architecture."""
    if not start_from:
        return codec
    try:
        started = _architecture_of(start_from)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"start_from {start_from}: no such folder, and not to be had from the hub "
            f"either ({type(error).__name__}); check the name"
        ) from error
    except ValueError as error:
        raise ValueError(f"start_from {error}") from error
    if codec == CodecConfig():  # Nothing is said of it.
        return started
    given, there = _written_out(codec), _written_out(started)
    if different := [key for key in given if given[key] != there[key]]:
        said = [f"codec.{key} is {given[key]} here, {there[key]} there" for key in different[:3]]
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        raise ValueError(
            f"start_from {start_from} brings its own architecture, and not this one: "
            f"{', '.join(said)}{more}; leave the keys of codec out, or set them alike"
        )
    return started


def _architecture_of(source: str) -> CodecConfig:
    """A folder's or hub id's. Raises `ValueError` that names the file, and the hub's errors."""
    check_source(source)
    folder, name = Path(source), f"{source}/config.json"
    file = folder / "config.json"
    if not folder.is_dir():
        file = Path(hf_hub_download(source, "config.json"))
    check_config_file(file)
    content = json.loads(file.read_text(encoding="utf-8"))
    check_trainable(content, name)
    try:
        return codec_config_from_dict(content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _written_out(codec: CodecConfig) -> dict[str, Any]:
    """Every key and its value, alike however the configuration spells it: `codec import` writes
    what our files leave to fall back on another key."""
    found = dict(leaves(resolved(codec)))
    del found["quantizer.codebook_size"], found["quantizer.codebook_dimension"]
    conv, quantizer = codec.lmspt.conv, codec.quantizer
    return found | {
        "quantizer.codebook_sizes": list(quantizer.sizes),
        "quantizer.codebook_dimensions": list(quantizer.dimensions),
        "lmspt.conv.semantic_width": conv.semantic_width or conv.width,
        "lmspt.conv.decoder_strides": list(conv.upsampling),
    }
