"""Trains a voice on token shards: the AR (it speaks and transcribes), then the NAR; lets it speak.

`accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/tts.py --config FILE k=v`

The run folder ends with voice/ (which `slm` takes), speak/ (dev prompts and what was made of them)
and rows.jsonl (their scores).
"""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from codec import Codec, load_codec
from codec.tokens import TokenShard, written_whole
from recipes.checkpoints import is_write_failure, sync
from recipes.common import Run, load_config, make_accelerator, run_program, start_run
from recipes.speak import SpeakConfig, speak_and_score
from slm.alphabet import Alphabet
from slm.ar import SpeechLM
from slm.config import ARConfig, BatchConfig, NARConfig, OptimConfig
from slm.data import ARData
from slm.nar import NAR
from slm.nar_data import NARData
from slm.prompts import Coverage, Prompt, has_words
from slm.train import ar_step, fit, gather, nar_step

logger = logging.getLogger(__name__)

NUM_PROMPTS = 3
PROMPT_SECONDS = 4.0
"""Long enough to tell a voice."""


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
    alphabet = lm.alphabet
    del lm
    if train.stamp.num_codebooks > 1:
        train_nar(alphabet, train, dev, run, config, folder / "voice")
    if accelerator.is_main_process:
        longest = Coverage.load(folder / "voice" / "ar").longest_frames / train.stamp.frame_rate
        prompts = pick_prompts(dev, str(config.dev), longest) if dev is not None else None
        finish_voice(folder / "voice", config.codec, card(config, train.stamp.id), prompts)
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
            shard, lm.alphabet, config.ar.tasks, config.batch, config.seed,
            longest=lm.max_positions, limit=limit,
        )  # fmt: skip

    train_data = data(train, config.limit)
    dev_data = data(dev) if dev is not None else None
    engine = fit(lm, ar_step, train_data, dev_data, run.stage("ar"), config.optim)
    state = gather(run.accelerator, engine)
    if run.accelerator.is_main_process:
        corpus = train_data.corpus
        coverage = Coverage.of(corpus.texts, int(corpus.num_frames.max()))
        with whole_folder(voice / "ar") as partial:
            lm.save(partial, state)
            coverage.save(partial)
    run.accelerator.free_memory(engine)


def train_nar(
    alphabet: Alphabet, train: TokenShard, dev: TokenShard | None, run: Run, config: TTSConfig,
    voice: Path,
) -> None:  # fmt: skip
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

    def data(shard: TokenShard, limit: int | None = None) -> NARData:
        return NARData.open(shard, alphabet, settings, config.nar_batch, config.seed, limit=limit)

    train_data = data(train, config.limit)
    dev_data = data(dev) if dev is not None else None
    engine = fit(nar, nar_step, train_data, dev_data, run.stage("nar"), config.nar_optim)
    state = gather(run.accelerator, engine)
    if run.accelerator.is_main_process:
        whole = NAR(settings)
        whole.load_state_dict(state)
        with whole_folder(voice / "nar") as partial:
            whole.save_pretrained(partial)
            (partial / "README.md").unlink(missing_ok=True)
    run.accelerator.free_memory(engine)


def finish_voice(
    voice: Path, codec: str, text: str, prompts: Mapping[str, Prompt] | None = None
) -> None:
    """Puts the codec, the card and some prompts beside the models."""
    with whole_folder(voice / "codec") as partial:
        shipped = load_codec(codec, fold=False)
        if isinstance(shipped, Codec) and shipped.auxiliary is not None:
            shipped = shipped.without_auxiliary()
        shipped.save_pretrained(partial)
    if prompts:
        with whole_folder(voice / "prompts") as partial:
            for name, prompt in prompts.items():
                prompt.save(partial, name)
    with written_whole(voice / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def pick_prompts(dev: TokenShard, source: str, longest: float) -> dict[str, Prompt]:
    """Up to three dev recordings to take voices from, of different speakers where there are such.

    They last the nearest to PROMPT_SECONDS, or to a third of the `longest` training recording, in
    seconds: prompt and text together must not be longer than that.
    """
    aim = min(PROMPT_SECONDS, longest / 3)
    usable = [i for i, text in enumerate(dev.texts) if has_words(text) and dev.num_frames[i] > 0]
    usable.sort(key=lambda i: abs(float(dev.durations[i]) - aim))
    first_of: dict[str, int] = {}
    for index in usable:
        first_of.setdefault(dev.speakers[index], index)
    chosen = list(dict.fromkeys([*first_of.values(), *usable]))[:NUM_PROMPTS]
    prompts = {}
    for number, row in enumerate((dev[index] for index in chosen), start=1):
        credit = f"{row.id} of {source}" + (f", speaker {row.speaker}" if row.speaker else "")
        prompts[f"dev-{number}"] = Prompt(
            codes=row.codes.astype(np.int64), text=row.text, credit=credit
        )
    return prompts


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`; at the end it is synced and takes its place.

    After an error it is gone and an earlier `folder` is as it was. A full disk is an OSError.
    """
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            sync(path)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_write_failure(error) and not isinstance(error, OSError):
            raise OSError(f"{folder}: cannot be written ({error}); is the disk full?") from error
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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
