"""The released LM-SPT's files into our codecs, and ours into its.

It publishes tensors as safetensors; their configuration is a YAML file of its Python package
(lmspt/infer/conf/model), from which Hydra builds the model.

The released LM-SPT in memory: its tensors, and ours for them.

LM-SPT (arXiv 2506.16738, github.com/kakao/lmspt). Its tensors are ours under other names, bit for
bit, and theirs come back from us as they were; what ours lose on the way there, `to_lmspt` says.

The released LM-SPT's configuration, and ours for it.

The keys are arguments of its Python classes (github.com/kakao/lmspt), which Hydra builds from YAML.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from codec.config import (
    AuxiliaryConfig,
    CodecConfig,
    ConvConfig,
    LMSPTConfig,
    QuantizerConfig,
    least_stride,
)
from codec.interop.speechtokenizer import (
    WEIGHT_NORM,
    Original,
    check_foreign,
    fitting,
    outlined,
    read_config_text,
    read_json,
    read_state,
    some,
    whole,
)
from codec.io import atomic_files, check_out_folder
from codec.models.codec import Codec

# Keys of the model and what the original makes of those that are not there.
DEFAULTS: dict[str, Any] = {
    "sample_rate": 44_100,
    "output_sample_rate": None,
    "encoder_dim": 64,
    "semantic_encoder_dim": None,
    "acoustic_encoder_dim": None,
    "encoder_rates": [2, 4, 8, 8],
    "latent_dim": None,
    "decoder_dim": 1536,
    "decoder_rates": [8, 8, 4, 2],
    "n_codebooks": 8,
    "n_semantic_codebooks": 1,
    "codebook_size": 2048,
    "codebook_dim": 8,
    "semantic_codebook_size": None,
    "semantic_codebook_dim": None,
    "acoustic_codebook_size": None,
    "acoustic_codebook_dim": None,
    "quantizer_dropout": 1.0,
    "semantic_quantizer": "rvq",
    "semantic_quantizer_kwargs": None,
    "use_shared_encoder": False,
    "semantic_subtraction": True,
    "dilation": [1, 3, 9],
    "residual_kernel_size": 7,
    "is_causal": False,
    "aux_decoder": None,
}
# The same of its auxiliary decoder; those without any it cannot be built without.
AUXILIARY_DEFAULTS: dict[str, Any] = {
    "input_channel": None,
    "channels": None,
    "rates": None,
    "d_out": 1,
    "sample_rate": None,
    "dilation": [1, 3, 9],
    "residual_kernel_size": 7,
    "is_causal": False,
}
# Hydra's, which builds the original's modules.
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")
CODEBOOK_SIZES = (2, 65_536)
MOST_CODEBOOKS = 1024
# Units of a stage: the original reads as many dilations, and no more.
NUM_UNITS = 3
# So deep may the keys lie, each time under `model`.
MOST_NESTING = 4


def config_from_lmspt(theirs: Mapping[str, Any]) -> CodecConfig:
    """Ours for the original's keys, alone or under `model` as its package keeps them.

    Keys of Hydra are passed over. Raises `ValueError` that names the unknown or bad key, and for
    what the original cannot do or we have no place for.
    """
    # Configurations of its training have them under model.model.
    for _ in range(MOST_NESTING):
        if theirs.get("model") is not None:
            theirs = _mapping("model", theirs["model"])
    if referring := list(_referring(theirs, "")):
        raise ValueError(
            f"{', '.join(referring)}: refer to other keys (${{...}}); write their values here, or "
            "take a file of the package's lmspt/infer/conf/model/, which refer to none"
        )
    given = _filled(theirs, DEFAULTS, "")
    _check_possible(given)
    causal, sample_rate = _truth("is_causal", given["is_causal"]), _whole_of(given, "sample_rate")
    width = _whole_of(given, "encoder_dim")
    rates = _rates("encoder_rates", given["encoder_rates"], causal)
    semantic, acoustic = (
        width if given[key] is None else _whole_of(given, key)
        for key in ("semantic_encoder_dim", "acoustic_encoder_dim")
    )
    is_shared = _truth("use_shared_encoder", given["use_shared_encoder"])
    acoustic = semantic if is_shared else acoustic
    if given["latent_dim"] is None:
        # The limit of `whole` holds for the product too.
        given["latent_dim"] = width * 2 ** min(len(rates), 31)
    conv = ConvConfig(
        width=acoustic,
        semantic_width=0 if semantic == acoustic else semantic,
        strides=rates,
        decoder_width=_whole_of(given, "decoder_dim"),
        decoder_strides=_rates("decoder_rates", given["decoder_rates"], causal),
        dilations=_dilations("dilation", given["dilation"]),
        kernel_size=_odd(given, "residual_kernel_size"),
    )
    lmspt = LMSPTConfig(
        encoder="conv",
        decoder="conv",
        dimension=_whole_of(given, "latent_dim"),
        shared_encoder=is_shared,
        semantic_subtraction=_truth("semantic_subtraction", given["semantic_subtraction"]),
        causal=causal,
        conv=conv,
        auxiliary=_auxiliary(given),
    )
    return CodecConfig(
        family="lmspt", sample_rate=sample_rate, lmspt=lmspt, quantizer=_quantizer(given)
    )


def _without_place(ours: CodecConfig) -> list[str]:
    """What the original cannot have."""
    lmspt, conv, quantizer = ours.lmspt, ours.lmspt.conv, ours.quantizer
    auxiliary = lmspt.auxiliary
    no_place = {
        "lmspt.encoder spectral": lmspt.encoder != "conv",
        "lmspt.decoder spectral": lmspt.decoder != "conv",
        "lmspt.semantic whisper": lmspt.semantic != "own",
        "lmspt.transformer": lmspt.transformer.num_layers > 0,
        f"lmspt.auxiliary.kind {auxiliary.kind}": auxiliary.kind != "conv",
        f"lmspt.conv.dilations other than {NUM_UNITS}": len(conv.dilations) != NUM_UNITS,
        f"lmspt.auxiliary.dilations other than {NUM_UNITS}": len(auxiliary.dilations) != NUM_UNITS,
        "quantizer.learning ema": quantizer.learning != "gradient",
        "quantizer.normalize false": not quantizer.normalize,
        "codebooks without projections (quantizer.codebook_dimension 0)": not all(
            quantizer.dimensions
        ),
    }
    return [what for what, is_there in no_place.items() if is_there]


def config_to_lmspt(ours: CodecConfig) -> dict[str, Any]:
    """What `config_from_lmspt` takes, without Hydra's keys.

    Raises `ValueError` that names what the original has no place for.
    """
    if ours.family != "lmspt":
        raise ValueError(f"only codecs of the family lmspt can be exported, not {ours.family}")
    lmspt, conv, quantizer = ours.lmspt, ours.lmspt.conv, ours.quantizer
    auxiliary, semantic_width = lmspt.auxiliary, conv.semantic_width or conv.width
    if auxiliary.kind == "none":
        raise ValueError(
            "has no auxiliary decoder any more, and the released LM-SPT has one; export the folder "
            "that was trained, which still has it"
        )
    if said := _without_place(ours):
        raise ValueError(f"the released LM-SPT has no place for {', '.join(said)}")
    return {
        "sample_rate": ours.sample_rate,
        "encoder_rates": list(conv.strides),
        "decoder_rates": list(conv.upsampling),
        "encoder_dim": conv.width,
        "semantic_encoder_dim": semantic_width,
        "latent_dim": lmspt.dimension,
        "decoder_dim": conv.decoder_width,
        "n_codebooks": quantizer.num_codebooks,
        "n_semantic_codebooks": 1,
        "quantizer_dropout": quantizer.dropout,
        "semantic_codebook_size": quantizer.sizes[0],
        "acoustic_codebook_size": _one_or_all(quantizer.sizes[1:]),
        "semantic_codebook_dim": quantizer.dimensions[0],
        "acoustic_codebook_dim": _one_or_all(quantizer.dimensions[1:]),
        "semantic_quantizer": "rvq",
        "use_shared_encoder": lmspt.shared_encoder,
        "semantic_subtraction": lmspt.semantic_subtraction,
        "dilation": list(conv.dilations),
        "residual_kernel_size": conv.kernel_size,
        "is_causal": lmspt.causal,
        "aux_decoder": {
            "input_channel": lmspt.dimension,
            "channels": auxiliary.width,
            "rates": list(auxiliary.strides),
            "sample_rate": auxiliary.sample_rate,
            "dilation": list(auxiliary.dilations),
            "residual_kernel_size": auxiliary.kernel_size,
            "is_causal": auxiliary.causal,
        },
    }


def _filled(theirs: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All keys: the given ones that say something, and the original's defaults."""
    given = {str(key): value for key, value in theirs.items() if key not in HYDRA_KEYS}
    if unknown := sorted(given.keys() - defaults.keys()):
        alike = get_close_matches(unknown[0], defaults, n=1)
        hint = f"; is {where}{alike[0]} meant?" if alike else " of the released LM-SPT's model"
        raise ValueError(f"unknown key {where}{unknown[0]}{hint}")
    return {**defaults, **{key: value for key, value in given.items() if value is not None}}


