"""The scores at the end of a voice's training: what its tasks are worth on the dev list."""

import dataclasses
import importlib.metadata
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codec.tokens import TokenRow, TokenShard, written_whole
from codec.words import load_transcriber
from eval.benchmark import Provenance, Row, append_rows, machine, rows_of, table
from eval.text import normalize
from recipes.common import Run
from recipes.likeness import Likeness
from recipes.lines import Cutter, Line, continuations, crosses, list_name, spread
from recipes.scoring import Judges, digest_of_text, digest_of_voice, load_judges
from recipes.speak import (
    METRICS,
    Ears,
    SpeakConfig,
    provenance,
    score_codec,
    speak_lines,
    transcribe_items,
    write_prompts,
    write_results,
)
from slm.ar import SpeechLM
from slm.perplexity import text_perplexity
from slm.pipeline import Voice

logger = logging.getLogger(__name__)

ROWS = "rows.jsonl"
BEFORE_FILE = "perplexity.json"
"""What the LLM thought of the held-out texts before it was trained."""


def score_voice(
    folder: Path, train: TokenShard, dev: TokenShard | None, texts: Sequence[str], config: Any,
    run: Run,
) -> None:  # fmt: skip
    """Speaks, transcribes and reads what the configuration says; writes rows.jsonl, prints a table.

    `config` is recipes/voice.py's, `texts` are held-out ones.
    """
    speaks = config.ar.tasks.tts > 0 and config.speak.num_items > 0
    count = config.speak.num_items if config.num_items is None else config.num_items
    hears = config.ar.tasks.asr > 0 and count > 0
    if not texts and (dev is None or not (speaks or hears)):
        return
    voice = Voice.from_pretrained(folder / "voice", device=run.accelerator.device.type)
    origin = provenance(config, "slm", model=digest_of_voice(folder / "voice"))
    rows: list[Row] = []
    if dev is not None and hears:
        rows += transcribe_items(voice, spread(dev, count, known_texts(train)), origin)
    if dev is not None and speaks and (voice.nar is not None or voice.codec.num_codebooks == 1):
        rows += _spoken_rows(folder, voice, train, dev, config)
    if texts:
        before = json.loads((folder / BEFORE_FILE).read_text())["perplexity"]
        rows.append(perplexity_row(before, texts, dataclasses.replace(origin, system="base")))
        rows.append(
            perplexity_row(text_perplexity(voice.lm, voice.lm.alphabet, texts), texts, origin)
        )
    with written_whole(folder / ROWS) as temporary:
        append_rows(temporary, rows)
    run.log(
        {f"{row.list.partition('@')[0]}/{row.metric}": row.value for row in rows if _is_ours(row)},
        config.optim.steps,
    )
    print(table(rows, [m for m in METRICS if any(row.metric == m for row in rows)]))


def _spoken_rows(
    folder: Path, voice: Voice, train: TokenShard, dev: TokenShard, config: Any
) -> list[Row]:
    """Of continuations and of texts after other recordings, and of the codec for comparison."""
    speak = config.speak
    voice.sampling = speak.sampling
    judges = load_judges(speak.judge, speak.speaker)
    model = digest_of_voice(folder / "voice")
    origin = provenance(config, "slm", judges, model)
    items = spread(dev, speak.num_items, known_texts(train))
    ears = ears_of(voice, dev, speak, judges)
    lists = lines_of(items, dev, voice, speak, judges)
    rows, spoken = [], []
    for name, lines in lists.items():
        write_prompts(voice, lines, folder / "speak" / "prompts" / name)
        one = speak_lines(voice, name, lines, speak, ears, folder / "speak", origin)
        rows += rows_of(list_name(f"dev-{name}", lines), one.scored, origin)
        spoken.append(one)
    write_results(folder / "speak" / "results.jsonl", {"slm": spoken}, voice.codec.frame_rate)
    codec = provenance(config, "codec", judges, voice.codec.stamp.digest)
    return rows + score_codec(voice, items, lists["continuation"], ears, codec)


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


def note_perplexity(folder: Path, lm: SpeechLM, texts: Sequence[str]) -> None:
    """Writes what the LLM thinks of held-out texts before training, unless it is written."""
    path = folder / BEFORE_FILE
    if not path.exists():
        value = text_perplexity(lm, lm.alphabet, texts)
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps({"perplexity": value}))


def perplexity_row(value: float, texts: Sequence[str], origin: Provenance) -> Row:
    """The perplexity of a list of texts."""
    name = f"texts@{digest_of_text(json.dumps(list(texts)))[:8]}"
    libraries = [f"{one} {importlib.metadata.version(one)}" for one in ("torch", "transformers")]
    return Row(
        system=origin.system, list=name, utterance=None, metric="perplexity", value=value,
        n=len(texts), seed=origin.seed, git=origin.git, config=origin.config, model=origin.model,
        library=", ".join(libraries), machine=machine(),
    )  # fmt: skip


def _is_ours(row: Row) -> bool:
    return row.utterance is None and row.system == "slm"
