"""Training of a codec: its configuration, the codec it starts from, its networks.

The library behind recipes/train_codec.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Integer
from tqdm import tqdm

from codec import Codec
from codec.config import CodecConfig, codec_config_from_dict
from codec.distillation.objectives import Student
from codec.distillation.resynthesis import Resynthesis
from codec.distillation.targets import Teachers
from codec.io import check_config_file, check_source, check_trainable, hub_reason, parse_json
from codec.modules.discriminators import Discriminators
from codec.tokens import TokenShard
from codec.training.codec_step import TrainingModels
from codec.training.config import (
    CodecOptimConfig,
    CropConfig,
    DiscriminatorConfig,
    DistillConfig,
    LossConfig,
    ResynthesisConfig,
)
from codec.training.data import load_cut
from codec.training.run import leaves, resolved

if TYPE_CHECKING:
    from lhotse.cut import Cut


def starting_architecture(codec: CodecConfig, start_from: str) -> CodecConfig:
    """Returns the architecture of the codec to train: that of `start_from`, or `codec` if that is
    "".

    Raises:
        ValueError: `start_from` is missing or not a codec of this project, or `codec` is neither
            the default nor the architecture of `start_from`.
    """
    if not start_from:
        return codec
    try:
        started = _architecture_of(start_from)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"start_from {start_from}: no such folder, and the hub does not provide it "
            f"({hub_reason(error)}); check the name"
        ) from error
    except ValueError as error:
        raise ValueError(f"start_from {error}") from error
    if codec == CodecConfig():  # The configuration does not set it.
        return started
    given, there = _written_out(codec), _written_out(started)
    if different := [key for key in given if given[key] != there[key]]:
        shown = [f"codec.{key} is {given[key]} here, {there[key]} there" for key in different[:3]]
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        raise ValueError(
            f"start_from {start_from} has another architecture than the keys of codec: "
            f"{', '.join(shown)}{more}; remove these keys, or set the same values"
        )
    return started


def _architecture_of(source: str) -> CodecConfig:
    """Reads the architecture of a folder or hub id. ValueError names the file; the hub's errors
    pass through."""
    check_source(source)
    folder, name = Path(source), f"{source}/config.json"
    file = folder / "config.json"
    if not folder.is_dir():
        file = Path(hf_hub_download(source, "config.json"))
    check_config_file(file)
    content = parse_json(file.read_text(encoding="utf-8"))
    check_trainable(content, name)
    try:
        return codec_config_from_dict(content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _written_out(codec: CodecConfig) -> dict[str, Any]:
    """Every key and its value, with the fallbacks of empty keys filled in: `codec import` writes
    these values out, the shipped files do not."""
    found = dict(leaves(resolved(codec)))
    del found["quantizer.codebook_size"], found["quantizer.codebook_dimension"]
    conv, quantizer = codec.lmspt.conv, codec.quantizer
    return found | {
        "quantizer.codebook_sizes": list(quantizer.sizes),
        "quantizer.codebook_dimensions": list(quantizer.dimensions),
        "lmspt.conv.semantic_width": conv.semantic_width or conv.width,
        "lmspt.conv.decoder_strides": list(conv.upsampling),
    }


LEAST_EQUAL = 0.9
"""Minimum share of equal codes; another precision or machine changes a few."""
NUM_CHECKED, CHECKED_SECONDS = 4, 3.0
"""Number of recordings whose codes are compared, and their approximate length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainCodecConfig:
    """One training of a codec."""

    out: str = "out/smoke/codec"
    """Run folder; resumes an earlier start with the same configuration."""
    train: str = "out/smoke/cuts/train.jsonl.gz"
    """Cuts to train on (recipes/prepare_data.py writes them)."""
    dev: str = "out/smoke/cuts/dev.jsonl.gz"
    """Cuts to validate on: speakers that are not in `train`."""
    seed: int = 0
    """Seed of initial weights and crops."""
    start_from: str = ""
    """Codec folder or hub id to train further (`codec import` makes one of a published
    checkpoint). It determines the architecture: leave `codec` out, or set the same values. Empty:
    random weights."""
    freeze_semantic: bool = False
    """Keep LM-SPT's semantic encoder and codebook of start_from unchanged
    (recipes/train_semantic.py trains them), and train the rest."""
    semantic_codes: str = ""
    """Token shards of `train` by start_from (recipes/export_tokens.py), with freeze_semantic:
    codebook 1 of recordings, for crops of any length, without encoding them again. Empty: the
    semantic encoder encodes each crop."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """Architecture."""
    discriminators: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Discriminators, used if the adversarial or the feature loss has a weight."""
    losses: LossConfig = field(default_factory=LossConfig)
    """Losses and their weights."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Teachers, used if losses.weights.distill and their own weights are not 0."""
    resynthesis: ResynthesisConfig = field(default_factory=ResynthesisConfig)
    """Resynthesis distillation (LM-SPT), used if losses.weights.resynthesis is not 0."""
    data: CropConfig = field(default_factory=CropConfig)
    """Crops and batches."""
    optim: CodecOptimConfig = field(default_factory=CodecOptimConfig)
    """Optimizer and schedule."""

    def __post_init__(self) -> None:
        if self.losses.weights.distill and not self.distill.any:
            raise ValueError(
                "losses.weights.distill needs a teacher: name distill.speech.model or "
                "distill.text.model, or set it to 0"
            )
        if self.losses.weights.resynthesis and not self.resynthesis.model:
            raise ValueError(
                "losses.weights.resynthesis needs a teacher: name resynthesis.model, or set it to 0"
            )
        if self.freeze_semantic and not self.start_from:
            raise ValueError(
                "freeze_semantic without start_from would keep random weights: name a codec whose "
                "semantic half is trained"
            )
        if self.semantic_codes and not self.freeze_semantic:
            raise ValueError("semantic_codes need a frozen codebook: set freeze_semantic")
        weights = self.losses.weights
        if self.freeze_semantic and (weights.distill or weights.resynthesis):
            raise ValueError(
                "freeze_semantic leaves no semantic codebook to teach: set losses.weights.distill "
                "and losses.weights.resynthesis to 0"
            )


