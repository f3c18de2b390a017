"""SpeechTokenizer's and DM-Codec's checkpoint files into our codecs, and ours into theirs.

Both publish a config.json and a state_dict (torch.save) with the same tensors.

SpeechTokenizer's codec in memory: its configuration and tensors, and ours for them.

SpeechTokenizer (arXiv 2308.16692, github.com/ZhangXInFD/SpeechTokenizer); DM-Codec
(arXiv 2410.15017) has the same tensors. They are ours under other names, bit for bit. Theirs come
back from us as they were; what ours lose on the way there, `to_original` says.
"""

import json
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codec.config import CodecConfig, QuantizerConfig, SEANetConfig, codec_config_from_dict
from codec.io import WEIGHTS_FILE, atomic_files, check_out_folder
from codec.models.codec import Codec

# Their key of config.json: our field.
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
# What the original makes of keys that are not there; without any other it cannot be built.
DEFAULTS = {"bidirectional": False, "lstm_layers": 0}
ACTIVATIONS = {"ELU": "elu", "Snake": "snake"}
# The smallest and largest number of a key.
LIMITS = {"lstm_layers": (0, 1000), "codebook_size": (2, 65_536)}

# Our name of a tensor inside its module: theirs. Weight norm's are PyTorch's new and old ones.
WEIGHT_NORM = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
LEAVES = WEIGHT_NORM | {"entries": "embed", "entry_sum": "embed_avg", "num_updates": "inited"}


class Original(NamedTuple):
    """A codec as the originals keep it."""

    config: dict[str, Any]
    """Of config.json: the keys that the model reads, without those of training."""
    state: dict[str, Tensor]
    """With the names of torch.nn.utils.weight_norm (weight_g, weight_v)."""


def from_original(original: Original) -> Codec:
    """A codec with the original's tensors, either way of naming weight norm.

    Raises `ValueError` that names the missing, unknown, misshapen and unusable tensors.
    """
    return filled_codec(config_from_original(original.config), original.state)


def filled_codec(config: CodecConfig, state: Mapping[str, Tensor]) -> Codec:
    """A codec of `config` with the original's tensors. Raises `ValueError` as `from_original`."""
    counts = {
        "n_q": config.quantizer.num_codebooks,
        "strides": len(config.seanet.strides),
        "n_residual_layers": config.seanet.num_residual_layers,
        "lstm_layers": config.seanet.num_lstm_layers,
    }
    outline = outlined(config, counts, len(state))
    names, ours = tensor_names(outline), outline.state_dict()
    flags = {theirs for name, theirs in names.items() if _is_flag(name)}
    shapes = {
        theirs: (1,) if theirs in flags else tuple(ours[name].shape)
        for name, theirs in names.items()
    }
    found = fitting(state, shapes, flags)
    codec = Codec(config)
    ours = codec.state_dict()
    for name, theirs in names.items():
        tensor = found[theirs]
        ours[name].copy_((tensor > 0).squeeze() if theirs in flags else tensor)
    return codec.eval()


def fitting(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    flags: Set[str] = frozenset(),
) -> dict[str, Tensor]:
    """Tensors by their old names of weight norm, of just these names and shapes.

    Raises `ValueError` that names the missing, unknown, misshapen and unusable ones. Those of
    `flags` need be no floating-point numbers.
    """
    old_names = {renamed(name, WEIGHT_NORM): name for name in state}
    found = {name: state[given] for name, given in old_names.items()}
    unusable = [
        name
        for name in shapes.keys() & found.keys()
        if found[name].layout != torch.strided
        or found[name].is_meta
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
        "that are not dense or no floating-point numbers": sorted(unusable),
        "with NaN or infinity": [
            name
            for name in shapes
            if name in found
            and name not in unusable
            and not bool(found[name].float().isfinite().all())
        ],
    }
    if said := [f"{what}: {some(which)}" for what, which in problems.items() if which]:
        raise ValueError(f"does not fit its configuration: tensors {'; '.join(said)}")
    return found


