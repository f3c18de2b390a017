"""Scores of a voice on the dev set, at the end of its training."""

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from codec.distillation.word_alignment import load_transcriber
from codec.io import atomic_file, parse_json, sha256_of
from codec.tokens import TokenShard
from codec.training.run import Run
from eval.benchmark import Provenance, Row, machine, rows_of, table
from recipes.scoring.eval_items import (
    continuation_items,
    eval_lists,
    list_name,
    normalized_texts,
    select_items,
)
from recipes.scoring.judges import digest_of_voice, load_judges
from recipes.scoring.rows import append_rows
from recipes.scoring.speaker_similarity import read_sexes
from recipes.scoring.synthesis import (
    METRICS,
    TEXTLESS,
    ScoredList,
    codec_rows,
    load_scorers,
    provenance,
    synthesize_items,
    transcribe_items,
    write_prompts,
    write_results,
)
from slm.models.ar import SpeechLM
from slm.train import text_perplexity
from slm.voice import Voice

ROWS = "rows.jsonl"
BASE_PERPLEXITY_FILE = "perplexity.json"
"""Perplexity of the held-out texts before training."""


class ItemCounts(NamedTuple):
    """Number of dev items of each kind of evaluation."""

    asr: int
    tts: int
    textless: int


def item_counts(config: Any, train: TokenShard, dev: TokenShard | None) -> ItemCounts:
    """Returns what `config`, a recipes.lib.voice_training.VoiceConfig, evaluates."""
    if dev is None:
        return ItemCounts(0, 0, 0)
    tasks, count = config.ar.tasks, config.tts_eval.num_items
    synthesizes = config.nar is not None or train.stamp.num_codebooks == 1
    return ItemCounts(
        asr=(count if config.num_asr_items is None else config.num_asr_items) if tasks.asr else 0,
        tts=count if tasks.tts and synthesizes else 0,
        textless=count if tasks.continuation and synthesizes else 0,
    )


def check_scores(config: Any, train: TokenShard, dev: TokenShard | None) -> None:
    """Checks before a training that the evaluation after it can run.

    Raises:
        ValueError: a model or file is missing, or settings do not fit the tasks.
    """
    evaluation, tasks, counts = config.tts_eval, config.ar.tasks, item_counts(config, train, dev)
    if dev is None or not any(counts):
        return
    select_items(dev, 1)
    if not (counts.tts or counts.textless):
        return
    if evaluation.sampling.num_candidates > 1 and counts.tts and not tasks.asr:
        raise ValueError(
            f"tts_eval.sampling.num_candidates is {evaluation.sampling.num_candidates}, and the "
            "voice's own ASR reranks candidates; set it to 1, or train with ar.tasks.asr"
        )
    # One rank scores: the others need no memory of its GPU.
    device = "auto" if int(os.environ.get("RANK", 0)) == 0 else "cpu"
    load_judges(evaluation.judge, evaluation.speaker, language=evaluation.language, device=device)
    if evaluation.sexes is not None:
        read_sexes(Path(evaluation.sexes), dev)
    if evaluation.aligner is not None and counts.tts:
        load_transcriber(evaluation.aligner)


def score_voice(
    folder: Path, train: TokenShard, dev: TokenShard | None, texts: Sequence[str], config: Any,
    run: Run,
) -> None:  # fmt: skip
    """Evaluates FOLDER/voice; writes FOLDER/rows.jsonl and FOLDER/speak/, prints a table.

    Main process only.

    Args:
        texts: held-out texts for perplexity.
        config: a recipes.lib.voice_training.VoiceConfig.
    """
    counts = item_counts(config, train, dev)
    if not texts and not any(counts):
        return
    voice = Voice.from_pretrained(folder / "voice", device=run.accelerator.device.type)
    language = config.tts_eval.language
    origin = provenance(config, "slm", model=digest_of_voice(folder / "voice"), language=language)
    known = normalized_texts(train, language) if any(counts) else set()
    rows: list[Row] = []
    if dev is not None and counts.asr:
        rows += transcribe_items(voice, select_items(dev, counts.asr, known, language), origin)
    if dev is not None and (counts.tts or counts.textless):
        evaluation, out = config.tts_eval, folder / "speak"
        rate, seconds = voice.codec.frame_rate, evaluation.prompt_seconds
        voice.sampling = evaluation.sampling
        scorers = load_scorers(evaluation, voice, dev)
        judges = scorers.judges
        judged = provenance(config, "slm", judges, origin.model, language)
        codec = provenance(config, "codec", judges, voice.codec.stamp.digest, language)
        items = select_items(dev, evaluation.num_items, known, language)
        lists = {}
        if counts.tts:
            lists = eval_lists(items, dev, voice, judges, seconds, evaluation.aligner)
        for name, listed in lists.items():
            write_prompts(voice, listed, out / "prompts" / name)
        if counts.textless:
            lists[TEXTLESS] = continuation_items(items, seconds, rate)
        scored: list[ScoredList] = []
        for name, listed in lists.items():
            one = synthesize_items(voice, name, listed, scorers, out, judged, evaluation.batch)
            rows += rows_of(list_name(f"dev-{name}", listed), one.scored, judged)
            scored.append(one)
            if name != "cross":
                rows += codec_rows(voice, name, listed, scorers, codec)
        write_results(out / "results.jsonl", {"slm": scored}, rate)
    if texts:
        before = parse_json((folder / BASE_PERPLEXITY_FILE).read_text())
        rows += _perplexity_rows(before, texts, dataclasses.replace(origin, system="base"))
        rows += _perplexity_rows(perplexities(voice.lm, texts), texts, origin)
    with atomic_file(folder / ROWS) as temporary:
        append_rows(temporary, rows)
    own = [row for row in rows if row.utterance is None and row.system == "slm"]
    run.log(
        {f"{row.list.partition('@')[0]}/{row.metric}": row.value for row in own},
        config.optim.steps,
    )
    print(table(rows, [m for m in METRICS if any(row.metric == m for row in rows)]))


def perplexities(lm: SpeechLM, texts: Sequence[str]) -> dict[str, float]:
    """Returns `perplexity` (softmax over the text LLM's tokens) and `perplexity_all` (over the
    extended vocabulary)."""
    return {
        "perplexity": text_perplexity(lm, lm.tokenizer, texts),
        "perplexity_all": text_perplexity(lm, lm.tokenizer, texts, rows="all"),
    }


def store_base_perplexity(folder: Path, lm: SpeechLM, texts: Sequence[str]) -> None:
    """Writes the perplexities of an untrained model to BASE_PERPLEXITY_FILE, unless it has them."""
    path = folder / BASE_PERPLEXITY_FILE
    if not path.exists() or "perplexity_all" not in parse_json(path.read_text()):
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(perplexities(lm, texts)))


def _perplexity_rows(
    values: Mapping[str, float], texts: Sequence[str], origin: Provenance
) -> list[Row]:
    name = f"texts@{sha256_of(json.dumps(list(texts)), 8)}"
    libraries = [f"{one} {importlib.metadata.version(one)}" for one in ("torch", "transformers")]
    return [
        Row(
            system=origin.system, list=name, utterance=None, metric=metric, value=value,
            n=len(texts), seed=origin.seed, git=origin.git, config=origin.config,
            model=origin.model, library=", ".join(libraries), machine=machine(),
        )
        for metric, value in values.items()
    ]  # fmt: skip
