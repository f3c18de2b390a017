"""Default training data of recipes/tts.py and recipes/asr.py: tokens of Debian's recorded prompts
(25 minutes of one speaker) by the shipped codec, with the smoke configuration."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from codec import load_codec
from recipes.lib.commands import HERE, Command, run
from recipes.lib.config import CONFIGS, load_config, naming_key
from recipes.lib.voice_training import VoiceConfig
from recipes.offline.packaged_models import MODELS

V = TypeVar("V", bound=VoiceConfig)

OUT = Path("out/first")
DONE_FILE = "complete"
"""File in the folder of the tokens that marks a finished export."""


def load_voice_config(cls: type[V], argv: Sequence[str], recipe: str, description: str) -> V:
    """Returns the configuration of `argv`; if it has no `train`, the smoke configuration of
    `recipe` with the changes of `argv`, and tokens of the recorded prompts.

    The main process makes missing models, lists and tokens; the others wait for them.

    Raises:
        ValueError: a key or value is wrong, or a download failed.
    """
    config = load_config(cls, argv, description)
    if config.train is not None:
        return config
    layers = (f"{recipe}/smoke.yaml", f"{recipe}/recorded_prompts.yaml")
    files = [word for layer in layers for word in ("--config", str(CONFIGS / layer))]
    config = load_config(cls, [*files, *argv])
    models = [config.ar.base, *filter(None, (config.tts_eval.judge, config.tts_eval.speaker))]
    make = "run `make models` where packages can be downloaded, then this command again"
    _make(lambda: model_commands(models), make)
    # One folder of tokens for each codec.
    with naming_key("codec"):
        digest = load_codec(config.codec).stamp.digest
    tokens = OUT / f"tokens-{digest[:8]}"
    name = "or name token shards of your own: train=FOLDER codec=CODEC"
    _make(lambda: token_commands(config.codec, tokens), name)
    (tokens / DONE_FILE).touch()
    if not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        torch.set_num_threads(os.cpu_count() or 1)  # A launch without a file allows one.
    return replace(config, train=str(tokens / "train"), dev=str(tokens / "dev"))


def model_commands(paths: Sequence[str]) -> list[Command]:
    """Returns the command that makes the missing ones of `paths`, if `make models` knows them; else
    no command."""
    known = {f"models/{model.name}": model.name for model in MODELS}
    missing = [known[path] for path in paths if path in known and not Path(path).exists()]
    program = str(HERE / "offline_models.py")
    return [Command("download models", [sys.executable, program, *missing])] if missing else []


def token_commands(codec: str, tokens: Path) -> list[Command]:
    """Returns the commands from Debian's packages to `tokens`/train and `tokens`/dev; none if
    DONE_FILE exists."""
    if (tokens / DONE_FILE).exists():
        return []
    cuts, python = OUT / "cuts", sys.executable
    prepare = [python, str(HERE / "prepare_data.py"), "prompts", "--out", str(cuts)]
    export = [python, str(HERE / "export_tokens.py"), f"codec={codec}"]
    listed = [] if (cuts / "dev.jsonl.gz").exists() else [
        Command("download 568 recorded prompts of one speaker", [*prepare, "--dev-cuts", "40"])
    ]  # fmt: skip
    return [
        *listed,
        *(
            Command(
                f"export the {split} tokens",
                [*export, f"cuts={cuts / split}.jsonl.gz", f"out={tokens / split}"],
            )
            for split in ("train", "dev")
        ),
    ]


def _make(missing: Callable[[], list[Command]], remedy: str) -> None:
    """The main process runs the commands. The others wait until none is missing: there is no
    process group yet, and if the main process fails, the launcher ends them."""
    if int(os.environ.get("RANK", "0")):
        while missing():
            time.sleep(1)
        return
    commands = missing()
    for number, command in enumerate(commands, start=1):
        try:
            run(command, number, len(commands), quiet=True)
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from None
