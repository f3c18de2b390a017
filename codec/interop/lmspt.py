"""Checkpoints of the released LM-SPT (arXiv 2506.16738, github.com/kakao/lmspt).

Tensors are published as safetensors, their configuration as YAML of the Python package
(lmspt/infer/conf/model), from which Hydra builds the model: its keys are arguments of the package's
classes. The family lmspt has the tensors bit for bit, under other names; for what an export loses
see `to_lmspt`.
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
    MAX_CODEBOOKS,
    AuxiliaryConfig,
    CodecConfig,
    ConvConfig,
    LMSPTConfig,
    QuantizerConfig,
    least_stride,
)
from codec.interop.checkpoint import (
    WEIGHT_NORM,
    Original,
    check_files_absent,
    check_foreign,
    codec_on_meta,
    first_three,
    integer,
    match_tensors,
    read_config_text,
    read_json,
    read_state,
)
from codec.io import atomic_files, check_out_folder, parse_yaml
from codec.models.codec import Codec

MODEL_CLASS = "lmspt.model_codec.lmspt_model.LMSPT"
DECODER_CLASS = "lmspt.model_codec.dac_model.Decoder"
# Keys of the model and the original's defaults.
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
# Keys of its auxiliary decoder; those with None are required.
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
# Keys of Hydra, which builds the original's modules.
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")
CODEBOOK_SIZES = (2, 65_536)
# Residual units of a stage: the original reads this number of dilations.
NUM_UNITS = 3
# Maximum depth of nested `model` keys.
MAX_NESTING = 4

# Our name of a tensor inside its module: theirs.
LEAVES = WEIGHT_NORM | {"entries": "weight"}
USAGE = ("quantizer.semantic_vocab_usage", "quantizer.acoustic_vocab_usage")
SEMANTIC, ACOUSTIC = "semantic_encoder.", "acoustic_encoder."
AUXILIARY = "aux_decoder."


def import_lmspt(config_file: str | Path, checkpoint_file: str | Path) -> Codec:
    """The codec of a published configuration and checkpoint, for inference or further training.

    The configuration is YAML or JSON with the keys of the model, also under `model`. The checkpoint
    is safetensors or a state_dict saved with torch.save, with old or new names of weight norm, of
    any floating-point type. Raises `ValueError` if a file is corrupted or they do not match.
    """
    try:
        config = config_from_lmspt(_read_config(Path(config_file)))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    try:
        return _codec_from_state(config, read_state(Path(checkpoint_file)))
    except ValueError as error:
        raise ValueError(f"{checkpoint_file}: {error}") from error


def export_lmspt(codec: Codec, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes the files of `lmspt_files` for the original's get_model and for Hydra.

    The tensors of a shared encoder have the acoustic name only, as in the original's checkpoint.
    Raises `ValueError` for another family, for options that the original does not have, for folded
    weight norm, and for files that exist already without `overwrite`.
    """
    original, folder = to_lmspt(codec), Path(folder)
    check_out_folder(folder)
    config_name, checkpoint_name = lmspt_files(codec.config)
    check_files_absent([folder / config_name, folder / checkpoint_name], overwrite=overwrite)
    state = original.state
    if codec.config.lmspt.shared_encoder:
        state = {name: state[name] for name in state if not name.startswith(SEMANTIC)}
    auxiliary = {"_target_": DECODER_CLASS, **original.config["aux_decoder"]}
    model = {"_target_": MODEL_CLASS, **original.config, "aux_decoder": auxiliary}
    with atomic_files(folder) as temporary:
        text = yaml.safe_dump({"model": model}, sort_keys=False, default_flow_style=None)
        (temporary / config_name).write_text(text, encoding="utf-8")
        save_file(state, temporary / checkpoint_name, metadata={"format": "pt"})


def lmspt_files(config: CodecConfig) -> tuple[str, str]:
    """Names of the configuration and the checkpoint that `export_lmspt` writes.

    They follow the original: 12.5 Hz with codebooks of 16384 and 4096 entries gives the name that
    its get_model loads, lmspt_12d5hz_16384_4096.safetensors. Raises `ValueError` as `export_lmspt`.
    """
    theirs = config_to_lmspt(config)
    rate = f"{theirs['sample_rate'] / prod(theirs['encoder_rates']):g}".replace(".", "d")
    acoustic = theirs["acoustic_codebook_size"]
    acoustic = acoustic if isinstance(acoustic, list) else [acoustic]
    sizes = [theirs["semantic_codebook_size"], *acoustic]
    stem = "_".join([f"lmspt_{rate}hz", *map(str, sizes)])
    return f"{stem}_{theirs['n_codebooks']}vq.yaml", f"{stem}.safetensors"


