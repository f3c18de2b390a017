"""Lets a trained voice speak dev prompts and transcribe dev items, and scores both."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codec import write_audio
from codec.tokens import TokenRow, TokenShard, written_whole
from eval.benchmark import (
    ASR_PREFIX,
    Provenance,
    Row,
    Utterance,
    append_rows,
    rows_of,
    score_asr,
    score_tts,
    table,
)  # fmt: skip
from recipes.common import Run, git_revision
from recipes.scoring import Judges, digest_of_text, digest_of_voice, load_judges, safe_name
from slm.config import SamplingConfig
from slm.pipeline import Speech, Voice
from slm.prompts import Prompt

logger = logging.getLogger(__name__)

ROWS = "rows.jsonl"
METRICS = ("asr_wer", "asr_cer", "wer", "cer", "similarity", "failure", "seconds")


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


class Line(NamedTuple):
    """Something to say."""

    id: str
    text: str
    prompt: Prompt


def speak_and_score(
    folder: Path, dev: TokenShard, speak: SpeakConfig, config: Any, run: Run
) -> None:
    """Speaks continuations and other texts, transcribes, writes rows.jsonl, prints a table."""
    voice = Voice.from_pretrained(folder / "voice", device=run.accelerator.device.type)
    voice.sampling = speak.sampling
    judges = load_judges(speak.judge, speak.speaker)
    items = spread(dev, speak.num_items)
    model = digest_of_voice(folder / "voice")
    origin = provenance(config, "slm", judges, model)
    rows = transcribe_items(voice, items, origin)
    begun = continuations(items, voice, speak)
    for name, lines in (("continuation", begun), ("cross", other_texts(items, dev, speak))):
        if not lines:
            logger.warning("no dev item serves for %s", name)
            continue
        speeches = say(voice, lines, speak, config.seed)
        scored = [
            _score(voice, line, speech, judges, folder / "speak" / name)
            for line, speech in zip(lines, speeches, strict=True)
        ]
        rows += rows_of(list_name(f"dev-{name}", lines), scored, origin)
    codec = provenance(config, "codec", judges, voice.codec.stamp.digest)
    rows += _score_codec(voice, items, begun, judges, codec)
    with written_whole(folder / ROWS) as temporary:
        append_rows(temporary, rows)
    run.log(
        {f"{row.list.partition('@')[0]}/{row.metric}": row.value for row in rows if _is_ours(row)},
        config.optim.steps,
    )
    print(table(rows, [m for m in METRICS if any(row.metric == m for row in rows)]))


def spread(shard: TokenShard, count: int) -> list[TokenRow]:
    """`count` rows with words, evenly from the whole list."""
    usable = [i for i, text in enumerate(shard.texts) if text.strip() and shard.num_frames[i] > 1]
    if not usable:
        raise ValueError(f"{shard.files[0].parent}: no dev item has a text; export others")
    picks = np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int)
    return [shard[usable[i]] for i in dict.fromkeys(picks.tolist())]


def list_name(name: str, lines: Sequence[Line] | Sequence[TokenRow]) -> str:
    """A list's name with a digest of its ids and texts: two shards never pass for one."""
    return f"{name}@{digest_of_text(json.dumps([[line.id, line.text] for line in lines]))[:8]}"


