"""Trains a text LLM to transcribe token shards, and says its dev WER.

`accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/asr.py --config FILE k=v`

The run folder ends with voice/, which `slm asr` takes, and rows.jsonl.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from codec.tokens import written_whole
from eval.benchmark import append_rows, table
from recipes.common import load_config, make_accelerator, run_program, start_run
from recipes.speak import ROWS, provenance, spread, transcribe_items
from recipes.tts import card, finish_voice, forget_zero3, leave_group, open_tokens, train_ar
from slm.ar import SpeechLM
from slm.config import ARConfig, BatchConfig, OptimConfig, TaskConfig
from slm.pipeline import Voice

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ASRConfig:
    """One model that transcribes."""

    out: str = "out/smoke/asr"
    """Run folder: goes on where an earlier start with the same configuration stopped."""
    codec: str = "out/smoke/codec/codec"
    """Folder or hub id of the codec that made the tokens."""
    train: str = "out/smoke/tokens/train"
    """Token shards to train on (recipes/export_tokens.py makes them)."""
    dev: str | None = "out/smoke/tokens/dev"
    """Token shards of other speakers; null: none."""
    limit: int | None = None
    """Use only so many of the training items."""
    seed: int = 0
    """Of new weights and batches."""
    ar: ARConfig = field(default_factory=lambda: ARConfig(tasks=TaskConfig(tts=0.0, asr=1.0)))
    """The model."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Its batches."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Its optimiser."""
    num_items: int = 64
    """Dev items to transcribe at the end, spread over the list; 0: none."""


def main(argv: list[str]) -> None:
    config = load_config(ASRConfig, argv, "Train a text LLM to transcribe.")
    folder = Path(config.out)
    train, dev = open_tokens(config.codec, config.train, config.dev)
    lm = SpeechLM.create(config.ar, train.stamp, config.seed)
    accelerator = make_accelerator(folder, gradient_accumulation_steps=config.optim.accumulate)
    forget_zero3()
    run = start_run(config, folder, seed=config.seed, accelerator=accelerator)
    train_ar(lm, train, dev, run, config, folder / "voice")
    if accelerator.is_main_process:
        finish_voice(folder / "voice", config.codec, card(config, train.stamp.id))
    leave_group(accelerator)
    if accelerator.is_main_process and dev is not None and config.num_items:
        voice = Voice.from_pretrained(folder / "voice", device=accelerator.device.type)
        rows = transcribe_items(voice, spread(dev, config.num_items), provenance(config, "slm"))
        with written_whole(folder / ROWS) as temporary:
            append_rows(temporary, rows)
        print(table(rows))


if __name__ == "__main__":
    run_program(main)
