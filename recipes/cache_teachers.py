"""Caches teachers' features: speech features, words with times, and LM states of the words.

    python recipes/cache_teachers.py "cuts=[data/train.jsonl.gz, data/dev.jsonl.gz]" \\
        out=out/teachers
    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 8 \\
        recipes/cache_teachers.py speech_model=facebook/hubert-base-ls960 ...

The expected size is logged before anything is computed. Started again, after an interruption or
with more cuts, it resumes. Recordings that cannot be used are skipped and listed in skipped.jsonl;
the next start tries them again.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec.distillation.feature_cache import complete_cache, write_cache
from codec.distillation.teachers import load_speech_teacher, load_text_teacher
from codec.distillation.word_alignment import load_transcriber
from codec.program import counted
from codec.training.data import read_cuts
from codec.training.run import lock_folder, make_accelerator
from recipes.lib.run import finished, load_config, run_recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Recordings, teachers and the folder of one cache."""

    cuts: tuple[Path, ...] = (Path("out/demo/cuts/train.jsonl.gz"),)
    """lhotse lists of cuts (recipes/prepare_data.py writes them)."""
    out: Path = Path("out/teachers")
    """Folder of the cache."""
    speech_model: str | None = "models/whisper-base-transformers"
    """HuBERT, WavLM, wav2vec2 or Whisper, by hub id or folder; null: no speech features."""
    speech_layer: str = "mean"
    """mean of all hidden states, last, or one by its number (0: the embeddings)."""
    text_model: str | None = "models/minilm-l6"
    """BERT, ELECTRA, DistilBERT or MiniLM, by hub id or folder; null: no LM states."""
    text_layer: str = "mean"
    """As speech_layer."""
    transcriber: str | None = "models/whisper-base-transformers"
    """A CTC model or Whisper, for words with times, by hub id or folder; null: no words."""
    language: str = "en"
    """Language of the speech, for a multilingual Whisper."""
    transcript: str = "recorded"
    """Words: recorded (the cuts' transcripts, by forced alignment) or recognized."""
    batch_seconds: float = 120.0
    """Seconds of audio in a batch, padding included."""
    half: bool = True
    """Compute in bfloat16 where the hardware multiplies it, otherwise on GPUs in float16."""

    def __post_init__(self) -> None:
        if not self.cuts:
            raise ValueError("cuts names no list of cuts")
        if self.transcript not in ("recorded", "recognized"):
            raise ValueError(f"transcript must be recorded or recognized, got {self.transcript!r}")
        if self.batch_seconds <= 0:
            raise ValueError(f"batch_seconds must be positive, got {self.batch_seconds}")
        if self.text_model and not self.transcriber:
            raise ValueError("text_model needs a transcriber; name one, or set text_model=null")
        if not self.speech_model and not self.transcriber:
            raise ValueError("nothing to cache: name speech_model, transcriber, or both")


def main(argv: list[str]) -> None:
    """Writes this process's share of the cache."""
    config = load_config(CacheConfig, argv, __doc__ or "")
    accelerator = make_accelerator()
    cuts = [cut for path in config.cuts for cut in list(read_cuts(path))]
    options: dict[str, Any] = {"device": accelerator.device, "half": config.half}
    speech = text = transcriber = None
    if config.speech_model:
        speech = load_speech_teacher(config.speech_model, layer=config.speech_layer, **options)
    if config.text_model:
        text = load_text_teacher(config.text_model, layer=config.text_layer, **options)
    if config.transcriber:
        transcriber = load_transcriber(config.transcriber, language=config.language, **options)
    lock = lock_folder(config.out, accelerator)
    summary = write_cache(
        config.out,
        cuts,
        speech=speech,
        text=text,
        transcriber=transcriber,
        recorded=config.transcript == "recorded",
        batch_seconds=config.batch_seconds,
        share=(accelerator.process_index, accelerator.num_processes),
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if accelerator.num_processes > 1:
            summary = complete_cache(config.out)
        results = {
            "out": str(config.out),
            "recordings": summary.num_recordings,
            "hours": round(summary.hours, 3),
            "megabytes": round(summary.num_bytes / 1e6, 1),
            "skipped": len(summary.skipped),
        }
        print(json.dumps(results))
        finished(
            f"features of {counted(summary.num_recordings, 'recording')}, "
            f"{summary.hours:.2f} hours",
            config.out,
            f"accelerate launch recipes/train_codec.py distill.cache={config.out} ...",
        )
    if lock is not None:
        lock.close()
    accelerator.end_training()


if __name__ == "__main__":
    run_recipe(main)
