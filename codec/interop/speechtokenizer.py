"""Checkpoints of SpeechTokenizer and DM-Codec: config.json and a state_dict (torch.save).

SpeechTokenizer (arXiv 2308.16692, github.com/ZhangXInFD/SpeechTokenizer) and DM-Codec (arXiv
2410.15017) have the same tensors. The family seanet has them bit for bit, under other names; for
what an export loses see `to_original`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec.config import CodecConfig, QuantizerConfig, SEANetConfig, codec_config_from_dict
from codec.interop.checkpoint import (
    WEIGHT_NORM,
    Original,
    check_files_absent,
    codec_on_meta,
    integer,
    match_tensors,
    read_json,
    read_state,
    replace_suffix,
)
from codec.io import WEIGHTS_FILE, atomic_files, check_out_folder
from codec.models.codec import Codec

CONFIG_FILE = "config.json"
CHECKPOINT_FILE = "SpeechTokenizer.pt"

# Keys of their config.json: our fields.
SEANET_KEYS = {
    "n_filters": "num_filters",
    "strides": "strides",
    "dimension": "dimension",
    "semantic_dimension": "semantic_dimension",
    "bidirectional": "bidirectional",
    "dilation_base": "dilation_base",
    "residual_kernel_size": "residual_kernel_size",
    "n_residual_layers": "num_residual_layers",
    "lstm_layers": "num_lstm_layers",
    "activation": "activation",
}
QUANTIZER_KEYS = {"n_q": "num_codebooks", "codebook_size": "codebook_size"}
# The original's defaults of missing keys; the other keys are required.
DEFAULTS = {"bidirectional": False, "lstm_layers": 0}
ACTIVATIONS = {"ELU": "elu", "Snake": "snake"}
# Smallest and largest value of a key.
LIMITS = {"lstm_layers": (0, 1000), "codebook_size": (2, 65_536)}

# Our name of a tensor inside its module: theirs.
LEAVES = WEIGHT_NORM | {"entries": "embed", "entry_sum": "embed_avg", "num_updates": "inited"}


def import_speechtokenizer(config_file: str | Path, checkpoint_file: str | Path) -> Codec:
    """The codec of a published config.json and checkpoint, for inference or further training.

    The checkpoint is a state_dict or a trainer's dictionary with a generator, saved with torch.save
    or as safetensors, with old or new names of weight norm. Training keys of config.json are
    ignored. Raises `ValueError` if a file is corrupted or they do not match.
    """
    try:
        config = config_from_original(read_json(Path(config_file)))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    try:
        return _codec_from_state(config, read_state(Path(checkpoint_file)))
    except ValueError as error:
        raise ValueError(f"{checkpoint_file}: {error}") from error


def export_speechtokenizer(
    codec: Codec, folder: str | Path, *, parametrized: bool = False, overwrite: bool = False
) -> None:
    """Writes config.json and SpeechTokenizer.pt for the original's load_from_checkpoint.

    Args:
        parametrized: names of torch.nn.utils.parametrizations for weight norm, which the original
            does not load.

    Raises:
        ValueError: another family, folded weight norm, a folder of a codec of ours, or files that
            exist already without `overwrite`.
    """
    original, folder = to_original(codec), Path(folder)
    check_export_folder(folder)
    check_files_absent([folder / CONFIG_FILE, folder / CHECKPOINT_FILE], overwrite=overwrite)
    state = original.state
    if parametrized:
        new_names = {old: new for new, old in WEIGHT_NORM.items()}
        state = {replace_suffix(name, new_names): tensor for name, tensor in state.items()}
    with atomic_files(folder) as temporary:
        config = json.dumps(original.config, indent=4) + "\n"
        (temporary / CONFIG_FILE).write_text(config, encoding="utf-8")
        torch.save(state, temporary / CHECKPOINT_FILE)


def check_export_folder(folder: Path) -> None:
    """Raises `ValueError` for a file, and for the folder of a codec of ours (same config.json)."""
    check_out_folder(folder)
    if (folder / WEIGHTS_FILE).exists():
        raise ValueError(
            f"{folder}: has {WEIGHTS_FILE}, whose {CONFIG_FILE} the export would replace; choose "
            "another folder"
        )


def from_original(original: Original) -> Codec:
    """A codec with the original's tensors, with old or new names of weight norm.

    Raises `ValueError` that names the missing, unknown, misshapen and unusable tensors.
    """
    return _codec_from_state(config_from_original(original.config), original.state)


def _codec_from_state(config: CodecConfig, state: Mapping[str, Tensor]) -> Codec:
    """A codec of `config` with the original's tensors. Raises `ValueError` as `from_original`."""
    counts = {
        "n_q": config.quantizer.num_codebooks,
        "strides": len(config.seanet.strides),
        "n_residual_layers": config.seanet.num_residual_layers,
        "lstm_layers": config.seanet.num_lstm_layers,
    }
    outline = codec_on_meta(config, counts, len(state))
    names, ours = tensor_names(outline), outline.state_dict()
    flags = {theirs for name, theirs in names.items() if _is_flag(name)}
    shapes = {
        theirs: (1,) if theirs in flags else tuple(ours[name].shape)
        for name, theirs in names.items()
    }
    found = match_tensors(state, shapes, flags)
    codec = Codec(config)
    ours = codec.state_dict()
    for name, theirs in names.items():
        tensor = found[theirs]
        ours[name].copy_((tensor > 0).squeeze() if theirs in flags else tensor)
    codec.load_state_dict(ours)  # The numbers of updates are copies there.
    return codec.eval()


