"""The scores at the end of a voice's training: what its tasks are worth on the dev list."""

import dataclasses
import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from codec.distillation.word_alignment import load_transcriber
from codec.io import atomic_file, sha256_of
from codec.tokens import TokenRow, TokenShard
from eval.benchmark import Provenance, Row, append_rows, machine, rows_of, table
from eval.text import normalize
from recipes.lib.run import Run
from recipes.scoring.eval_items import Cutter, Line, continuations, crosses, list_name, spread
from recipes.scoring.judges import Judges, digest_of_voice, load_judges
from recipes.scoring.speaker_similarity import Likeness, sexes_of
from recipes.scoring.synthesis import (
    METRICS,
    TEXTLESS,
    Ears,
    SpeakConfig,
    go_on_lines,
    provenance,
    rests,
    score_codec,
    speak_lines,
    transcribe_items,
    write_prompts,
    write_results,
)
from slm.models.ar import SpeechLM
from slm.train import text_perplexity
from slm.voice import Voice

logger = logging.getLogger(__name__)

ROWS = "rows.jsonl"
BEFORE_FILE = "perplexity.json"
"""What the LLM thought of the held-out texts before it was trained."""


class Scored(NamedTuple):
    """Which scores a configuration asks for."""

    heard: int
    """Dev items that are transcribed."""
    spoken: int
    """Dev items that are spoken from their texts."""
    continued: int
    """Dev items that are gone on with, without a text."""


def scored_by(config: Any, train: TokenShard, dev: TokenShard | None) -> Scored:
    """By a configuration of recipes/lib/voice_training.py."""
    if dev is None:
        return Scored(0, 0, 0)
    tasks, count = config.ar.tasks, config.speak.num_items
    heard = count if config.num_items is None else config.num_items
    sounds = config.nar is not None or train.stamp.num_codebooks == 1
    return Scored(
        heard=heard if tasks.asr else 0,
        spoken=count if tasks.tts and sounds else 0,
        continued=count if tasks.continuation and sounds else 0,
    )


def check_scores(config: Any, train: TokenShard, dev: TokenShard | None) -> None:
    """Raises ValueError for scores that could not be had, before a training that they follow."""
    speak, tasks, asked = config.speak, config.ar.tasks, scored_by(config, train, dev)
    if dev is None or not any(asked):
        return
    spread(dev, 1)
    if not (asked.spoken or asked.continued):
        return
    if speak.sampling.num_candidates > 1 and asked.spoken and not tasks.asr:
        raise ValueError(
            f"speak.sampling.num_candidates is {speak.sampling.num_candidates}: the model's "
            "own ASR compares them; set it to 1, or weigh ar.tasks.asr"
        )
    load_judges(speak.judge, speak.speaker)
    if speak.sexes is not None:
        sexes_of(dev, Path(speak.sexes))
    if speak.aligner is not None and asked.spoken:
        load_transcriber(speak.aligner)


def score_voice(
    folder: Path, train: TokenShard, dev: TokenShard | None, texts: Sequence[str], config: Any,
    run: Run,
) -> None:  # fmt: skip
    """Speaks, transcribes and reads what the configuration says; writes rows.jsonl, prints a table.

    `config` is recipes/lib/voice_training.py's, `texts` are held-out ones.
    """
    asked = scored_by(config, train, dev)
    if not texts and not any(asked):
        return
    voice = Voice.from_pretrained(folder / "voice", device=run.accelerator.device.type)
    origin = provenance(config, "slm", model=digest_of_voice(folder / "voice"))
    rows: list[Row] = []
    if dev is not None and asked.heard:
        rows += transcribe_items(voice, spread(dev, asked.heard, known_texts(train)), origin)
    if dev is not None and (asked.spoken or asked.continued):
        rows += _spoken_rows(folder, voice, train, dev, config)
    if texts:
        before = json.loads((folder / BEFORE_FILE).read_text())
        rows += perplexity_rows(before, texts, dataclasses.replace(origin, system="base"))
        rows += perplexity_rows(perplexities(voice.lm, texts), texts, origin)
    with atomic_file(folder / ROWS) as temporary:
        append_rows(temporary, rows)
    run.log(
        {f"{row.list.partition('@')[0]}/{row.metric}": row.value for row in rows if _is_ours(row)},
        config.optim.steps,
    )
    print(table(rows, [m for m in METRICS if any(row.metric == m for row in rows)]))