def outlined(config: CodecConfig, counts: Mapping[str, int], num_tensors: int) -> Codec:
    """The codec without storage: a configuration alone must not take all memory or time.

    `counts` says how many of a kind each key asks for. Raises `ValueError` for more than there are
    tensors.
    """
    for key, count in counts.items():
        if count > num_tensors:
            raise ValueError(
                f"does not fit its configuration: {key} asks for {count} of a kind, and there are "
                f"only {num_tensors} tensors"
            )
    try:
        with torch.device("meta"):
            return Codec(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(
            "does not fit its configuration, which asks for tensors of more than 2^63 numbers"
        ) from error


def to_original(codec: Codec) -> Original:
    """What `from_original` takes, with copies of the tensors, on the CPU.

    What came from an original goes back bit for bit. A codec of ours that goes there and back codes
    and decodes alike, but the original has no place for all of it: each codebook's number of
    updates becomes 1 (0 where there were none), hence another digest in the stamp, and what only
    training reads of the quantizer's configuration becomes decay 0.99, 50 iterations of k-means
    and our defaults. Raises `ValueError` for another family and for a folded codec.
    """
    config, tensors = _their_config(codec.config), codec.state_dict()
    codec.check_unfolded("to export it")
    state = {}
    for name, theirs in tensor_names(codec).items():
        tensor = tensors[name].detach().cpu()
        if _is_flag(name):
            tensor = (tensor > 0).float().reshape(1)
        state[theirs] = tensor.clone().contiguous()
    return Original(config, state)


def tensor_names(codec: Codec) -> dict[str, str]:
    """Our name of every tensor of an unfolded codec, and theirs."""
    names = {}
    for ours, theirs in _modules(codec.config):
        for leaf in codec.get_submodule(ours).state_dict():
            names[f"{ours}.{leaf}"] = f"{theirs}.{LEAVES.get(leaf, leaf)}"
    assert names.keys() == codec.state_dict().keys()
    return names


def _modules(config: CodecConfig) -> Iterator[tuple[str, str]]:
    """Names of all modules that hold tensors, ours and theirs; some hold none (ELU, Identity).

    Theirs are lists in the order of computation, numbered; activations count, and an LSTM or
    further residual units move what comes after.
    """
    for side, slots in (("encoder", _encoder(config.seanet)), ("decoder", _decoder(config.seanet))):
        for number, (name, inside) in enumerate(slots):
            for ours, theirs in inside.items():
                yield f"{side}.{name}{ours}", f"{side}.model.{number}{theirs}"
    yield "semantic_head", "transform"
    for index in range(config.quantizer.num_codebooks):
        yield f"quantizer.codebooks.{index}", f"quantizer.vq.layers.{index}._codebook"


# What is inside a slot of their lists, ours and theirs.
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


def config_from_original(theirs: Mapping[str, Any]) -> CodecConfig:
    """Ours for what config.json holds. Raises `ValueError` that names the missing or bad key."""
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
        raise ValueError(f"strides must be a list of whole numbers, got {theirs['strides']!r}")
    values = {
        "activation": ACTIVATIONS[theirs["activation"]],
        "bidirectional": bool(theirs["bidirectional"]),
        "strides": [whole("strides", stride) for stride in theirs["strides"]],
    }
    values |= {
        key: whole(key, theirs[key], *LIMITS.get(key, ())) for key in needed if key not in values
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


def whole(key: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> int:
    """A whole number, which JSON may hold as 8 or as 8.0, or a `ValueError` that names the key."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value % 1 != 0 or not least <= value <= most:
        raise ValueError(f"{key} must be a whole number, {least} to {most}, got {value!r}")
    return int(value)


def _their_config(ours: CodecConfig) -> dict[str, Any]:
    if ours.family != "seanet":
        raise ValueError(f"only codecs of the family seanet can be exported, not {ours.family}")
    seanet, quantizer = asdict(ours.seanet), asdict(ours.quantizer)
    config = {key: seanet[name] for key, name in SEANET_KEYS.items()}
    config |= {key: quantizer[name] for key, name in QUANTIZER_KEYS.items()}
    config |= {"strides": list(ours.seanet.strides), "sample_rate": ours.sample_rate}
    config["activation"] = {name: key for key, name in ACTIVATIONS.items()}[seanet["activation"]]
    # Without an LSTM the original would double the channels for a backward direction all the same.
    config["bidirectional"] = ours.seanet.bidirectional and ours.seanet.num_lstm_layers > 0
    return config


def some(names: list[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _is_flag(name: str) -> bool:
    """Where we count the updates of a codebook, theirs says whether there were any."""
    return name.endswith(".num_updates")


def renamed(name: str, endings: Mapping[str, str]) -> str:
    """The name with another ending where it has one of `endings`."""
    for one, other in endings.items():
        if name.endswith(f".{one}"):
            return name.removesuffix(one) + other
    return name


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
    with atomic_files(folder) as temporary:
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
