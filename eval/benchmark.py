"""Scores of systems on lists of utterances, as rows with provenance.

`score_*` score one utterance with everything that a list-level number or a significance test needs
later; `rows_of` turns a list's utterances into rows: one per utterance and metric, and one per
metric for the whole list (`utterance` is None).
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from eval import speaker, speech, text, transcribe

Transcribe = Callable[[np.ndarray, int], str]
Embed = Callable[[np.ndarray, int], np.ndarray]

WORD_METRICS = ("wer", "wil", "mer", "cer")
ASR_PREFIX = "asr_"
"""Before the word metrics of a system's own transcripts: none but these are without a judge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One number and where it comes from."""

    system: str
    list: str
    utterance: str | None
    """None: a number for the whole list."""
    metric: str
    value: float
    n: int
    """Utterances behind a list's number; for one utterance 1, or its words (characters)."""
    seed: int
    git: str
    config: str
    """Digest of the configuration, "" where there is none."""
    model: str
    """Digest of the scored model's weights, "" for recordings."""
    library: str
    machine: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What all rows of one run share."""

    system: str
    seed: int = 0
    git: str = ""
    config: str = ""
    model: str = ""
    judge: str = ""
    """Name and digest of the transcribing model, for the word metrics."""
    speaker: str = ""
    """Name and digest of the speaker encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Utterance:
    """The scores of one utterance."""

    id: str
    values: Mapping[str, float] = field(default_factory=dict)
    """Metrics whose list-level number is their mean."""
    words: text.WordErrors | None = None
    characters: text.ErrorCounts | None = None
    transcript: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Metrics that are not defined for this utterance, and why."""
    seed: int | None = None
    """What it was made from, where that is not the list's seed."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Utterance":
        stored = json.loads(line)
        for name, counts in (("words", text.WordErrors), ("characters", text.ErrorCounts)):
            stored[name] = None if stored[name] is None else counts(**stored[name])
        return cls(**stored)


def score_asr(utterance: str, reference: str, hypothesis: str, language: str = "en") -> Utterance:
    """Word and character errors of a transcript."""
    return Utterance(
        id=utterance,
        words=text.word_errors(reference, hypothesis, language),
        characters=text.character_errors(reference, hypothesis, language),
        transcript=hypothesis,
    )


def score_original(
    utterance: str,
    reference: str,
    wave: Float[np.ndarray, " S"],
    sample_rate: int,
    transcribe: Transcribe,
) -> Utterance:
    """The judge's own errors on a recording: what a reconstruction is compared with."""
    return score_asr(utterance, reference, transcribe(wave, sample_rate))


def score_reconstruction(
    utterance: str,
    reference: str,
    original: Float[np.ndarray, " S"],
    reconstruction: Float[np.ndarray, " R"],
    sample_rate: int,
    transcribe: Transcribe,
    embed: Embed | None = None,
) -> Utterance:
    """WER and CER by the judge, STOI, PESQ, mel distance and similarity to the original's voice.

    A reconstruction that is silent, holds NaN or has another length is a failure: it counts as
    deleted words, and has no other score.
    """
    speech.check_wave(original, "original")
    fault = ""
    try:
        if not np.isfinite(reconstruction).all():
            raise ValueError("the reconstruction holds NaN or infinite samples")
        original, reconstruction = speech.trim(original, reconstruction, sample_rate)
    except ValueError as error:
        fault, reconstruction = str(error), np.zeros_like(original)
    nothing = not reconstruction.any()
    values = {"failure": float(nothing)}
    missing: dict[str, str] = {}
    measures: dict[str, Callable[[], float]] = {
        "stoi": lambda: speech.stoi(original, reconstruction, sample_rate),
        "pesq": lambda: speech.pesq_wb(original, reconstruction, sample_rate),
        "mel_distance": lambda: speech.mel_distance(original, reconstruction, sample_rate),
    }
    if embed is not None:
        measures["similarity"] = lambda: speaker.similarity(
            embed(original, sample_rate), embed(reconstruction, sample_rate)
        )
    if nothing:
        missing = dict.fromkeys(measures, fault or "the reconstruction is silent")
    else:
        _measure(measures, values, missing)
    heard = score_asr(
        utterance, reference, "" if nothing else transcribe(reconstruction, sample_rate)
    )
    return Utterance(
        id=utterance,
        values=values,
        words=heard.words,
        characters=heard.characters,
        transcript=heard.transcript,
        missing=missing,
    )


