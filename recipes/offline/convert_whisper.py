"""Converts a CTranslate2 Whisper folder into one that transformers loads.

The format of `model.bin`, little endian: a version number (6), the specification's name and
revision, the number of variables and for each name, rank, dimensions, type, number of bytes, bytes;
the number of aliases and for each alias, name. A string is its length in two bytes, and ends with a
zero byte.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from codec.distillation.teachers import loading
from codec.io import atomic_files

VERSION = 6
GELU = 3  # CTranslate2's number of the activation.
TYPES = {
    0: torch.float32,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.float16,
    5: torch.bfloat16,
}
MIN_MULTILINGUAL = 51865
"""Vocabulary size; English-only Whispers have one entry less."""


class Container(NamedTuple):
    """The content of a `model.bin`, with aliases resolved."""

    specification: str
    variables: dict[str, Tensor]


def read_container(path: Path) -> Container:
    """Reads a CTranslate2 `model.bin`.

    Raises:
        ValueError: it is of another format, truncated or corrupted.
    """
    with open(path, "rb") as file:
        try:
            (version,) = _numbers(file, "I")
            if version != VERSION:
                raise ValueError(
                    f"{path} is not a CTranslate2 file of version {VERSION}: {version}"
                )
            specification = _text(file)
            _numbers(file, "I")
            variables = dict(_variable(file) for _ in range(_numbers(file, "I")[0]))
            for _ in range(_numbers(file, "I")[0]):
                alias, name = _text(file), _text(file)
                if name not in variables:
                    raise _FormatError(f"{alias} is an alias of {name}, which is missing")
                variables[alias] = variables[name]
        except EOFError:
            raise ValueError(f"{path} is truncated; make or fetch it again") from None
        except (_FormatError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is corrupted ({error}); make or fetch it again") from error
    return Container(specification, variables)


class _FormatError(Exception):
    """Corrupted or unexpected content."""


def convert_whisper(source: Path, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a CTranslate2 Whisper into `folder` in transformers' format; after an error, nothing.

    Args:
        source: folder with model.bin, config.json and tokenizer.json.

    Raises:
        ValueError: model.bin is not a Whisper, is quantized, or lacks a variable.
    """
    variables = _whisper_variables(source)
    try:
        with atomic_files(folder) as partial:
            _write(source, variables, partial, dtype)
    except KeyError as error:
        raise ValueError(f"{source} lacks {error}; make or fetch it again") from error
    except (_FormatError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source} cannot be converted: {reason}") from error


def _whisper_variables(source: Path) -> dict[str, Tensor]:
    """The variables of model.bin. ValueError: not a Whisper, or a quantized one."""
    specification, variables = read_container(source / "model.bin")
    if specification != "WhisperSpec":
        raise ValueError(f"{source} is a {specification}, not a Whisper (WhisperSpec)")
    if any(name.endswith("weight_scale") for name in variables):
        raise ValueError(f"{source} is quantized: convert the float16 or float32 version")
    return variables


