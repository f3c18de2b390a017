"""Trains a codec on a list of cuts.

`accelerate launch recipes/train_codec.py --config FILE key=value`

The run folder ends with `codec/`, which `load_codec` and the command `codec` take.
"""

import logging
from dataclasses import replace
from pathlib import Path

from accelerate.utils import DistributedDataParallelKwargs

from codec import Codec
from codec.program import counted
from codec.training.codec_fit import fit
from codec.training.data import read_cuts
from codec.training.run import make_accelerator, start_run
from recipes.lib.codec_training import (
    TrainCodecConfig,
    build_models,
    check_codec,
    known_codes,
    starting_architecture,
)
from recipes.lib.config import current_keys
from recipes.lib.run import PROFILE_HELP, finished, load_config, run_recipe, split_profile

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Trains a codec."""
    profile_steps, argv = split_profile(argv)
    config = load_config(TrainCodecConfig, argv, f"Train a speech codec. {PROFILE_HELP}")
    codec = starting_architecture(config.codec, config.start_from)
    check_codec(codec, config.losses, config.resynthesis, config.start_from)
    if config.freeze_semantic:
        Codec(codec).freeze_semantic()
    accelerator = make_accelerator(
        Path(config.out),
        gradient_accumulation_steps=config.optim.accumulate,
        # The codebooks are buffers that all ranks compute alike; nothing needs to be copied.
        handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    train, dev = read_cuts(config.train), read_cuts(config.dev)
    codes = None
    if config.semantic_codes:
        codes = known_codes(config, list(train), quiet=not accelerator.is_main_process)
    run = start_run(
        config,
        config.out,
        seed=config.seed,
        accelerator=accelerator,
        current_keys=current_keys,
        profile_steps=profile_steps,
    )
    models = replace(build_models(config, accelerator.device), codes=codes)
    if models.teachers is not None:
        train, dev = models.teachers.known(list(train)), models.teachers.known(list(dev))
    codec = models.student.codec
    logger.info(
        "%s; %g Hz, %s; %d cuts to train on, %d to validate on",
        _sizes(codec), codec.frame_rate, _books(codec), len(train), len(dev),
    )  # fmt: skip
    fit(
        models, list(train), list(dev), run,
        crops=config.data, losses=config.losses, optim=config.optim,
    )  # fmt: skip
    trained = run.folder / "codec"
    finished(
        f"codec at {codec.frame_rate:g} Hz, {_books(codec)}, {counted(config.optim.steps, 'step')}",
        trained,
        f"python recipes/export_tokens.py cuts={config.train} codec={trained} out=out/tokens/train",
    )


def _sizes(codec: Codec) -> str:
    """Millions of parameters, in all and of each part."""
    parts = {name: part.parameters() for name, part in codec.named_children()}
    millions = {name: sum(each.numel() for each in part) / 1e6 for name, part in parts.items()}
    each = ", ".join(f"{name} {size:.1f}" for name, size in millions.items())
    return f"{sum(millions.values()):.1f} M parameters ({each})"


def _books(codec: Codec) -> str:
    sizes = codec.codebook_sizes
    each = sizes[:1] if len(set(sizes)) == 1 else sizes
    return f"{counted(len(sizes), 'codebook')} of {', '.join(map(str, each))}"


if __name__ == "__main__":
    run_recipe(main)