def to_original(codec: Codec) -> Original:
    """The inverse of `from_original`, with copies of the tensors on the CPU.

    An imported codec is exported bit for bit. A codec of ours has the same codes and waves after a
    round trip, but each codebook's number of updates becomes 1 (0 stays 0), so its digest changes,
    and the quantizer's training keys become decay 0.99, 50 k-means iterations and our defaults.
    Raises `ValueError` for another family and for folded weight norm.
    """
    config, tensors = _original_config(codec.config), codec.state_dict()
    codec.check_unfolded("to export it")
    state = {}
    for name, theirs in tensor_names(codec).items():
        tensor = tensors[name].detach().cpu()
        if _is_flag(name):
            tensor = (tensor > 0).float().reshape(1)
        state[theirs] = tensor.clone().contiguous()
    return Original(config, state)


def config_from_original(theirs: Mapping[str, Any]) -> CodecConfig:
    """Our configuration for their config.json. Raises `ValueError` that names a bad key."""
    needed = [*SEANET_KEYS, *QUANTIZER_KEYS, "sample_rate"]
    theirs = DEFAULTS | {key: theirs[key] for key in needed if theirs.get(key) is not None}
    if missing := [key for key in needed if key not in theirs]:
        raise ValueError(f"the configuration lacks {', '.join(missing)}")
    if str(theirs["activation"]) not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {theirs['activation']!r}"
        )
    if theirs["bidirectional"] not in (0, 1):
        raise ValueError(f"bidirectional must be true or false, got {theirs['bidirectional']!r}")
    if not isinstance(theirs["strides"], list | tuple) or not theirs["strides"]:
        raise ValueError(f"strides must be a list of integers, got {theirs['strides']!r}")
    values = {
        "activation": ACTIVATIONS[theirs["activation"]],
        "bidirectional": bool(theirs["bidirectional"]),
        "strides": [integer("strides", stride) for stride in theirs["strides"]],
    }
    values |= {
        key: integer(key, theirs[key], *LIMITS.get(key, ())) for key in needed if key not in values
    }
    quantizer = asdict(QuantizerConfig(decay=0.99, kmeans_iterations=50))
    return codec_config_from_dict(
        {
            "family": "seanet",
            "sample_rate": values["sample_rate"],
            "seanet": {ours: values[key] for key, ours in SEANET_KEYS.items()},
            "quantizer": quantizer | {ours: values[key] for key, ours in QUANTIZER_KEYS.items()},
        }
    )


