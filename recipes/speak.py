"""Lets a trained voice speak dev prompts and transcribe dev items, and scores both."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codec import write_audio
from codec.tokens import TokenRow, TokenShard
from eval.benchmark import (
    Provenance,
    Row,
    Utterance,
    append_rows,
    rows_of,
    score_asr,
    score_tts,
    table,
)  # fmt: skip
from eval.speaker import SpeakerEncoder
from eval.transcribe import Judge
from recipes.common import Run, git_revision
from slm.config import SamplingConfig
from slm.pipeline import Speech, Voice
from slm.prompts import Prompt

logger = logging.getLogger(__name__)

ROWS = "rows.jsonl"
METRICS = ("wer", "cer", "similarity", "failure", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeakConfig:
    """What is spoken after training, and who judges it."""

    num_items: int = 8
    """Dev items, spread over the list; 0: none."""
    prompt_seconds: float = 3.0
    """Length of a continuation's beginning; of an item at most half."""
    longest_prompt: float = 8.0
    """Seconds of the longest whole recording that is a prompt for another text."""
    batch: int = 8
    """Items generated together."""
    judge: str | None = None
    """Folder of the Whisper model that transcribes what was spoken; null: no WER."""
    speaker: str | None = None
    """Folder of the speaker encoder; null: no similarity."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the codes are drawn."""

    def __post_init__(self) -> None:
        if self.num_items < 0 or self.batch < 1 or self.prompt_seconds <= 0:
            raise ValueError("speak: num_items >= 0, batch >= 1 and prompt_seconds > 0, please")


class Task(NamedTuple):
    """Something to say."""

    id: str
    text: str
    prompt: Prompt


class Judges(NamedTuple):
    judge: Judge | None
    encoder: SpeakerEncoder | None


def speak_and_score(
    folder: Path, dev: TokenShard, speak: SpeakConfig, config: Any, run: Run
) -> None:
    """Speaks continuations and other texts, transcribes, writes rows.jsonl, prints a table."""
    voice = Voice.from_pretrained(folder / "voice")
    voice.sampling = speak.sampling
    judges = Judges(
        Judge(speak.judge) if speak.judge else None,
        SpeakerEncoder.from_folder(speak.speaker) if speak.speaker else None,
    )
    (folder / ROWS).unlink(missing_ok=True)
    items = spread(dev, speak.num_items)
    rows = transcribe_items(voice, items, provenance(config, "slm"))
    for name, tasks in (
        ("continuation", continuations(items, voice, speak)),
        ("cross", other_texts(items, dev, speak)),
    ):
        if not tasks:
            logger.warning("no dev item serves for %s", name)
            continue
        speeches = say(voice, tasks, speak, config.seed)
        scored = [
            _score(voice, task, speech, judges, folder / "speak" / name, name)
            for task, speech in zip(tasks, speeches, strict=True)
        ]
        rows += rows_of(f"dev-{name}", scored, provenance(config, "slm", speak))
    rows += _score_codec(voice, items, judges, provenance(config, "codec", speak))
    append_rows(folder / ROWS, rows)
    whole = {f"{row.list}/{row.metric}": row.value for row in rows if _is_ours(row)}
    run.log(whole, config.optim.steps)
    print(table(rows, [m for m in METRICS if any(row.metric == m for row in rows)]))


def spread(shard: TokenShard, count: int) -> list[TokenRow]:
    """`count` rows with words, evenly from the whole list."""
    usable = [i for i, text in enumerate(shard.texts) if text.strip() and shard.num_frames[i] > 1]
    if not usable:
        raise ValueError(f"{shard.files[0].parent}: no dev item has a text; export others")
    picks = np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int)
    return [shard[usable[i]] for i in dict.fromkeys(picks.tolist())]