def _referring(given: Mapping[str, Any], where: str) -> Iterator[str]:
    """Keys whose values are references of Hydra's; lists are looked into, and one mapping."""
    for key, value in given.items():
        if isinstance(value, Mapping) and not where:
            yield from _referring(value, f"{key}.")
        elif isinstance(value, str | list) and "${" in str(value):
            yield f"{where}{key}"


def _check_possible(given: Mapping[str, Any]) -> None:
    if given["output_sample_rate"] not in (None, 0, given["sample_rate"]):
        raise ValueError(
            f"output_sample_rate is {given['output_sample_rate']}, sample_rate "
            f"{given['sample_rate']}: a codec of ours decodes at the rate that it encodes"
        )
    # Anything else is rvq to the original, to which semantic_quantizer_kwargs have nothing to say.
    if given["semantic_quantizer"] == "fsq":
        raise ValueError(
            "semantic_quantizer is 'fsq', which has no codebook of its own; only rvq can be "
            "imported"
        )
    if given["n_semantic_codebooks"] != 1:
        raise ValueError(
            f"n_semantic_codebooks is {given['n_semantic_codebooks']!r}, and the original always "
            "has 1: with another number it cannot decode its own codes"
        )


def _quantizer(given: Mapping[str, Any]) -> QuantizerConfig:
    count = whole("n_codebooks", given["n_codebooks"], 2, MOST_CODEBOOKS)
    sizes, dimensions = [], []
    for stage, number in (("semantic", 1), ("acoustic", count - 1)):
        for all_of, what, limits in ((sizes, "size", CODEBOOK_SIZES), (dimensions, "dim", ())):
            key = f"{stage}_codebook_{what}"
            key = f"codebook_{what}" if given[key] is None else key
            all_of += _per_codebook(key, given[key], number, limits)
    dropout = given["quantizer_dropout"]
    is_number = isinstance(dropout, int | float) and not isinstance(dropout, bool)
    if not is_number or not 0 <= dropout <= 1:
        raise ValueError(f"quantizer_dropout must lie in [0, 1], got {dropout!r}")
    return QuantizerConfig(
        num_codebooks=count,
        codebook_sizes=tuple(sizes),
        codebook_dimensions=tuple(dimensions),
        normalize=True,
        learning="gradient",
        kmeans_iterations=0,
        revival_ratio=0.0,
        dropout=float(dropout),
    )