def _spoken_rows(
    folder: Path, voice: Voice, train: TokenShard, dev: TokenShard, config: Any
) -> list[Row]:
    """Of what is spoken from texts and without one, and of the codec for comparison."""
    speak, asked = config.speak, scored_by(config, train, dev)
    voice.sampling = speak.sampling
    judges = load_judges(speak.judge, speak.speaker)
    origin = provenance(config, "slm", judges, digest_of_voice(folder / "voice"))
    codec = provenance(config, "codec", judges, voice.codec.stamp.digest)
    items = spread(dev, speak.num_items, known_texts(train))
    ears = ears_of(voice, dev, speak, judges)
    lists = lines_of(items, dev, voice, speak, judges) if asked.spoken else {}
    rows, spoken = [], []
    for name, lines in lists.items():
        write_prompts(voice, lines, folder / "speak" / "prompts" / name)
        one = speak_lines(voice, name, lines, speak, ears, folder / "speak", origin)
        rows += rows_of(list_name(f"dev-{name}", lines), one.scored, origin)
        spoken.append(one)
    if asked.spoken:
        rows += score_codec(voice, items, lists["continuation"], ears, codec)
    if asked.continued:
        begun = continuations(items, speak.prompt_seconds, voice.codec.frame_rate)
        spoken.append(go_on_lines(voice, begun, ears, folder / "speak", origin.seed))
        for one, system in ((spoken[-1], origin), (rests(voice, begun, ears), codec)):
            rows += rows_of(list_name(f"dev-{TEXTLESS}", begun), one.scored, system)
    write_results(folder / "speak" / "results.jsonl", {"slm": spoken}, voice.codec.frame_rate)
    return rows


def ears_of(voice: Voice, dev: TokenShard, speak: SpeakConfig, judges: Judges) -> Ears:
    """Judges that know the speakers of `dev`."""
    sexes = Path(speak.sexes) if speak.sexes is not None else None
    known = Likeness(voice, dev, judges.embed, sexes) if judges.embed is not None else None
    return Ears(judges, known)


def lines_of(
    items: Sequence[TokenRow], dev: TokenShard, voice: Voice, speak: SpeakConfig, judges: Judges
) -> dict[str, list[Line]]:
    """The lines by the name of their list; a list without any is left out."""
    aligner = load_transcriber(speak.aligner) if speak.aligner is not None else None
    cutter = Cutter(voice, judges, speak.prompt_seconds, aligner)
    lists = {
        "continuation": continuations(items, speak.prompt_seconds, voice.codec.frame_rate),
        "cross": crosses(items, dev, cutter),
    }
    for name in [name for name, lines in lists.items() if not lines]:
        logger.warning("no dev item serves for %s", name)
        del lists[name]
    return lists


def known_texts(train: TokenShard) -> set[str]:
    """The normal forms of what was trained on."""
    return {normalize(text) for text in set(train.texts)}


def perplexities(lm: SpeechLM, texts: Sequence[str]) -> dict[str, float]:
    """By metric: among the text LLM's own tokens, and among all that the model may draw."""
    return {
        "perplexity": text_perplexity(lm, lm.tokenizer, texts),
        "perplexity_all": text_perplexity(lm, lm.tokenizer, texts, rows="all"),
    }


def note_perplexity(folder: Path, lm: SpeechLM, texts: Sequence[str]) -> None:
    """Writes what the LLM thinks of held-out texts before training, unless all is written."""
    path = folder / BEFORE_FILE
    if not path.exists() or "perplexity_all" not in json.loads(path.read_text()):
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(perplexities(lm, texts)))


def perplexity_rows(
    found: Mapping[str, float], texts: Sequence[str], origin: Provenance
) -> list[Row]:
    """The perplexities of a list of texts, by metric."""
    name = f"texts@{sha256_of(json.dumps(list(texts)), 8)}"
    libraries = [f"{one} {importlib.metadata.version(one)}" for one in ("torch", "transformers")]
    return [
        Row(
            system=origin.system, list=name, utterance=None, metric=metric, value=value,
            n=len(texts), seed=origin.seed, git=origin.git, config=origin.config,
            model=origin.model, library=", ".join(libraries), machine=machine(),
        )
        for metric, value in found.items()
    ]  # fmt: skip


def _is_ours(row: Row) -> bool:
    return row.utterance is None and row.system == "slm"
