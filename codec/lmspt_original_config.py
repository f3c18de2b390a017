"""The released LM-SPT's configuration, and ours for it.

The keys are arguments of its Python classes (github.com/kakao/lmspt), which Hydra builds from YAML.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from codec.config import CodecConfig, QuantizerConfig
from codec.lmspt_config import AuxiliaryConfig, ConvConfig, LMSPTConfig, least_stride
from codec.original import whole

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
