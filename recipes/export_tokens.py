"""Encodes cuts into token shards with a trained codec, on one process or many.

    python recipes/export_tokens.py cuts=data/dev.jsonl.gz codec=out/codec out=out/tokens/dev
    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 8 \\
        recipes/export_tokens.py --config recipes/configs/export/speechtokenizer.yaml

The same command resumes an interrupted export. Recordings that cannot be read are skipped and
listed in skipped.jsonl in the folder of the shards; retry_skipped=true tries them again.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from codec import load_codec
from codec.program import counted
from codec.tokenize import PART_HOURS, export_tokens, parts_of, summarize
from codec.training.data import read_cuts
from codec.training.run import lock_folder, make_accelerator, shared_numbers
from recipes.lib.config import naming_key
from recipes.lib.run import finished, load_config, run_recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Recordings, codec and the folder of one export."""

    cuts: Path = Path("out/demo/cuts/train.jsonl.gz")
    """A lhotse list of cuts (recipes/prepare_data.py writes them)."""
    codec: str = "out/smoke/codec/codec"
    """Codec folder or hub id."""
    out: Path = Path("out/smoke/tokens/train")
    """Folder for the shards."""
    part_hours: float = PART_HOURS
    """Hours of speech in one Parquet file; after an interruption each process encodes at most these
    again."""
    batch_seconds: float = 120.0
    """Seconds of audio in a batch, padding included; bounds the memory."""
    retry_skipped: bool = False
    """Export parts with skipped recordings again: these may be readable now."""

    def __post_init__(self) -> None:
        if self.part_hours <= 0:
            raise ValueError(f"part_hours must be positive, got {self.part_hours}")
        if self.batch_seconds <= 0:
            raise ValueError(f"batch_seconds must be positive, got {self.batch_seconds}")


def main(argv: list[str]) -> None:
    """Exports this process's parts; the main process prints a summary."""
    config = load_config(ExportConfig, argv, __doc__ or "")
    accelerator = make_accelerator()
    with naming_key("cuts"):
        cuts = list(read_cuts(config.cuts))
    with naming_key("codec"):
        codec = load_codec(config.codec, device=str(accelerator.device))
    lock = lock_folder(config.out, accelerator)
    with tqdm(
        total=len(cuts), desc="export", unit="cut", disable=not accelerator.is_main_process
    ) as bar:
        export_tokens(
            cuts,
            codec,
            config.out,
            numbers=shared_numbers(accelerator),
            part_hours=config.part_hours,
            batch_seconds=config.batch_seconds,
            retry_skipped=config.retry_skipped,
            # The other ranks have the parts before it, or are about to.
            on_part=lambda num_cuts: bar.update(num_cuts - bar.n),
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        summary = summarize(config.out, len(parts_of(cuts, config.part_hours)))
        for skipped in summary.skipped:
            logger.warning("skipped %s: %s", skipped.id, skipped.reason)
        results = {
            "out": str(config.out),
            "utterances": summary.num_utterances,
            "hours": round(summary.hours, 3),
            "skipped": len(summary.skipped),
        }
        if summary.skipped:
            results["note"] = (
                "once they are readable, run this command again with retry_skipped=true"
            )
        print(json.dumps(results))
        finished(
            f"tokens of {counted(summary.num_utterances, 'utterance')}, {summary.hours:.2f} hours",
            config.out,
            "recipes/tts.py or recipes/asr.py under accelerate launch, with "
            f"codec={config.codec} and this folder as train= or dev=",
        )
    if lock is not None:
        lock.close()
    accelerator.end_training()


if __name__ == "__main__":
    run_recipe(main)