def _per_codebook(key: str, value: Any, count: int, limits: tuple[int, ...]) -> list[int]:
    """One number for all, or a list, of which the original reads the first ones."""
    if not isinstance(value, list | tuple):
        return [whole(key, value, *limits)] * count
    if len(value) < count:
        raise ValueError(f"{key} needs {count} numbers, got {value!r}")
    return [whole(key, each, *limits) for each in value[:count]]


def _auxiliary(given: Mapping[str, Any]) -> AuxiliaryConfig:
    """Where the original names none, it takes one like its decoder, with the usual units."""
    theirs = given["aux_decoder"]
    if theirs is None:
        theirs = {
            "input_channel": given["latent_dim"],
            "channels": given["decoder_dim"],
            "rates": given["decoder_rates"],
            "sample_rate": given["sample_rate"],
            "is_causal": given["is_causal"],
        }
    where = "aux_decoder."
    inside = _filled(_mapping("aux_decoder", theirs), AUXILIARY_DEFAULTS, where)
    if missing := [f"{where}{key}" for key, value in inside.items() if value is None]:
        raise ValueError(f"the configuration lacks {', '.join(missing)}")
    if inside["d_out"] != 1:
        raise ValueError(f"{where}d_out is {inside['d_out']!r}: speech of ours is mono")
    if inside["input_channel"] != given["latent_dim"]:
        raise ValueError(
            f"{where}input_channel is {inside['input_channel']!r}, latent_dim is "
            f"{given['latent_dim']!r}; they must agree"
        )
    given = {f"{where}{key}": value for key, value in inside.items()}
    causal = _truth(f"{where}is_causal", inside["is_causal"])
    return AuxiliaryConfig(
        kind="conv",
        sample_rate=_whole_of(given, f"{where}sample_rate"),
        width=_whole_of(given, f"{where}channels"),
        strides=_rates(f"{where}rates", inside["rates"], causal),
        dilations=_dilations(f"{where}dilation", inside["dilation"]),
        kernel_size=_odd(given, f"{where}residual_kernel_size"),
        causal=causal,
    )