def continuations(items: Sequence[TokenRow], voice: Voice, speak: SpeakConfig) -> list[Task]:
    """Each item's own text from its beginning on."""
    most = round(speak.prompt_seconds * voice.codec.frame_rate)
    return [
        Task(
            row.id,
            row.text,
            Prompt(codes=_codes(row)[:, : min(most, row.num_frames // 2)], text=""),
        )
        for row in items
    ]


def other_texts(items: Sequence[TokenRow], shard: TokenShard, speak: SpeakConfig) -> list[Task]:
    """Each item's text after another recording of its speaker, the longest that is short enough."""
    tasks = []
    for row in items:
        others = [
            (float(shard.durations[i]), i)
            for i, speaker in enumerate(shard.speakers)
            if speaker == row.speaker and shard.ids[i] != row.id and shard.texts[i].strip()
            and 0 < shard.durations[i] <= speak.longest_prompt
        ]  # fmt: skip
        if others:
            prompt = shard[max(others)[1]]
            tasks.append(Task(row.id, row.text, Prompt(codes=_codes(prompt), text=prompt.text)))
    return tasks


def say(voice: Voice, tasks: Sequence[Task], speak: SpeakConfig, seed: int) -> list[Speech | None]:
    """What was spoken; None where the text could not be."""
    speeches: list[Speech | None] = [None] * len(tasks)
    ready = []
    for index, task in enumerate(tasks):
        try:
            ready.append((index, voice.prepare(task.text, task.prompt, seed + index)))
        except ValueError as error:
            logger.warning("%s was not spoken: %s", task.id, error)
    for start in range(0, len(ready), speak.batch):
        part = ready[start : start + speak.batch]
        spoken = voice.speak([utterance for _, utterance in part])
        for (index, _), speech in zip(part, spoken, strict=True):
            speeches[index] = speech
    return speeches


def _score(
    voice: Voice, task: Task, speech: Speech | None, judges: Judges, folder: Path, name: str
) -> Utterance:
    rate = voice.codec.sample_rate
    if speech is None:
        return Utterance(id=task.id, values={"failure": 1.0})
    wave = speech.wave
    nothing = task.prompt.codes[:, :0]
    if name == "continuation":  # The text has the prompt's words as well.
        wave = voice.decode(nothing, np.concatenate([task.prompt.codes, speech.codes], axis=1))
    write_audio(folder / f"{task.id}.wav", wave, rate)
    prompt = (voice.decode(nothing, task.prompt.codes), rate)
    return _judge(task, wave, rate, judges, prompt, speech.failure)


def _judge(
    task: Task, wave: np.ndarray, rate: int, judges: Judges, prompt: tuple[np.ndarray, int],
    failure: str | None,
) -> Utterance:  # fmt: skip
    embed = judges.encoder.embed if judges.encoder is not None else None
    transcribe = judges.judge.transcribe if judges.judge is not None else lambda wave, rate: ""
    scored = score_tts(task.id, task.text, wave, rate, transcribe, embed, prompt, failure)
    if judges.judge is None:
        return dataclasses.replace(scored, words=None, characters=None)
    return scored


def _score_codec(
    voice: Voice, items: Sequence[TokenRow], judges: Judges, origin: Provenance
) -> list[Row]:
    """The ceiling: the items' own codes, decoded."""
    if judges == Judges(None, None):
        return []
    scored = []
    for row in items:
        wave = voice.decode(_codes(row)[:, :0], _codes(row))
        task = Task(row.id, row.text, Prompt(codes=_codes(row), text=row.text))
        prompt = (wave[: len(wave) // 2], voice.codec.sample_rate)
        scored.append(_judge(task, wave, voice.codec.sample_rate, judges, prompt, None))
    return rows_of("dev-continuation", scored, origin)


def transcribe_items(
    voice: Voice, items: Sequence[TokenRow], origin: Provenance, batch: int = 8
) -> list[Row]:
    """WER of the model's own ASR on the items' codes."""
    texts: list[str] = []
    for start in range(0, len(items), batch):
        texts += voice.transcribe([_codes(row)[0] for row in items[start : start + batch]])
    scored = [score_asr(row.id, row.text, text) for row, text in zip(items, texts, strict=True)]
    return rows_of("dev-asr", scored, origin)


def provenance(config: Any, system: str, speak: SpeakConfig | None = None) -> Provenance:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    return Provenance(
        system=system,
        seed=config.seed,
        git=git_revision(),
        config=digest.hexdigest()[:16],
        judge=str(speak.judge or "") if speak else "",
        speaker=str(speak.speaker or "") if speak else "",
    )


def _is_ours(row: Row) -> bool:
    return row.utterance is None and row.system == "slm"


def _codes(row: TokenRow) -> np.ndarray:
    return row.codes.astype(np.int64)