def score_tts(
    utterance: str,
    target: str,
    wave: Float[np.ndarray, " S"],
    sample_rate: int,
    transcribe: Transcribe,
    embed: Embed | None = None,
    prompt: tuple[Float[np.ndarray, " P"], int] | None = None,
    failure: str | None = None,
) -> Utterance:
    """WER and CER by the judge, similarity to the prompt's voice, and whether synthesis failed.

    `prompt` is a wave with its sample rate; `failure` is what the synthesiser itself reported.
    A wave with NaN or infinite samples counts as silence.
    """
    nothing = not (wave.any() and np.isfinite(wave).all())
    values = {"failure": float(failure is not None or nothing)}
    values["seconds"] = wave.size / sample_rate
    missing: dict[str, str] = {}
    if nothing:
        missing["similarity"] = "nothing was spoken"
    elif embed is not None and prompt is not None:
        measures = {
            "similarity": lambda: speaker.similarity(embed(*prompt), embed(wave, sample_rate))
        }
        _measure(measures, values, missing)
    heard = score_asr(utterance, target, "" if nothing else transcribe(wave, sample_rate))
    return Utterance(
        id=utterance,
        values=values,
        words=heard.words,
        characters=heard.characters,
        transcript=heard.transcript,
        missing=missing,
    )


def _measure(
    measures: Mapping[str, Callable[[], float]], values: dict[str, float], missing: dict[str, str]
) -> None:
    for metric, measure in measures.items():
        try:
            values[metric] = measure()
        except ValueError as error:
            missing[metric] = str(error)


def rows_of(
    list_name: str,
    utterances: Sequence[Utterance],
    provenance: Provenance,
    constants: Mapping[str, float] | None = None,
    prefix: str = "",
) -> list[Row]:
    """Rows of every utterance, then of the list: rates of summed counts, means of the others.

    `constants` are numbers of the system that no utterance changes, such as its bitrate. `prefix`
    stands before the word metrics: ASR_PREFIX where the system itself transcribed.
    """
    if not utterances:
        raise ValueError(f"the list {list_name} holds no utterance to score")
    rows: list[Row] = []

    def add(one: Utterance | None, metric: str, value: float, n: int) -> None:
        origin = provenance
        if one is not None and one.seed is not None:
            origin = replace(provenance, seed=one.seed)
        rows.append(_row(list_name, one and one.id, metric, value, n, origin))

    for one in utterances:
        for metric, value in one.values.items():
            add(one, metric, value, 1)
        _add_errors(lambda m, v, n, one=one: add(one, prefix + m, v, n), one.words, one.characters)
    for metric in dict.fromkeys(metric for one in utterances for metric in one.values):
        values = [one.values[metric] for one in utterances if metric in one.values]
        add(None, metric, float(np.mean(values)), len(values))
    words = [one.words for one in utterances if one.words is not None]
    characters = [one.characters for one in utterances if one.characters is not None]
    if words and characters:
        _add_errors(
            lambda metric, value, _: add(None, prefix + metric, value, len(words)),
            sum(words, text.WordErrors()),
            sum(characters, text.ErrorCounts()),
        )
    for metric, value in (constants or {}).items():
        add(None, metric, value, len(utterances))
    return rows


def _add_errors(
    add: Callable[[str, float, int], None],
    words: text.WordErrors | None,
    characters: text.ErrorCounts | None,
) -> None:
    if words is not None:
        for metric in ("wer", "wil", "mer"):
            add(metric, getattr(words, metric), words.num_words)
    if characters is not None:
        add("cer", characters.rate, characters.num_reference)