def continuations(items: Sequence[TokenRow], voice: Voice, speak: SpeakConfig) -> list[Line]:
    """Each item's own text from its beginning on."""
    most = round(speak.prompt_seconds * voice.codec.frame_rate)
    starts = [_codes(row)[:, : min(most, row.num_frames // 2)] for row in items]
    return [
        Line(row.id, row.text, Prompt(codes=start, text="", continuation=True))
        for row, start in zip(items, starts, strict=True)
    ]


def other_texts(items: Sequence[TokenRow], shard: TokenShard, speak: SpeakConfig) -> list[Line]:
    """Each item's text after another recording of its speaker, the longest that is short enough."""
    lines = []
    for row in items:
        others = [
            (float(shard.durations[i]), i)
            for i, speaker in enumerate(shard.speakers)
            if speaker == row.speaker and shard.ids[i] != row.id and shard.texts[i].strip()
            and 0 < shard.durations[i] <= speak.longest_prompt
        ]  # fmt: skip
        if others:
            prompt = shard[max(others)[1]]
            lines.append(Line(row.id, row.text, Prompt(codes=_codes(prompt), text=prompt.text)))
    return lines


def say(voice: Voice, lines: Sequence[Line], speak: SpeakConfig, seed: int) -> list[Speech | None]:
    """What was spoken; None where the text could not be."""
    speeches: list[Speech | None] = [None] * len(lines)
    ready = []
    for index, line in enumerate(lines):
        try:
            ready.append((index, voice.prepare(line.text, line.prompt, seed + index)))
        except ValueError as error:
            logger.warning("%s was not spoken: %s", line.id, error)
    for start in range(0, len(ready), speak.batch):
        part = ready[start : start + speak.batch]
        spoken = voice.speak([utterance for _, utterance in part])
        for (index, _), speech in zip(part, spoken, strict=True):
            speeches[index] = speech
    return speeches


def _score(
    voice: Voice, line: Line, speech: Speech | None, judges: Judges, folder: Path
) -> Utterance:
    """Writes what was spoken, and scores it: a refused text loses all its words."""
    if speech is None:
        return _judge(voice, line, line.prompt.codes[:, :0], judges, "refused")
    wave = _whole(voice, line, speech.codes) if line.prompt.continuation else speech.wave
    write_audio(folder / f"{safe_name(line.id)}.wav", wave, voice.codec.sample_rate)
    scored = _judge(voice, line, speech.codes, judges, speech.failure)
    return dataclasses.replace(scored, seed=speech.seed)


def _judge(
    voice: Voice, line: Line, codes: np.ndarray, judges: Judges, failure: str | None = None
) -> Utterance:
    """Scores the new part: its voice alone, but the words behind the beginning that it goes on.

    Where nothing was added, the beginning's own words and voice earn nothing.
    """
    rate = voice.codec.sample_rate
    if failure in ("empty", "refused") or not codes.shape[1]:
        wave = whole = np.zeros(0, np.float32)
        prompt = None
    else:
        wave = voice.decode(line.prompt.codes, codes)
        prompt = (voice.decode(codes[:, :0], line.prompt.codes), rate)
        whole = _whole(voice, line, codes) if line.prompt.continuation else wave

    def hear(_wave: np.ndarray, rate: int) -> str:
        return judges.transcribe(whole, rate)

    scored = score_tts(line.id, line.text, wave, rate, hear, judges.embed, prompt, failure)
    if not judges.judge_name:
        return dataclasses.replace(scored, words=None, characters=None)
    return scored


def _whole(voice: Voice, line: Line, codes: np.ndarray) -> np.ndarray:
    """The wave of a beginning and what goes on from it."""
    return voice.decode(codes[:, :0], np.concatenate([line.prompt.codes, codes], axis=1))


def _score_codec(
    voice: Voice,
    items: Sequence[TokenRow],
    begun: Sequence[Line],
    judges: Judges,
    origin: Provenance,
) -> list[Row]:
    """The ceiling: the items' own codes behind the very beginnings that the voice was given."""
    if not judges.judge_name and judges.embed is None:
        return []
    scored = [
        _judge(voice, line, _codes(row)[:, line.prompt.codes.shape[1] :], judges)
        for row, line in zip(items, begun, strict=True)
    ]
    return rows_of(list_name("dev-continuation", begun), scored, origin)


def transcribe_items(
    voice: Voice, items: Sequence[TokenRow], origin: Provenance, batch: int = 8
) -> list[Row]:
    """WER of the model's own ASR on the items' codes."""
    if not origin.model and voice.folder is not None:
        origin = dataclasses.replace(origin, model=digest_of_voice(voice.folder))
    texts: list[str] = []
    for start in range(0, len(items), batch):
        texts += voice.transcribe([_codes(row)[0] for row in items[start : start + batch]])
    scored = [score_asr(row.id, row.text, text) for row, text in zip(items, texts, strict=True)]
    return rows_of(list_name("dev-asr", items), scored, origin, prefix=ASR_PREFIX)


def provenance(
    config: Any, system: str, judges: Judges | None = None, model: str = ""
) -> Provenance:
    """Where a run's rows come from; `model` is a digest of what is scored."""
    return Provenance(
        system=system,
        seed=config.seed,
        git=git_revision(),
        config=digest_of_text(json.dumps(dataclasses.asdict(config), sort_keys=True)),
        model=model,
        judge=judges.judge_name if judges else "",
        speaker=judges.speaker_name if judges else "",
    )


def _is_ours(row: Row) -> bool:
    return row.utterance is None and row.system == "slm"


def _codes(row: TokenRow) -> np.ndarray:
    return row.codes.astype(np.int64)