def _whole_of(given: Mapping[str, Any], key: str) -> int:
    return whole(key, given[key])


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must hold keys and values, got {value!r}")
    return value


def _truth(key: str, value: Any) -> bool:
    if value not in (0, 1):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return bool(value)


def _odd(given: Mapping[str, Any], key: str) -> int:
    number = whole(key, given[key])
    if number % 2 == 0:
        raise ValueError(f"{key} must be odd, got {number}")
    return number


def _dilations(key: str, value: Any) -> tuple[int, ...]:
    numbers = _list(key, value)
    if len(numbers) < NUM_UNITS:
        raise ValueError(f"{key} needs {NUM_UNITS} numbers, got {value!r}")
    return tuple(whole(key, each) for each in numbers[:NUM_UNITS])


def _rates(key: str, value: Any, causal: bool) -> tuple[int, ...]:
    return tuple(whole(key, each, least_stride(causal)) for each in _list(key, value))


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{key} must be a list of whole numbers, got {value!r}")
    return list(value)


def _one_or_all(numbers: tuple[int, ...]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


LEAVES = WEIGHT_NORM | {"entries": "weight"}
USAGE = ("quantizer.semantic_vocab_usage", "quantizer.acoustic_vocab_usage")
SEMANTIC, ACOUSTIC = "semantic_encoder.", "acoustic_encoder."
AUXILIARY = "aux_decoder."


def from_lmspt(original: Original) -> Codec:
    """A codec with the original's tensors, either way of naming weight norm.

    Raises `ValueError` that names the missing, unknown, misshapen and unusable tensors.
    """
    return filled_lmspt(config_from_lmspt(original.config), original.state)


def filled_lmspt(config: CodecConfig, state: Mapping[str, Tensor]) -> Codec:
    """A codec of `config` with the original's tensors. Raises `ValueError` as `from_lmspt`.

    Of a shared encoder's two names either is enough. A state without any tensor of an auxiliary
    decoder makes a codec without one.
    """
    if not any(name.startswith(AUXILIARY) for name in state):
        none = replace(config.lmspt.auxiliary, kind="none")
        config = replace(config, lmspt=replace(config.lmspt, auxiliary=none))
    counts = {
        "n_codebooks": config.quantizer.num_codebooks,
        "encoder_rates": len(config.lmspt.conv.strides),
        "decoder_rates": len(config.lmspt.conv.upsampling),
        "aux_decoder.rates": len(config.lmspt.auxiliary.strides),
    }
    outline = outlined(config, counts, len(state))
    names, ours = lmspt_tensor_names(outline), outline.state_dict()
    shapes = {theirs: tuple(ours[name].shape) for name, theirs in names.items()}
    sizes = config.quantizer.sizes
    shapes |= {USAGE[0]: (1, sizes[0]), USAGE[1]: (len(sizes) - 1, max(sizes[1:]))}
    if config.lmspt.shared_encoder:
        shapes |= {_other_encoder(name): shapes[name] for name in shapes if _is_encoder(name)}
        twins = {_other_encoder(name): name for name in state if _is_encoder(name)}
        state = {name: state[twin] for name, twin in twins.items()} | dict(state)
    found = fitting(state, shapes)
    different = [
        name
        for name in shapes
        if name.startswith(ACOUSTIC)
        and config.lmspt.shared_encoder
        and not torch.equal(found[name], found[_other_encoder(name)])
    ]
    if different:
        raise ValueError(
            "does not fit its configuration: use_shared_encoder is true, and there are two "
            f"encoders, of different {some(different)}"
        )
    codec = Codec(config)
    ours = codec.state_dict()
    for name, theirs in names.items():
        ours[name].copy_(found[theirs])
    usage = [found[USAGE[0]][0], *found[USAGE[1]]]
    for book, row in zip(_codebooks(config), usage, strict=True):
        size = ours[f"{book}.cluster_size"]
        size.copy_(row[: len(size)])
        ours[f"{book}.num_updates"].fill_(1)
    return codec.eval()


def to_lmspt(codec: Codec) -> Original:
    """What `from_lmspt` takes, with copies of the tensors, on the CPU.

    What came from an original goes back bit for bit. A codec of ours that goes there and back codes
    and decodes alike, but each codebook's number of updates becomes 1, hence another digest in the
    stamp, and what only training reads of the quantizer's configuration becomes our defaults.
    The codebooks' use is the original's record of shares, and counts of ours. The original's own
    code has one size for all acoustic codebooks: others go into lists, their use padded with zeros.
    A shared encoder has both names, as in the original's state_dict.

    Raises `ValueError` for another family, for what the original has no place for, and for a
    folded codec.
    """
    config, tensors = config_to_lmspt(codec.config), codec.state_dict()
    codec.check_unfolded("to export it")
    state = {}
    for name, theirs in lmspt_tensor_names(codec).items():
        state[theirs] = tensors[name].detach().cpu().clone().contiguous()
    if codec.config.lmspt.shared_encoder:
        state |= {_other_encoder(name): state[name] for name in state if _is_encoder(name)}
    use = [tensors[f"{book}.cluster_size"].detach().cpu() for book in _codebooks(codec.config)]
    for name, rows in zip(USAGE, (use[:1], use[1:]), strict=True):
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        state[name] = padded.contiguous()
    return Original(config, state)


def lmspt_tensor_names(codec: Codec) -> dict[str, str]:
    """Our name of every tensor of an unfolded codec, and theirs, but for the codebooks' use.

    A shared encoder is there once, as their semantic one.
    """
    names = {}
    for ours, theirs in _modules(codec.config):
        for leaf in codec.get_submodule(ours).state_dict():
            names[f"{ours}.{leaf}"] = f"{theirs}.{LEAVES.get(leaf, leaf)}"
    use = [
        f"{book}.{leaf}"
        for book in _codebooks(codec.config)
        for leaf in ("cluster_size", "num_updates")
    ]
    for name in use:
        del names[name]
    assert names.keys() | set(use) == codec.state_dict().keys()
    return names


def _codebooks(config: CodecConfig) -> list[str]:
    """Our names of the tables, in the order of the streams."""
    return [f"{ours}.codebook" for ours, _ in _quantizers(config)]


def _quantizers(config: CodecConfig) -> Iterator[tuple[str, str]]:
    yield "quantizer.semantic.codebooks.0", "quantizer.rvq_first.quantizers.0"
    for index in range(config.quantizer.num_codebooks - 1):
        yield f"quantizer.acoustic.codebooks.{index}", f"quantizer.rvq_rest.quantizers.{index}"


def _is_encoder(name: str) -> bool:
    return name.startswith((SEMANTIC, ACOUSTIC))


def _other_encoder(name: str) -> str:
    one, other = (SEMANTIC, ACOUSTIC) if name.startswith(SEMANTIC) else (ACOUSTIC, SEMANTIC)
    return other + name.removeprefix(one)


def _modules(config: CodecConfig) -> Iterator[tuple[str, str]]:
    """Names of all modules that hold tensors, ours and theirs.

    Theirs are numbered in the order of computation, inside blocks too.
    """
    lmspt = config.lmspt
    encoder = _encoder(len(lmspt.conv.strides), lmspt.causal)
    sides = [("encoder.semantic.network", "semantic_encoder.block", encoder)]
    if not lmspt.shared_encoder:
        sides.append(("encoder.acoustic.network", "acoustic_encoder.block", encoder))
    decoder = _decoder(len(lmspt.conv.upsampling), lmspt.causal)
    auxiliary = _decoder(len(lmspt.auxiliary.strides), lmspt.auxiliary.causal)
    sides.append(("decoder", "decoder.model", decoder))
    if lmspt.auxiliary.kind != "none":
        sides.append(("auxiliary", "aux_decoder.model", auxiliary))
    for ours, theirs, slots in sides:
        for name, number in slots.items():
            yield f"{ours}.{name}", f"{theirs}.{number}"
    for ours, theirs in _quantizers(config):
        yield f"{ours}.project_in", f"{theirs}.in_proj"
        yield f"{ours}.project_out", f"{theirs}.out_proj"
        yield f"{ours}.codebook", f"{theirs}.codebook"


def _encoder(num_stages: int, causal: bool) -> dict[str, str]:
    conv = ".conv" if causal else ""
    slots = {"embed.conv": f"0{conv}"}
    for stage in range(num_stages):
        block = f"{stage + 1}.block"
        for unit in range(NUM_UNITS):
            slots |= _unit(f"stages.{stage}.units.{unit}", f"{block}.{unit}", conv)
        slots[f"stages.{stage}.activation"] = f"{block}.{NUM_UNITS}"
        slots[f"stages.{stage}.down.conv"] = f"{block}.{NUM_UNITS + 1}{conv}"
    return slots | {"activation": f"{num_stages + 1}", "project.conv": f"{num_stages + 2}{conv}"}


def _decoder(num_stages: int, causal: bool) -> dict[str, str]:
    conv = ".conv" if causal else ""
    slots = {"embed.conv": f"0{conv}"}
    for stage in range(num_stages):
        block = f"{stage + 1}.block"
        slots[f"stages.{stage}.activation"] = f"{block}.0"
        slots[f"stages.{stage}.up.conv"] = f"{block}.1{conv}"
        for unit in range(NUM_UNITS):
            slots |= _unit(f"stages.{stage}.units.{unit}", f"{block}.{unit + 2}", conv)
    return slots | {"activation": f"{num_stages + 1}", "project.conv": f"{num_stages + 2}{conv}"}


def _unit(ours: str, theirs: str, conv: str) -> dict[str, str]:
    return {
        f"{ours}.activation_in": f"{theirs}.block.0",
        f"{ours}.conv_in.conv": f"{theirs}.block.1{conv}",
        f"{ours}.activation_out": f"{theirs}.block.2",
        f"{ours}.conv_out.conv": f"{theirs}.block.3{conv}",
    }


MODEL_CLASS = "lmspt.model_codec.lmspt_model.LMSPT"
DECODER_CLASS = "lmspt.model_codec.dac_model.Decoder"


def import_lmspt(config_file: str | Path, checkpoint_file: str | Path) -> Codec:
    """The codec of a published configuration and checkpoint, ready to use or to train further.

    The configuration is YAML or JSON with the keys of the model, alone or under `model`. The
    checkpoint is safetensors or a state_dict saved with torch.save, with old or new names of weight
    norm, in any floating-point numbers. Raises `ValueError` when a file is damaged or they do not
    fit.
    """
    try:
        config = config_from_lmspt(_read_config(Path(config_file)))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    try:
        return filled_lmspt(config, read_state(Path(checkpoint_file)))
    except ValueError as error:
        raise ValueError(f"{checkpoint_file}: {error}") from error


def lmspt_files(config: CodecConfig) -> tuple[str, str]:
    """Names of the configuration and the checkpoint that `export_lmspt` writes, after the original.

    12.5 Hz with codebooks of 16384 and 4096 entries has the name that its get_model asks for:
    lmspt_12d5hz_16384_4096.safetensors. Raises `ValueError` as `export_lmspt`.
    """
    theirs = config_to_lmspt(config)
    rate = f"{theirs['sample_rate'] / prod(theirs['encoder_rates']):g}".replace(".", "d")
    acoustic = theirs["acoustic_codebook_size"]
    acoustic = acoustic if isinstance(acoustic, list) else [acoustic]
    sizes = [theirs["semantic_codebook_size"], *acoustic]
    stem = "_".join([f"lmspt_{rate}hz", *map(str, sizes)])
    return f"{stem}_{theirs['n_codebooks']}vq.yaml", f"{stem}.safetensors"


def export_lmspt(codec: Codec, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes the files of `lmspt_files`, which the original's get_model loads or Hydra builds.

    Of a shared encoder the checkpoint has the acoustic name alone, as the original's own and as it
    demands when it loads. Raises `ValueError` for another family, for what the original has no
    place for, for a folded codec and for files that are there already unless `overwrite`.
    """
    original, folder = to_lmspt(codec), Path(folder)
    check_out_folder(folder)
    config_name, checkpoint_name = lmspt_files(codec.config)
    for file in (folder / config_name, folder / checkpoint_name):
        if file.exists() and not overwrite:
            raise ValueError(f"{file}: is there already; choose another folder")
    state = original.state
    if codec.config.lmspt.shared_encoder:
        state = {name: state[name] for name in state if not name.startswith(SEMANTIC)}
    auxiliary = {"_target_": DECODER_CLASS, **original.config["aux_decoder"]}
    model = {"_target_": MODEL_CLASS, **original.config, "aux_decoder": auxiliary}
    with atomic_files(folder) as temporary:
        text = yaml.safe_dump({"model": model}, sort_keys=False, default_flow_style=None)
        (temporary / config_name).write_text(text, encoding="utf-8")
        save_file(state, temporary / checkpoint_name, metadata={"format": "pt"})


def _read_config(file: Path) -> dict[str, Any]:
    if file.suffix == ".json":
        return read_json(file)
    text = read_config_text(file)
    try:
        config = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        raise ValueError("holds no keys and values in YAML; copy it again")
    check_foreign(config)
    return config