def _original_config(ours: CodecConfig) -> dict[str, Any]:
    if ours.family != "seanet":
        raise ValueError(f"only codecs of the family seanet can be exported, not {ours.family}")
    seanet, quantizer = asdict(ours.seanet), asdict(ours.quantizer)
    config = {key: seanet[name] for key, name in SEANET_KEYS.items()}
    config |= {key: quantizer[name] for key, name in QUANTIZER_KEYS.items()}
    config |= {"strides": list(ours.seanet.strides), "sample_rate": ours.sample_rate}
    config["activation"] = {name: key for key, name in ACTIVATIONS.items()}[seanet["activation"]]
    # Without an LSTM the original would still double the channels for a backward direction.
    config["bidirectional"] = ours.seanet.bidirectional and ours.seanet.num_lstm_layers > 0
    return config


def tensor_names(codec: Codec) -> dict[str, str]:
    """Our name of every tensor of an unfolded codec -> theirs."""
    names = {}
    for ours, theirs in _modules(codec.config):
        for leaf in codec.get_submodule(ours).state_dict():
            names[f"{ours}.{leaf}"] = f"{theirs}.{LEAVES.get(leaf, leaf)}"
    assert names.keys() == codec.state_dict().keys()
    return names


def _modules(config: CodecConfig) -> Iterator[tuple[str, str]]:
    """Names of all modules with tensors, ours and theirs; some have none (ELU, Identity).

    Theirs are numbered in the order of computation. Activations are counted, and an LSTM or more
    residual units shift the numbers after them.
    """
    for side, slots in (("encoder", _encoder(config.seanet)), ("decoder", _decoder(config.seanet))):
        for number, (name, inside) in enumerate(slots):
            for ours, theirs in inside.items():
                yield f"{side}.{name}{ours}", f"{side}.model.{number}{theirs}"
    yield "semantic_head", "transform"
    for index in range(config.quantizer.num_codebooks):
        yield f"quantizer.codebooks.{index}", f"quantizer.vq.layers.{index}._codebook"


# Modules inside one position of their lists, ours and theirs.
CONV = {".conv": ".conv.conv"}
TRANSPOSED = {".conv": ".convtr.convtr"}
LSTM = {".lstm": ".lstm"}
ACTIVATION = {"": ""}
UNIT = {
    ".activation_in": ".block.0",
    ".conv_in.conv": ".block.1.conv.conv",
    ".activation_out": ".block.2",
    ".conv_out.conv": ".block.3.conv.conv",
    ".shortcut.conv": ".shortcut.conv.conv",
}
Slots = list[tuple[str, dict[str, str]]]


def _encoder(config: SEANetConfig) -> Slots:
    slots = [("conv_in", CONV)]
    for stage in range(len(config.strides)):
        slots += [
            *_units(stage, config),
            (f"stages.{stage}.activation", ACTIVATION),
            (f"stages.{stage}.down", CONV),
        ]
    return [*slots, *_lstm(config), ("activation", ACTIVATION), ("conv_out", CONV)]


def _decoder(config: SEANetConfig) -> Slots:
    slots = [("conv_in", CONV), *_lstm(config)]
    for stage in range(len(config.strides)):
        slots += [
            (f"stages.{stage}.activation", ACTIVATION),
            (f"stages.{stage}.up", TRANSPOSED),
            *_units(stage, config),
        ]
    return [*slots, ("activation", ACTIVATION), ("conv_out", CONV)]


def _units(stage: int, config: SEANetConfig) -> Slots:
    return [(f"stages.{stage}.units.{unit}", UNIT) for unit in range(config.num_residual_layers)]


def _lstm(config: SEANetConfig) -> Slots:
    return [("lstm", LSTM)] if config.num_lstm_layers else []


def _is_flag(name: str) -> bool:
    """Our number of a codebook's updates is a flag in the original: whether it is initialized."""
    return name.endswith(".num_updates")
