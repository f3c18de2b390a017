"""Pretrained text LLMs, as they come."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

SAMPLES_PER_TENSOR = 4096


class Base(NamedTuple):
    """A text LLM as it was loaded, before anything was added."""

    lm: Any
    tokenizer: Any
    digest: str
    """Over names, shapes and samples of its parameters, whatever precision they are loaded in."""


def load_base(
    name: str | Path, num_layers: int | None = None, dtype: torch.dtype = torch.float32
) -> Base:
    """Loads a causal LM by hub id, folder or .gguf file. Raises ValueError when it cannot."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    where: dict[str, Any] = {}
    source = str(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path}: no such .gguf file")
        source, where = str(path.parent), {"gguf_file": path.name}
    elif not path.is_dir() and (path.is_absolute() or str(name).count("/") != 1):
        raise ValueError(f"{name}: no such folder of a text LLM, nor a hub id (owner/name)")
    with _told(name):
        config = AutoConfig.from_pretrained(source, **where)
    if num_layers is not None:
        _keep_layers(config, num_layers, str(name))
    with _told(name), _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, attn_implementation="sdpa",
            output_loading_info=True, **where,
        )  # fmt: skip
        lm, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"{name}: its weights lack {', '.join(lacking[:3])}; fetch it again")
    return Base(lm, tokenizer, digest_of(lm))


@contextmanager
def _told(name: str | Path) -> Iterator[None]:
    """Turns what transformers raises into one line that names the LLM."""
    try:
        yield
    except Exception as error:  # tokenizers raises bare ones
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: cannot be loaded as a text LLM: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from listing the layers that a miniature leaves behind."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _keep_layers(config: Any, num_layers: int, name: str) -> None:
    if num_layers > config.num_hidden_layers:
        raise ValueError(
            f"ar.num_layers is {num_layers}, but {name} has only {config.num_hidden_layers} layers"
        )
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


def digest_of(lm: nn.Module) -> str:
    """16 hex digits over up to 4096 evenly spaced values of every parameter, in bfloat16.

    It tells one LLM from another in well under a second; it is no proof against tampering.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(lm.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLES_PER_TENSOR)]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
