"""SpeechTokenizer's and DM-Codec's checkpoints into our codecs, and ours into theirs.

Both publish a config.json and a state_dict (torch.save) with the same tensors: SpeechTokenizer
(arXiv 2308.16692, github.com/ZhangXInFD/SpeechTokenizer), which DM-Codec (arXiv 2410.15017)
trains with other teachers. The tensors are ours under other names, bit for bit.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from codec.config import CodecConfig, QuantizerConfig, SEANetConfig, codec_config_from_dict
from codec.model import Codec
from codec.tokens import written_whole

CONFIG_FILE = "config.json"
CHECKPOINT_FILE = "SpeechTokenizer.pt"

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

# Our name of a tensor inside its module: theirs. Weight norm's are PyTorch's new and old ones.
WEIGHT_NORM = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
LEAVES = {
    **WEIGHT_NORM,
    "entries": "embed",
    "entry_sum": "embed_avg",
    "num_updates": "inited",
}


class Original(NamedTuple):
    """A codec as the originals keep it."""

    config: dict[str, Any]
    """Of config.json: the keys that the model reads, without those of training."""
    state: dict[str, Tensor]
    """With the names of torch.nn.utils.weight_norm (weight_g, weight_v)."""


def import_speechtokenizer(config_file: str | Path, checkpoint_file: str | Path) -> Codec:
    """The codec of a published config.json and checkpoint, ready to use or to train further.

    The checkpoint is a bare state_dict or the trainers' dictionary with a generator, saved with
    torch.save or as safetensors, with old or new names of weight norm. Settings of training in
    config.json are ignored. Raises `ValueError` when a file is damaged or they do not fit.
    """
    try:
        config = _our_config(_read_json(Path(config_file)))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    try:
        return _filled(Codec(config), _read_state(Path(checkpoint_file)))
    except ValueError as error:
        raise ValueError(f"{checkpoint_file}: {error}") from error


def export_speechtokenizer(
    codec: Codec, folder: str | Path, *, parametrized: bool = False, overwrite: bool = False
) -> None:
    """Writes config.json and SpeechTokenizer.pt, which the original's load_from_checkpoint reads.

    `parametrized` names weight norm's tensors as torch.nn.utils.parametrizations does; the
    original does not load those. Raises `ValueError` for another family, a folded codec, and files
    that are there already unless `overwrite`.
    """
    original, folder = to_original(codec), Path(folder)
    files = [folder / CONFIG_FILE, folder / CHECKPOINT_FILE]
    for file in files:
        if file.exists() and not overwrite:
            raise ValueError(f"{file}: is there already; choose another folder, or overwrite it")
    state = original.state
    if parametrized:
        state = {_new_name(name): tensor for name, tensor in state.items()}
    with written_whole(files[0]) as temporary:
        temporary.write_text(json.dumps(original.config, indent=4) + "\n", encoding="utf-8")
    with written_whole(files[1]) as temporary:
        torch.save(state, temporary)


def from_original(original: Original) -> Codec:
    """A codec with the original's tensors, either way of naming weight norm.

    Raises `ValueError` that names the missing, unknown and misshapen tensors.
    """
    return _filled(Codec(_our_config(original.config)), original.state)


def _filled(codec: Codec, state: Mapping[str, Tensor]) -> Codec:
    found = {_old_name(name): tensor for name, tensor in state.items()}
    names, ours = tensor_names(codec), codec.state_dict()
    shapes = {
        theirs: (1,) if _is_flag(name) else tuple(ours[name].shape)
        for name, theirs in names.items()
    }
    problems = {
        "missing": sorted(shapes.keys() - found.keys()),
        "unknown": sorted(found.keys() - shapes.keys()),
        "of another shape": [
            f"{name} {tuple(found[name].shape)} and not {shape}"
            for name, shape in shapes.items()
            if name in found and tuple(found[name].shape) != shape
        ],
        "with NaN or infinity": [
            name for name in shapes if name in found and not bool(found[name].isfinite().all())
        ],
    }
    if said := [f"{what}: {_some(which)}" for what, which in problems.items() if which]:
        raise ValueError(f"does not fit its configuration: tensors {'; '.join(said)}")
    for name, theirs in names.items():
        tensor = found[theirs]
        ours[name].copy_((tensor > 0).squeeze() if _is_flag(name) else tensor)
    return codec.eval()


def to_original(codec: Codec) -> Original:
    """The inverse of `from_original`, with copies of the tensors.

    Of each codebook's number of updates only remains whether there were any.
    Raises `ValueError` for another family and for a folded codec.
    """
    config, tensors = _their_config(codec.config), codec.state_dict()
    if codec.is_folded:
        raise ValueError(
            f"{codec.source}: loaded for inference, without its weight norm; load it with "
            "Codec.from_pretrained to export it"
        )
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


def _our_config(theirs: Mapping[str, Any]) -> CodecConfig:
    needed = [*SEANET_KEYS, *QUANTIZER_KEYS, "sample_rate"]
    theirs = DEFAULTS | {key: theirs[key] for key in needed if theirs.get(key) is not None}
    if missing := [key for key in needed if key not in theirs]:
        raise ValueError(f"the configuration lacks {', '.join(missing)}")
    if str(theirs["activation"]) not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {theirs['activation']!r}"
        )
    seanet = {ours: theirs[key] for key, ours in SEANET_KEYS.items()}
    quantizer = asdict(QuantizerConfig(decay=0.99, kmeans_iterations=50))
    return codec_config_from_dict(
        {
            "family": "seanet",
            "sample_rate": theirs["sample_rate"],
            "seanet": {**seanet, "activation": ACTIVATIONS[theirs["activation"]]},
            "quantizer": quantizer | {ours: theirs[key] for key, ours in QUANTIZER_KEYS.items()},
        }
    )


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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError("not a whole JSON object; copy it again")
    return config


def _read_state(file: Path) -> dict[str, Tensor]:
    """The generator's tensors by name, from any of the forms."""
    from safetensors.torch import load_file

    if not file.is_file():
        raise ValueError("no such file")
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has a dozen kinds of them for damaged files.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"not a whole checkpoint that torch.load reads with weights_only ({reason}); "
            "copy it again"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("generator"), dict):
        found = found["generator"]
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(tensor, Tensor) for tensor in found.values())
    ):
        raise ValueError("neither a state_dict nor a trainer's checkpoint with a generator in it")
    return {str(name): tensor for name, tensor in found.items()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _is_flag(name: str) -> bool:
    """Where we count the updates of a codebook, theirs says whether there were any."""
    return name.endswith(".num_updates")


def _old_name(name: str) -> str:
    for new, old in WEIGHT_NORM.items():
        name = name.removesuffix(new) + old if name.endswith(f".{new}") else name
    return name


def _new_name(name: str) -> str:
    for new, old in WEIGHT_NORM.items():
        name = name.removesuffix(old) + new if name.endswith(f".{old}") else name
    return name
