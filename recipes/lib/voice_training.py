"""Trains a voice on token shards: the AR (codebook 1, TTS and ASR), then the NAR; evaluates it.

The library behind recipes/tts.py and recipes/asr.py, which differ in their defaults. One AR learns
all tasks that have a weight. At the end the run folder has voice/ (which `slm` reads), speak/
(dev prompts and the speech synthesized from them) and rows.jsonl (the scores).
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float

from codec import Codec, load_codec
from codec.io import atomic_file, atomic_folder, sha256_of
from codec.tokens import TokenShard
from codec.training.config import SupervisedOptimConfig
from codec.training.run import Run, make_accelerator, start_run
from codec.training.supervised import fit_supervised
from codec.transcripts import has_words
from recipes.lib.config import current_keys, naming_key
from recipes.lib.run import finished
from recipes.scoring.synthesis import TTSEvalConfig
from recipes.scoring.voice import check_scores, score_voice, store_base_perplexity
from slm.config import ARConfig, BatchConfig, NARConfig
from slm.data.ar import ARData, Start
from slm.data.corpus import read_texts, usable
from slm.data.coverage import Coverage
from slm.data.interleaving import read_word_boundaries
from slm.data.nar import NARData
from slm.data.prompts import Prompt
from slm.export.voice_folder import short_path as short_path
from slm.export.voice_folder import voice_card
from slm.models.ar import SpeechLM
from slm.models.nar import NAR
from slm.tokenization.tokenizer import SpeechTextTokenizer
from slm.train import ar_step, gather, nar_step

logger = logging.getLogger(__name__)

SCORING_KEYS = ("num_asr_items", "tts_eval")
"""Training does not depend on these keys: they may change in a run folder, to evaluate again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VoiceConfig:
    """One voice."""

    out: str = "out/smoke/tts"
    """Run folder; resumes an earlier start with the same configuration (`num_asr_items` and
    `tts_eval` may differ)."""
    codec: str = "models/small/codec"
    """Folder or hub id of the codec that made the tokens."""
    train: str | None = None
    """Token shards to train on (recipes/export_tokens.py writes them); null: the smoke
    configuration is trained on recorded prompts, which are downloaded (out/first/)."""
    dev: str | None = None
    """Token shards of other speakers; null: none."""
    clips: str | None = None
    """Additional token shards of a few words each (recipes/make_clips.py) for the AR, which learns
    the alignment of text and speech faster from short items."""
    clip_epochs: float = 1.0
    """Epochs on clips alone at the start (0.5: half of their items); then utterances and clips."""
    word_boundaries: tuple[str, ...] = ()
    """Frames between words (edges.jsonl.gz of recipes/make_clips.py, of train, clips and dev), for
    ar.text.interleaved."""
    texts: str | None = None
    """Plain texts that ar.tasks.text mixes in: a .txt (paragraphs) or .jsonl file (`text` of each
    line), either gzipped or not."""
    texts_dev: str | None = None
    """Held-out texts of the same form: their perplexity is reported before and after training."""
    limit: int | None = None
    """Maximum number of training items."""
    seed: int = 0
    """Seed of new weights, batches and the speech of the evaluation."""
    ar: ARConfig = field(default_factory=ARConfig)
    """The AR, the model of codebook 1."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """The AR's batches."""
    optim: SupervisedOptimConfig = field(default_factory=SupervisedOptimConfig)
    """The AR's optimizer."""
    nar: NARConfig | None = field(default_factory=NARConfig)
    """The model of the other codebooks; null: none, and the voice has no TTS unless its codec has
    one codebook."""
    nar_batch: BatchConfig = field(default_factory=BatchConfig)
    """The NAR's batches."""
    nar_optim: SupervisedOptimConfig = field(default_factory=SupervisedOptimConfig)
    """The NAR's optimizer."""
    num_asr_items: int | None = None
    """Dev items to transcribe at the end, spread over the list; null: tts_eval.num_items."""
    tts_eval: TTSEvalConfig = field(default_factory=TTSEvalConfig)
    """Dev items to synthesize at the end, and their scores."""

    def __post_init__(self) -> None:
        if self.ar.tasks.text and self.texts is None:
            raise ValueError("ar.tasks.text needs texts: name a .txt or .jsonl file of them")
        if bool(self.word_boundaries) != self.ar.text.interleaved:
            raise ValueError(
                "ar.text.interleaved and word_boundaries belong together: set both, or neither; "
                "recipes/make_clips.py writes edges.jsonl.gz"
            )
        if self.clips is not None and self.limit is not None:
            raise ValueError("limit is for utterances: remove limit or clips")
        if not 0 <= self.clip_epochs < math.inf:
            raise ValueError(f"clip_epochs must be 0 or more, got {self.clip_epochs}")
        if self.num_asr_items is not None and self.num_asr_items < 0:
            raise ValueError(f"num_asr_items must not be negative, got {self.num_asr_items}")


