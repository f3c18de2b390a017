"""Trains a voice on token shards: the AR (it speaks and transcribes), then the NAR; lets it speak.

`accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/tts.py --config FILE k=v`

The run folder ends with voice/ (which `slm` takes), speak/ (dev prompts and what was made of them)
and rows.jsonl (their scores).
"""

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from codec import load_codec
from codec.tokens import TokenShard
from recipes.common import Run, load_config, make_accelerator, run_program, start_run
from recipes.speak import SpeakConfig, speak_and_score
from slm.ar import SpeechLM
from slm.config import ARConfig, BatchConfig, NARConfig, OptimConfig
from slm.data import ARData, NARData
from slm.nar import NAR
from slm.prompts import Coverage
from slm.train import ar_step, fit, gather, nar_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TTSConfig:
    """One voice."""

    out: str = "out/smoke/tts"
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
    """Of new weights, batches and what is spoken."""
    ar: ARConfig = field(default_factory=ARConfig)
    """The model of codebook 1."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """The AR's batches."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The AR's optimiser."""
    nar: NARConfig = field(default_factory=NARConfig)
    """The model of the other codebooks."""
    nar_batch: BatchConfig = field(default_factory=BatchConfig)
    """The NAR's batches."""
    nar_optim: OptimConfig = field(default_factory=OptimConfig)
    """The NAR's optimiser."""
    speak: SpeakConfig = field(default_factory=SpeakConfig)
    """What is spoken at the end, and who judges it."""


def main(argv: list[str]) -> None:
    config = load_config(TTSConfig, argv, "Train a voice and let it speak.")
    folder = Path(config.out)
    train, dev = open_tokens(config.codec, config.train, config.dev)
    # The adapters are put in before the Accelerator exists: under ZeRO-3 peft asks for a GPU then.
    lm = SpeechLM.create(config.ar, train.stamp, config.seed)
    accelerator = make_accelerator(folder, gradient_accumulation_steps=config.optim.accumulate)
    forget_zero3()
    run = start_run(config, folder, seed=config.seed, accelerator=accelerator)
    train_ar(lm, train, dev, run, config, folder / "voice")
    del lm
    if train.stamp.num_codebooks > 1:
        train_nar(train, dev, run, config, folder / "voice")
    if accelerator.is_main_process:
        finish_voice(folder / "voice", config.codec, card(config, train.stamp.id))
    leave_group(accelerator)
    if accelerator.is_main_process and dev is not None and config.speak.num_items:
        speak_and_score(folder, dev, config.speak, config, run.stage("speak"))


def open_tokens(codec: str, train: str, dev: str | None) -> tuple[TokenShard, TokenShard | None]:
    """The shards, checked to be the codec's own."""
    stamp = load_codec(codec).stamp
    shards = TokenShard.open(train, expect=stamp)
    return shards, TokenShard.open(dev, expect=stamp) if dev is not None else None


def forget_zero3() -> None:
    """Accelerate tells transformers of ZeRO-3, which then builds every model in pieces.

    The AR is whole before its engine is made, and the voice that speaks in the end is in one
    process: transformers had better not know.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def train_ar(
    lm: SpeechLM, train: TokenShard, dev: TokenShard | None, run: Run, config: Any, voice: Path
) -> None:
    """Trains the AR in the stage `ar` and writes voice/ar."""

    def data(shard: TokenShard, limit: int | None = None) -> ARData:
        return ARData.open(
            shard, lm.tokenizer, lm.vocabulary, config.ar.tasks, config.batch, config.seed,
            longest=lm.max_positions, limit=limit,
        )  # fmt: skip

    train_data = data(train, config.limit)
    dev_data = data(dev) if dev is not None else None
    engine = fit(lm, ar_step, train_data, dev_data, run.stage("ar"), config.optim)
    state = gather(run.accelerator, engine)
    if run.accelerator.is_main_process:
        corpus = train_data.corpus
        lm.save(voice / "ar", state)
        texts = (train.texts[i] for i in corpus.items)
        Coverage.of(texts, int(corpus.num_frames.max())).save(voice / "ar")
    run.accelerator.free_memory(engine)


def train_nar(
    train: TokenShard, dev: TokenShard | None, run: Run, config: TTSConfig, voice: Path
) -> None:
    """Trains the NAR in the stage `nar` and writes voice/nar."""
    sizes = train.stamp.codebook_sizes
    if config.nar.codebook_sizes not in ((), sizes):
        raise ValueError(
            f"nar.codebook_sizes {config.nar.codebook_sizes} are not those of the tokens, {sizes}"
        )
    settings = dataclasses.replace(config.nar, codebook_sizes=sizes)
    # All ranks build the same model; what they drew while training the AR differs.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        nar = NAR(settings)
    train_data = NARData.open(train, settings, config.nar_batch, config.seed, limit=config.limit)
    dev_data = None
    if dev is not None:
        dev_data = NARData.open(dev, settings, config.nar_batch, config.seed)
    engine = fit(nar, nar_step, train_data, dev_data, run.stage("nar"), config.nar_optim)
    state = gather(run.accelerator, engine)
    if run.accelerator.is_main_process:
        whole = NAR(settings)
        whole.load_state_dict(state)
        whole.save_pretrained(voice / "nar")
        (voice / "nar" / "README.md").unlink(missing_ok=True)
    run.accelerator.free_memory(engine)


def finish_voice(voice: Path, codec: str, text: str) -> None:
    """Puts the codec and the card beside the models."""
    load_codec(codec).save_pretrained(voice / "codec")
    (voice / "README.md").write_text(text, encoding="utf-8")


def card(config: Any, codec_id: str) -> str:
    """The voice's README.md."""
    return (
        "---\nlibrary_name: parlance\ntags: [text-to-speech, automatic-speech-recognition]\n---\n"
        f"# A voice grown from {config.ar.base}\n\n"
        f"Trained on the tokens `{config.train}` of the codec `{codec_id}`.\n\n"
        "    slm tts --voice . --text TEXT --prompt RECORDING --out OUT.wav\n"
        "    slm asr --voice . RECORDING\n\n"
        "`ar/coverage.json` says which scripts and characters its training texts had. Name\n"
        "here the recordings it was trained on, with their licences, before you publish it.\n"
    )


def leave_group(accelerator: Accelerator) -> None:
    """Training is over: the main process goes on alone, however long it takes."""
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