def _write(source: Path, variables: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Writes all files into an existing folder."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    if (activation := int(variables["decoder/activation"])) != GELU:
        raise _FormatError(f"activation {activation}, expected GELU ({GELU})")
    facts = json.loads((source / "config.json").read_text(encoding="utf-8"))
    special = _write_tokenizer(source, folder)
    config = _config(variables, special)
    config.dtype = dtype
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    state = {name: tensor.to(dtype) for name, tensor in _state(variables)}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise _FormatError(str(error)) from error
    model.tie_weights()
    model.generation_config = _generation_config(config, special, facts)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


def _numbers(file: BinaryIO, pattern: str) -> tuple[int, ...]:
    return struct.unpack(f"<{pattern}", _bytes(file, struct.calcsize(f"<{pattern}")))


def _bytes(file: BinaryIO, count: int) -> bytes:
    if len(found := file.read(count)) < count:
        raise EOFError
    return found


def _text(file: BinaryIO) -> str:
    return _bytes(file, _numbers(file, "H")[0])[:-1].decode()


def _variable(file: BinaryIO) -> tuple[str, Tensor]:
    name = _text(file)
    (rank,) = _numbers(file, "B")
    shape = _numbers(file, f"{rank}I")
    kind, count = _numbers(file, "BI")
    if kind not in TYPES:
        raise _FormatError(f"{name} has the unknown type {kind}")
    if count != math.prod(shape) * TYPES[kind].itemsize:
        raise _FormatError(f"{name} of shape {shape} and {TYPES[kind]} has {count} bytes")
    data = bytearray(_bytes(file, count))
    if not data:
        return name, torch.empty(shape, dtype=TYPES[kind])
    return name, torch.frombuffer(data, dtype=TYPES[kind]).view(shape)


def _config(variables: dict[str, Tensor], special: dict[str, int]) -> Any:
    """The WhisperConfig that follows from the shapes of the variables."""
    from transformers import WhisperConfig

    vocabulary, width = variables["decoder/embeddings/weight"].shape
    end = special["<|endoftext|>"]
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        encoder_layers=_num_layers(variables, "encoder"),
        decoder_layers=_num_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_start_token_id=special["<|startoftranscript|>"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def _generation_config(config: Any, special: dict[str, int], facts: dict[str, Any]) -> Any:
    """The configuration of transformers' generate() for this Whisper."""
    from transformers import GenerationConfig

    values: dict[str, Any] = {
        "alignment_heads": facts["alignment_heads"],
        "suppress_tokens": facts["suppress_ids"],
        "begin_suppress_tokens": facts["suppress_ids_begin"],
        "decoder_start_token_id": config.decoder_start_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "no_timestamps_token_id": special["<|notimestamps|>"],
        "prev_sot_token_id": special["<|startofprev|>"],
        "max_length": config.max_target_positions,
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
        "is_multilingual": config.vocab_size >= MIN_MULTILINGUAL,
    }
    if values["is_multilingual"]:
        names = {number: name for name, number in special.items()}
        values["lang_to_id"] = {names[number]: number for number in facts["lang_ids"]}
        tasks = ("transcribe", "translate")
        values["task_to_id"] = {task: special[f"<|{task}|>"] for task in tasks}
    return GenerationConfig(**values)


def _write_tokenizer(source: Path, folder: Path) -> dict[str, int]:
    """Writes the tokenizer's files; returns the ids of the special tokens."""
    from transformers import WhisperTokenizer

    with loading(str(source), "tokenizer"):
        tokenizer = WhisperTokenizer.from_pretrained(source, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return tokenizer.get_added_vocab()


def _num_layers(variables: dict[str, Tensor], side: str) -> int:
    return sum(name.endswith("ffn/layer_norm/beta") for name in variables if name.startswith(side))


def _state(variables: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the variables with transformers' names."""
    names = {"gamma": "weight", "beta": "bias"}
    for side in ("encoder", "decoder"):
        yield (
            f"model.{side}.embed_positions.weight",
            variables[f"{side}/position_encodings/encodings"],
        )
        for end, name in names.items():
            yield f"model.{side}.layer_norm.{name}", variables[f"{side}/layer_norm/{end}"]
        for layer in range(_num_layers(variables, side)):
            here, there = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            yield from _attention(variables, f"{here}/self_attention", f"{there}.self_attn")
            if side == "decoder":
                yield from _attention(variables, f"{here}/attention", f"{there}.encoder_attn")
            for end, name in names.items():
                yield f"{there}.final_layer_norm.{name}", variables[f"{here}/ffn/layer_norm/{end}"]
            for number in (1, 2):
                linear = f"{here}/ffn/linear_{number - 1}"
                for part in ("weight", "bias"):
                    yield f"{there}.fc{number}.{part}", variables[f"{linear}/{part}"]
    yield "model.decoder.embed_tokens.weight", variables["decoder/embeddings/weight"]
    for name in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            yield f"model.encoder.{name}.{part}", variables[f"encoder/{name}/{part}"]


def _attention(variables: dict[str, Tensor], here: str, there: str) -> Iterator[tuple[str, Tensor]]:
    """The four projections of attention, partly fused in one matrix, and the norm before them."""
    for end, name in (("gamma", "weight"), ("beta", "bias")):
        yield f"{there}_layer_norm.{name}", variables[f"{here}/layer_norm/{end}"]
    cross = f"{here}/linear_2/weight" in variables
    groups = (("q",), ("k", "v"), ("out",)) if cross else (("q", "k", "v"), ("out",))
    for number, group in enumerate(groups):
        for part in ("weight", "bias"):
            fused = variables[f"{here}/linear_{number}/{part}"]
            for name, tensor in zip(group, fused.chunk(len(group)), strict=True):
                if (name, part) == ("k", "bias"):
                    if tensor.any():  # Whisper has no key bias; CTranslate2 stores zeros.
                        raise _FormatError(f"{here} has a key bias, Whisper has none")
                else:
                    yield f"{there}.{name}_proj.{part}", tensor.contiguous()