def check_codec(
    codec: CodecConfig, losses: LossConfig, resynthesis: ResynthesisConfig, started: str = ""
) -> None:
    """Raises ValueError if this codec cannot be trained with these losses.

    Args:
        started: the value of start_from, for the message.
    """
    if codec.quantizer.learning == "gradient" and not losses.weights.codebook:
        raise ValueError(
            "quantizer.learning gradient: nothing trains the entries but losses.weights.codebook; "
            "give it a weight, or set learning to ema"
        )
    if losses.weights.resynthesis and resynthesis.decoder == "auxiliary":
        if codec.family != "lmspt":
            raise ValueError(
                f"resynthesis.decoder auxiliary is for codec.family lmspt: {codec.family} has no "
                "such decoder; set it to main"
            )
        if codec.lmspt.auxiliary.kind == "none" and started:
            raise ValueError(
                f"start_from {started} has no auxiliary decoder: start from the folder codec/ of "
                "the run that trained it, which still has it, set resynthesis.decoder to main, or "
                "losses.weights.resynthesis to 0"
            )
        if codec.lmspt.auxiliary.kind == "none":
            raise ValueError(
                "resynthesis.decoder auxiliary needs one: set codec.lmspt.auxiliary.kind to conv "
                "or spectral, or resynthesis.decoder to main"
            )


def build_models(config: TrainCodecConfig, device: str | torch.device) -> TrainingModels:
    """Returns the codec to train, its discriminators and its teachers, on `device` or the CPU.

    Raises:
        ValueError: the codec cannot be trained with the configured losses, or a model is missing.
    """
    codec = Codec.from_pretrained(config.start_from) if config.start_from else Codec(config.codec)
    check_codec(codec.config, config.losses, config.resynthesis, config.start_from)
    if config.freeze_semantic:
        codec.freeze_semantic()
    adversarial = config.losses.needs_discriminators
    discriminators = Discriminators(config.discriminators) if adversarial else None
    teachers = None
    if config.losses.weights.distill and config.distill.active:
        teachers = Teachers(config.distill, codec.config, device)
    resynthesis = None
    if config.losses.weights.resynthesis:
        resynthesis = Resynthesis(config.resynthesis, codec.config, device)
    # Last, so that one seed gives the codec the same initial weights with any teacher and none.
    student = Student(
        codec, config.distill, teachers.widths if teachers else None,
        config.resynthesis if resynthesis else None,
    )  # fmt: skip
    return TrainingModels(student, discriminators, teachers, resynthesis)


def known_codes(
    config: TrainCodecConfig, cuts: Sequence["Cut"], *, quiet: bool = False
) -> dict[str, Integer[np.ndarray, " _"]]:
    """Returns the codes of codebook 1, (T,) each, by the ids of all rows of semantic_codes.

    Raises:
        ValueError: a cut has no codes, the codes are those of another codebook, or the length of a
            crop is not a multiple of a frame.
    """
    codec, shard = Codec.from_pretrained(config.start_from), TokenShard.open(config.semantic_codes)
    samples = round(config.data.seconds * codec.sample_rate)
    if samples % codec.hop_length:
        raise ValueError(
            f"data.seconds {config.data.seconds:g}: with semantic_codes, crops are multiples of "
            f"a frame; take a multiple of {codec.hop_length / codec.sample_rate:g}"
        )
    rows = tqdm(range(len(shard)), desc="semantic codes", unit="utt", disable=quiet)
    known = {shard.ids[row]: shard[row].codes[0] for row in rows}
    lacking = [cut.id for cut in cuts if cut.id not in known]
    if lacking:
        raise ValueError(
            f"{config.semantic_codes}: lacks {len(lacking)} of {len(cuts)} training cuts "
            f"({lacking[0]}, ...); export the tokens of {config.train}"
        )
    _check_codes(config, codec, cuts, known)
    return known


def _check_codes(
    config: TrainCodecConfig,
    codec: Codec,
    cuts: Sequence["Cut"],
    known: Mapping[str, Integer[np.ndarray, " _"]],
) -> None:
    """Raises ValueError if codes of a few recordings differ: only the semantic half of the codec
    must be the one that made them."""
    equal = total = 0
    for cut in sorted(cuts, key=lambda cut: abs(cut.duration - CHECKED_SECONDS))[:NUM_CHECKED]:
        wave = torch.from_numpy(load_cut(cut, codec.sample_rate))[None, None]
        codes, given = codec.encode(wave, num_codebooks=1).codes[0, 0].numpy(), known[cut.id]
        size = min(len(codes), len(given))
        equal += int(np.sum(codes[:size] == given[:size]))
        total += max(len(codes), len(given))
    if equal < LEAST_EQUAL * total:
        raise ValueError(
            f"{config.semantic_codes}: codebook 1 is not that of start_from {config.start_from} "
            f"({equal} of {total} codes are the same); export the tokens again with it"
        )