class Texts(NamedTuple):
    """Plain texts; empty lists where the configuration names no file."""

    train: list[str]
    dev: list[str]


def read(config: VoiceConfig) -> Texts:
    """Returns the texts of `texts` and `texts_dev`.

    Raises:
        ValueError: a file holds no text.
    """
    if config.texts is not None and not config.ar.tasks.text:
        logger.warning("texts %s is not used: ar.tasks.text is 0", config.texts)
    used = config.texts if config.ar.tasks.text else None
    return Texts(*(read_texts(one) if one is not None else [] for one in (used, config.texts_dev)))


def train_voice(config: VoiceConfig, profile_steps: int = 0) -> None:
    """Trains and evaluates a voice. All ranks of a launch call it.

    Args:
        profile_steps: steps of each stage that torch.profiler records.

    Raises:
        ValueError: tokens, codec, models or configuration do not fit; before training starts.
    """
    folder = Path(config.out)
    train, dev = open_tokens(config)
    nar = nar_settings(config, train)
    check_scores(config, train, dev)
    texts = read(config)
    # The adapters are put in before the Accelerator exists: under ZeRO-3 peft asks for a GPU then.
    lm = SpeechLM.create(config.ar, train.stamp, config.seed)
    lm.origin["data"] = described(train, str(config.train))
    if config.clips is not None:
        lm.origin["data"] += f", and clips of them ({short_path(config.clips)})"
    accelerator = make_accelerator(folder, gradient_accumulation_steps=config.optim.accumulate)
    unset_zero3()
    run = start_run(
        config, folder, seed=config.seed, accelerator=accelerator, free=SCORING_KEYS,
        current_keys=current_keys, profile_steps=profile_steps,
    )  # fmt: skip
    if texts.dev and accelerator.is_main_process:
        store_base_perplexity(folder, lm.to(accelerator.device), texts.dev)
    train_ar(lm, train, dev, texts, run, config)
    tokenizer, origin = lm.tokenizer, lm.origin
    del lm
    if nar is not None:
        train_nar(nar, tokenizer, train, dev, run, config)
    prompts: dict[str, Prompt] = {}
    if accelerator.is_main_process:
        coverage = Coverage.load(folder / "voice" / "ar")
        if dev is not None and config.ar.tasks.tts and (nar or train.stamp.num_codebooks == 1):
            longest = coverage.longest_frames / train.stamp.frame_rate
            prompts = pick_prompts(dev, short_path(str(config.dev)), longest)
        about = voice_card(origin, train.stamp, coverage, prompts)
        finish_voice(folder / "voice", config.codec, about, prompts)
    leave_group(accelerator)
    if accelerator.is_main_process:
        score_voice(folder, train, dev, texts.dev, config, run.stage("speak"))
        command = f"slm asr --voice {folder}/voice RECORDING"
        if prompts:
            prompt = next(iter(prompts))
            command = f"slm tts --voice {folder}/voice --text TEXT --prompt {prompt} --out OUT.wav"
        tasks = [name.upper() for name in ("tts", "asr") if getattr(config.ar.tasks, name)]
        finished(f"a voice for {' and '.join(tasks) or 'continuation'}", folder / "voice", command)