def _row(
    list_name: str, utterance: str | None, metric: str, value: float, n: int, origin: Provenance
) -> Row:
    assert np.isfinite(value), metric
    return Row(
        system=origin.system,
        list=list_name,
        utterance=utterance,
        metric=metric,
        value=value,
        n=n,
        seed=origin.seed,
        git=origin.git,
        config=origin.config,
        model=origin.model,
        library=library_of(metric, origin),
        machine=machine(),
    )


def library_of(metric: str, origin: Provenance) -> str:
    """The libraries behind a metric with their versions, and the model that judged."""
    if metric.removeprefix(ASR_PREFIX) in WORD_METRICS and metric not in WORD_METRICS:
        names, extra = text.LIBRARIES, ""
    elif metric in (*WORD_METRICS, "wrong", "fault"):
        names = text.LIBRARIES + (transcribe.LIBRARIES if origin.judge else ())
        extra = origin.judge
    elif metric.startswith("similarity"):
        names, extra = speaker.LIBRARIES, origin.speaker
    else:
        names, extra = speech.LIBRARIES.get(metric, ("numpy",)), ""
    return ", ".join(_versions(names) + [extra] * bool(extra))


def all_libraries() -> str:
    """Every library that scores, with its version."""
    names = {*text.LIBRARIES, *transcribe.LIBRARIES, *speaker.LIBRARIES, "numpy"}
    return ", ".join(_versions(sorted(names.union(*speech.LIBRARIES.values()))))


def _versions(names: Iterable[str]) -> list[str]:
    return [f"{name} {importlib.metadata.version(name)}" for name in names]


def digest_of(path: str | Path) -> str:
    """The first 16 hex digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@cache
def machine() -> str:
    """Processor architecture, cores, and the GPU if there is one."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}"


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Appends lines in one write and syncs; a tail that a kill has torn is cut off first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        whole = _whole_size(file.read())
        file.truncate(whole)
        file.write("".join(line + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str | Path) -> list[str]:
    """The whole lines of a file that `append_lines` writes; none where there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    stored = path.read_bytes()
    return stored[: _whole_size(stored)].decode().splitlines()


def _whole_size(stored: bytes) -> int:
    return stored.rfind(b"\n") + 1


def append_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Adds rows to a rows.jsonl."""
    append_lines(path, [json.dumps(asdict(row), ensure_ascii=False) for row in rows])


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a rows.jsonl; ValueError names a line that is none."""
    known = {entry.name for entry in fields(Row)}
    rows: list[Row] = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            stored: dict[str, Any] = json.loads(line)
            rows.append(Row(**{name: stored[name] for name in known}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no row of scores: {error!r}") from error
    return rows


def table(rows: Iterable[Row], metrics: Sequence[str] | None = None) -> str:
    """A Markdown table of list-level rows: a line per system and list, a column per metric.

    ValueError where a column would set side by side what other libraries or judges scored.
    """
    whole = [row for row in rows if row.utterance is None]
    columns = metrics or list(dict.fromkeys(row.metric for row in whole))
    for column in columns:
        scored_by = sorted({row.library for row in whole if row.metric == column})
        if len(scored_by) > 1:
            raise ValueError(
                f"{column} was scored in {len(scored_by)} ways ({'; '.join(scored_by)}): "
                "score again what is to be compared"
            )
    lines = [
        "| system | list | n | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for system, name in dict.fromkeys((row.system, row.list) for row in whole):
        own = {row.metric: row for row in whole if (row.system, row.list) == (system, name)}
        cells = [f"{own[c].value:.3f}" if c in own else "" for c in columns]
        n = max(row.n for row in own.values())
        cells = [
            cell if c not in own or own[c].n == n else f"{cell} (n={own[c].n})"
            for c, cell in zip(columns, cells, strict=True)
        ]
        lines.append(f"| {system} | {name} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