def _read_config(file: Path) -> dict[str, Any]:
    if file.suffix == ".json":
        return read_json(file)
    text = read_config_text(file)
    try:
        config = parse_yaml(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError("has no keys and values in YAML; copy it again")
    check_foreign(config)
    return config


def from_lmspt(original: Original) -> Codec:
    """A codec with the original's tensors, with old or new names of weight norm.

    Raises `ValueError` that names the missing, unknown, misshapen and unusable tensors.
    """
    return _codec_from_state(config_from_lmspt(original.config), original.state)


def _codec_from_state(config: CodecConfig, state: Mapping[str, Tensor]) -> Codec:
    """A codec of `config` with the original's tensors. Raises `ValueError` as `from_lmspt`.

    For a shared encoder one of its two names is enough. Without tensors of an auxiliary decoder the
    codec has none.
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
    outline = codec_on_meta(config, counts, len(state))
    names, ours = lmspt_tensor_names(outline), outline.state_dict()
    shapes = {theirs: tuple(ours[name].shape) for name, theirs in names.items()}
    sizes = config.quantizer.sizes
    shapes |= {USAGE[0]: (1, sizes[0]), USAGE[1]: (len(sizes) - 1, max(sizes[1:]))}
    if config.lmspt.shared_encoder:
        shapes |= {_other_encoder(name): shapes[name] for name in shapes if _is_encoder(name)}
        twins = {_other_encoder(name): name for name in state if _is_encoder(name)}
        state = {name: state[twin] for name, twin in twins.items()} | dict(state)
    found = match_tensors(state, shapes)
    different = [
        name
        for name in shapes
        if name.startswith(ACOUSTIC)
        and config.lmspt.shared_encoder
        and not torch.equal(found[name], found[_other_encoder(name)])
    ]
    if different:
        raise ValueError(
            "does not match its configuration: use_shared_encoder is true, and there are two "
            f"encoders with different {first_three(different)}"
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
    codec.load_state_dict(ours)  # The numbers of updates are copies there.
    return codec.eval()


def to_lmspt(codec: Codec) -> Original:
    """The inverse of `from_lmspt`, with copies of the tensors on the CPU.

    An imported codec is exported bit for bit. A codec of ours has the same codes and waves after a
    round trip, but each codebook's number of updates becomes 1, so its digest changes, and the
    quantizer's training keys become our defaults. The usage of codebooks is the original's record
    of shares, or our counts. The original has one size for all acoustic codebooks: other sizes
    become lists, with the usage padded with zeros. A shared encoder has both names.

    Raises `ValueError` for another family, for options that the original does not have, and for
    folded weight norm.
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


def config_from_lmspt(theirs: Mapping[str, Any]) -> CodecConfig:
    """Our configuration for the original's keys, alone or under `model` as in its package.

    Keys of Hydra are ignored. Raises `ValueError` that names an unknown or bad key, and for options
    that the original cannot use or that we do not have.
    """
    # Training configurations have the keys under model.model.
    for _ in range(MAX_NESTING):
        if theirs.get("model") is not None:
            theirs = _mapping("model", theirs["model"])
    if references := list(_references(theirs, "")):
        raise ValueError(
            f"{', '.join(references)}: refer to other keys (${{...}}); write their values here, or "
            "use a file of the package's lmspt/infer/conf/model/, which has no references"
        )
    given = _Keys(theirs, DEFAULTS)
    _check_supported(given.values)
    causal, width = given.boolean("is_causal"), given.integer("encoder_dim")
    strides = given.strides("encoder_rates", causal)
    semantic, acoustic = (
        width if given.values[key] is None else given.integer(key)
        for key in ("semantic_encoder_dim", "acoustic_encoder_dim")
    )
    is_shared = given.boolean("use_shared_encoder")
    acoustic = semantic if is_shared else acoustic
    if given.values["latent_dim"] is None:
        # The exponent is limited so that `integer` can refuse the product.
        given.values["latent_dim"] = width * 2 ** min(len(strides), 31)
    conv = ConvConfig(
        width=acoustic,
        semantic_width=0 if semantic == acoustic else semantic,
        strides=strides,
        decoder_width=given.integer("decoder_dim"),
        decoder_strides=given.strides("decoder_rates", causal),
        dilations=given.dilations("dilation"),
        kernel_size=given.odd("residual_kernel_size"),
    )
    lmspt = LMSPTConfig(
        encoder="conv",
        decoder="conv",
        dimension=given.integer("latent_dim"),
        shared_encoder=is_shared,
        semantic_subtraction=given.boolean("semantic_subtraction"),
        causal=causal,
        conv=conv,
        auxiliary=_auxiliary(given.values),
    )
    return CodecConfig(
        family="lmspt",
        sample_rate=given.integer("sample_rate"),
        lmspt=lmspt,
        quantizer=_quantizer(given.values),
    )


def config_to_lmspt(ours: CodecConfig) -> dict[str, Any]:
    """The inverse of `config_from_lmspt`, without Hydra's keys.

    Raises `ValueError` for another family and for options that the original does not have.
    """
    if ours.family != "lmspt":
        raise ValueError(f"only codecs of the family lmspt can be exported, not {ours.family}")
    lmspt, conv, quantizer = ours.lmspt, ours.lmspt.conv, ours.quantizer
    auxiliary, semantic_width = lmspt.auxiliary, conv.semantic_width or conv.width
    if auxiliary.kind == "none":
        raise ValueError(
            "has no auxiliary decoder, and the released LM-SPT needs one; export the folder of the "
            "training run, which has it"
        )
    if unsupported := _unsupported(ours):
        raise ValueError(f"the released LM-SPT does not support {', '.join(unsupported)}")
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


def _unsupported(ours: CodecConfig) -> list[str]:
    """Options of a configuration that the original does not have."""
    lmspt, conv, quantizer = ours.lmspt, ours.lmspt.conv, ours.quantizer
    auxiliary = lmspt.auxiliary
    unsupported = {
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
    return [option for option, is_set in unsupported.items() if is_set]


class _Keys:
    """Keys of a configuration with the original's defaults for those that are missing or null.

    Methods return typed values and raise `ValueError` that names the key, prefixed by `prefix`.
    """

    def __init__(
        self, theirs: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = ""
    ) -> None:
        given = {str(key): value for key, value in theirs.items() if key not in HYDRA_KEYS}
        if unknown := sorted(given.keys() - defaults.keys()):
            alike = get_close_matches(unknown[0], defaults, n=1)
            hint = f"; is {prefix}{alike[0]} meant?" if alike else " of the released LM-SPT's model"
            raise ValueError(f"unknown key {prefix}{unknown[0]}{hint}")
        given = {key: value for key, value in given.items() if value is not None}
        self.values, self.prefix = {**defaults, **given}, prefix

    def integer(self, key: str) -> int:
        return integer(f"{self.prefix}{key}", self.values[key])

    def odd(self, key: str) -> int:
        number = self.integer(key)
        if number % 2 == 0:
            raise ValueError(f"{self.prefix}{key} must be odd, got {number}")
        return number

    def boolean(self, key: str) -> bool:
        if self.values[key] not in (0, 1):
            raise ValueError(f"{self.prefix}{key} must be true or false, got {self.values[key]!r}")
        return bool(self.values[key])

    def strides(self, key: str, causal: bool) -> tuple[int, ...]:
        name = f"{self.prefix}{key}"
        return tuple(integer(name, each, least_stride(causal)) for each in self._list(key))

    def dilations(self, key: str) -> tuple[int, ...]:
        name, numbers = f"{self.prefix}{key}", self._list(key)
        if len(numbers) < NUM_UNITS:
            raise ValueError(f"{name} needs {NUM_UNITS} numbers, got {numbers!r}")
        return tuple(integer(name, each) for each in numbers[:NUM_UNITS])

    def _list(self, key: str) -> list[Any]:
        value = self.values[key]
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"{self.prefix}{key} must be a list of integers, got {value!r}")
        return list(value)


def _references(given: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Keys whose values are Hydra references, also in lists and one level of mappings."""
    for key, value in given.items():
        if isinstance(value, Mapping) and not prefix:
            yield from _references(value, f"{key}.")
        elif isinstance(value, str | list) and "${" in str(value):
            yield f"{prefix}{key}"


def _check_supported(given: Mapping[str, Any]) -> None:
    if given["output_sample_rate"] not in (None, 0, given["sample_rate"]):
        raise ValueError(
            f"output_sample_rate is {given['output_sample_rate']}, sample_rate "
            f"{given['sample_rate']}: our codecs have one sample rate for input and output"
        )
    # The original treats any other value as rvq, for which semantic_quantizer_kwargs are not used.
    if given["semantic_quantizer"] == "fsq":
        raise ValueError(
            "semantic_quantizer is 'fsq', which has no learned codebook; only rvq can be imported"
        )
    if given["n_semantic_codebooks"] != 1:
        raise ValueError(
            f"n_semantic_codebooks is {given['n_semantic_codebooks']!r}; only 1 is supported (with "
            "another number the original cannot decode its own codes)"
        )


def _quantizer(given: Mapping[str, Any]) -> QuantizerConfig:
    count = integer("n_codebooks", given["n_codebooks"], 2, MAX_CODEBOOKS)
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
    """One number for all codebooks, or a list, of which the original reads the first `count`."""
    if not isinstance(value, list | tuple):
        return [integer(key, value, *limits)] * count
    if len(value) < count:
        raise ValueError(f"{key} needs {count} numbers, got {value!r}")
    return [integer(key, each, *limits) for each in value[:count]]


def _auxiliary(given: Mapping[str, Any]) -> AuxiliaryConfig:
    """The auxiliary decoder; by default the original builds one like its decoder."""
    theirs = given["aux_decoder"]
    if theirs is None:
        theirs = {
            "input_channel": given["latent_dim"],
            "channels": given["decoder_dim"],
            "rates": given["decoder_rates"],
            "sample_rate": given["sample_rate"],
            "is_causal": given["is_causal"],
        }
    prefix = "aux_decoder."
    keys = _Keys(_mapping("aux_decoder", theirs), AUXILIARY_DEFAULTS, prefix)
    if missing := [f"{prefix}{key}" for key, value in keys.values.items() if value is None]:
        raise ValueError(f"the configuration lacks {', '.join(missing)}")
    if keys.values["d_out"] != 1:
        raise ValueError(f"{prefix}d_out is {keys.values['d_out']!r}: our codecs are mono")
    if keys.values["input_channel"] != given["latent_dim"]:
        raise ValueError(
            f"{prefix}input_channel is {keys.values['input_channel']!r}, latent_dim is "
            f"{given['latent_dim']!r}; they must agree"
        )
    causal = keys.boolean("is_causal")
    return AuxiliaryConfig(
        kind="conv",
        sample_rate=keys.integer("sample_rate"),
        width=keys.integer("channels"),
        strides=keys.strides("rates", causal),
        dilations=keys.dilations("dilation"),
        kernel_size=keys.odd("residual_kernel_size"),
        causal=causal,
    )


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must have keys and values, got {value!r}")
    return value


def _one_or_all(numbers: tuple[int, ...]) -> int | list[int]:
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def lmspt_tensor_names(codec: Codec) -> dict[str, str]:
    """Our name of every tensor of an unfolded codec -> theirs, without the codebooks' usage.

    A shared encoder occurs once, with their semantic name.
    """
    names = {}
    for ours, theirs in _modules(codec.config):
        for leaf in codec.get_submodule(ours).state_dict():
            names[f"{ours}.{leaf}"] = f"{theirs}.{LEAVES.get(leaf, leaf)}"
    usage = [
        f"{book}.{leaf}"
        for book in _codebooks(codec.config)
        for leaf in ("cluster_size", "num_updates")
    ]
    for name in usage:
        del names[name]
    assert names.keys() | set(usage) == codec.state_dict().keys()
    return names


def _codebooks(config: CodecConfig) -> list[str]:
    """Our names of the codebooks, in order."""
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
    """Names of all modules with tensors, ours and theirs.

    Theirs are numbered in the order of computation, also inside blocks.
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