def open_tokens(config: VoiceConfig) -> tuple[TokenShard, TokenShard | None]:
    """Returns the training and dev shards.

    Raises:
        ValueError: another codec than `config.codec` made them.
    """
    with naming_key("codec"):
        stamp = load_codec(config.codec).stamp
    with naming_key("train"):
        shards = TokenShard.open(str(config.train), expect=stamp)
    if config.clips is not None:
        with naming_key("clips"):
            TokenShard.open([str(config.train), config.clips])  # Raises here what is wrong.
    if config.dev is None:
        return shards, None
    with naming_key("dev"):
        return shards, TokenShard.open(config.dev, expect=stamp)


def unset_zero3() -> None:
    """Unsets the ZeRO-3 configuration that accelerate gives to transformers.

    With it, transformers partitions every model that it builds. The AR is built in one piece
    before its engine is, and the voice of the evaluation runs in one process.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def nar_settings(config: VoiceConfig, train: TokenShard) -> NARConfig | None:
    """Returns the NAR's configuration with the tokens' codebook sizes; None where no NAR is
    trained.

    Raises:
        ValueError: the configuration has other sizes, or the codec has no entries to start from.
    """
    sizes = train.stamp.codebook_sizes
    if config.nar is None or len(sizes) == 1:
        return None
    if config.nar.codebook_sizes not in ((), sizes):
        raise ValueError(
            f"nar.codebook_sizes {config.nar.codebook_sizes} are not those of the tokens, {sizes}"
        )
    if config.nar.from_codec:
        entries_of(config)  # Raises before the AR is trained.
    if config.ar.tasks.continuation and not config.nar.text_dropout:
        logger.warning(
            "ar.tasks.continuation is not 0, but nar.text_dropout is: continuation needs a NAR "
            "trained without texts too; nar.text_dropout=0.1 is a good share"
        )
    return replace(config.nar, codebook_sizes=sizes)


def entries_of(config: VoiceConfig) -> list[Float[torch.Tensor, "_ _"]]:
    """Returns the entries of the codec's codebooks, one (K, D) tensor each.

    Raises:
        ValueError: the codec has none of that form.
    """
    entries = load_codec(config.codec).entries()
    if entries is None:
        raise ValueError(f"nar.from_codec: {config.codec} has no codebook entries; set it to false")
    return entries


def train_ar(
    lm: SpeechLM, train: TokenShard, dev: TokenShard | None, texts: Texts, run: Run,
    config: VoiceConfig,
) -> None:  # fmt: skip
    """Trains the AR in the stage `ar` and writes voice/ar."""
    boundaries = read_word_boundaries(config.word_boundaries)

    def data(
        shard: TokenShard,
        plain: Sequence[str],
        limit: int | None = None,
        start: Start | None = None,
    ) -> ARData:
        # Without held-out texts, the dev losses are those of the other tasks.
        tasks = config.ar.tasks if plain else replace(config.ar.tasks, text=0.0)
        corpus = replace(usable(shard, limit), word_boundaries=boundaries)
        return ARData(
            corpus, lm.tokenizer, tasks, config.batch, config.seed,
            longest=lm.max_positions, texts=plain, start=start,
        )  # fmt: skip

    shards, start = train, None
    if config.clips is not None:
        shards = TokenShard.open([str(config.train), config.clips], expect=train.stamp)
        start = Start(np.arange(len(shards)) >= len(train), config.clip_epochs)
    train_data = data(shards, texts.train, config.limit, start)
    held_out = texts.dev if config.ar.tasks.text else []
    dev_data = data(dev, held_out) if dev is not None else None
    stage = run.stage("ar")
    hours = hours_per_step(train_data, train_data.num_frames, run, config.optim)
    engine = fit_supervised(
        lm, ar_step, train_data, dev_data, stage, config.optim, hours_per_step=hours
    )
    state = gather(run.accelerator, engine)
    if run.accelerator.is_main_process:
        corpus = train_data.corpus
        coverage = Coverage.of(corpus.texts, int(corpus.num_frames.max()))
        with atomic_folder(run.folder / "voice" / "ar") as partial:
            lm.save(partial, state)
            coverage.save(partial)
    run.accelerator.free_memory(engine)


def train_nar(
    settings: NARConfig, tokenizer: SpeechTextTokenizer, train: TokenShard,
    dev: TokenShard | None, run: Run, config: VoiceConfig,
) -> None:  # fmt: skip
    """Trains the NAR in the stage `nar` and writes voice/nar."""
    # All ranks build the same model; their generators differ after the training of the AR.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        nar = NAR(settings)
    if settings.from_codec:
        nar.init_from_codec(entries_of(config), config.seed)

    def data(shard: TokenShard, limit: int | None = None) -> NARData:
        return NARData.open(shard, tokenizer, settings, config.nar_batch, config.seed, limit=limit)

    train_data = data(train, config.limit)
    dev_data = data(dev) if dev is not None else None
    stage = run.stage("nar")
    num_frames = int(train_data.corpus.num_frames.sum())
    hours = hours_per_step(train_data, num_frames, run, config.nar_optim)
    engine = fit_supervised(
        nar, nar_step, train_data, dev_data, stage, config.nar_optim, hours_per_step=hours
    )
    state = gather(run.accelerator, engine)
    if run.accelerator.is_main_process:
        complete = NAR(settings)
        complete.load_state_dict(state)
        with atomic_folder(run.folder / "voice" / "nar") as partial:
            complete.save_pretrained(partial)
            (partial / "README.md").unlink(missing_ok=True)
    run.accelerator.free_memory(engine)


def hours_per_step(
    data: ARData | NARData, num_frames: int, run: Run, optim: SupervisedOptimConfig
) -> float:
    """Returns the hours of speech in the batches of a step.

    Args:
        num_frames: frames of the first epoch.
    """
    steps = data.num_steps(run.accelerator.num_processes, optim.accumulate)
    return num_frames / data.corpus.shard.stamp.frame_rate / 3600 / steps


def leave_group(accelerator: Accelerator) -> None:
    """Ends the process group after training: the evaluation runs on the main process alone."""
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


NUM_PROMPTS = 3
PROMPT_SECONDS = 4.0
"""Target length of a shipped prompt."""


def finish_voice(voice: Path, codec: str, card: str, prompts: Mapping[str, Prompt]) -> None:
    """Writes the codec, the card and `prompts` into the folder of the models."""
    with atomic_folder(voice / "codec") as partial:
        shipped = load_codec(codec, fold=False)
        if isinstance(shipped, Codec) and shipped.auxiliary is not None:
            shipped = shipped.without_auxiliary()
        shipped.save_pretrained(partial)
    if prompts:
        with atomic_folder(voice / "prompts") as partial:
            for name, prompt in prompts.items():
                prompt.save(partial, name)
    with atomic_file(voice / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def pick_prompts(dev: TokenShard, source: str, longest: float) -> dict[str, Prompt]:
    """Returns up to NUM_PROMPTS dev recordings as prompts, of different speakers if possible.

    Their length is nearest to PROMPT_SECONDS, or to a third of `longest` if that is less: prompt
    and target together should not be longer than the training recordings.

    Args:
        source: where the recordings are from, for the credit.
        longest: length of the longest training recording in seconds.
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


def described(shard: TokenShard, path: str) -> str:
    """Returns path, digest, number of utterances and hours of token shards, for a voice's card."""
    hours = float(np.sum(shard.durations)) / 3600
    digest = sha256_of(json.dumps([list(shard.ids), list(shard.texts)]), 8)
    return f"{short_path(path)}@{digest}, {len(shard)} utterances, {hours:.2f} hours"
