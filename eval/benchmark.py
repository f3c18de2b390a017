"""Scores of utterances, and rows of results with provenance.

`score_*` score one utterance; `rows_of` turns a list's utterances into rows: one per utterance and
metric, and one per metric for the list (`utterance` is None).
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
from jaxtyping import Float

from eval import metrics, quality, speaker, speech, text, transcribe
from eval.metrics import MEASURES

Transcribe = Callable[[Float[np.ndarray, " S"], int], str]
"""A wave (S,) and its sample rate to a transcript."""
Embed = Callable[[Float[np.ndarray, " S"], int], Float[np.ndarray, " E"]]
"""A wave (S,) and its sample rate to a speaker embedding (E,). Raises ValueError for silence."""

PARTS = ("reconstruction", "tokens", "tts", "asr", "vc", "speed", "ratings")
"""What a number is about."""
WORD_METRICS = ("wer", "wil", "mer", "cer")
BASIC_MEASURES = ("stoi", "pesq", "mel_distance")
"""Measures of waves by default."""
ASR_PREFIX = "asr_"
"""Prefix of the word metrics of a system's own transcripts, as opposed to a judge's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A number with its provenance."""

    part: str = ""
    """One of PARTS; "": written before there were parts."""
    system: str
    list: str
    """Name of the list, or NAME/COLUMN=VALUE for the utterances of a group."""
    utterance: str | None
    """None: a number of the list."""
    metric: str
    value: float
    n: int
    """Number of utterances of a list; of an utterance 1, or its number of words (characters)."""
    seed: int
    git: str
    config: str
    """Digest of the configuration; "": none."""
    model: str
    """Digest of the scored model's weights; "": recordings."""
    library: str
    machine: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Origin of the rows of a run: system, seed, digests and scoring models."""

    part: str = ""
    system: str
    seed: int = 0
    git: str = ""
    config: str = ""
    model: str = ""
    judge: str = ""
    """Name and digest of the ASR behind the word metrics."""
    speaker: str = ""
    """Name and digest of the speaker encoder."""
    language: str = "en"
    """Of the texts: it selects their normalizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredUtterance:
    """The scores of one utterance."""

    id: str
    values: Mapping[str, float] = field(default_factory=dict)
    """Metrics that are averaged over a list."""
    words: text.WordErrors | None = None
    characters: text.ErrorCounts | None = None
    transcript: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Metrics that are not defined for this utterance, with the reason."""
    seed: int | None = None
    """Seed of its generation; None: the list's."""
    text: str = ""
    """Reference text."""
    audio: str | None = None
    """Path of the scored wave, absolute or relative to the folder of the scores; None: there is
    none."""
    failure: str | None = None
    """Why the system has failed, if it has."""

    def to_record(self) -> dict[str, Any]:
        """Returns the scores as plain values of JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "ScoredUtterance":
        """Returns the scores of `to_record`."""
        stored = dict(record)
        for name, counts in (("words", text.WordErrors), ("characters", text.ErrorCounts)):
            stored[name] = None if stored[name] is None else counts(**stored[name])
        return cls(**stored)


def score_asr(
    utterance: str, reference: str, hypothesis: str, language: str = "en"
) -> ScoredUtterance:
    """Returns the word and character errors of a transcript."""
    return ScoredUtterance(
        id=utterance,
        words=text.word_errors(reference, hypothesis, language),
        characters=text.character_errors(reference, hypothesis, language),
        transcript=hypothesis,
        text=reference,
    )


def score_reconstruction(
    utterance: str,
    reference: str,
    original: Float[np.ndarray, " S"],
    reconstruction: Float[np.ndarray, " R"],
    sample_rate: int,
    transcribe: Transcribe | None,
    embed: Embed | None = None,
    language: str = "en",
    measures: Sequence[str] = BASIC_MEASURES,
) -> ScoredUtterance:
    """Returns WER, CER, speaker similarity and other measures of a reconstruction.

    A reconstruction that is silent, holds NaN or differs in length is a failure: all its words are
    deletions, and it has no other score.

    Args:
        reference: the transcript.
        transcribe: None: no words are scored.
        measures: names in `eval.metrics.PAIRED` and `UNPAIRED`.

    Raises:
        ValueError: the original is silent, empty or not finite.
    """
    speech.check_scorable(original, "original")
    reason = "the reconstruction is silent"
    try:
        if not np.isfinite(reconstruction).all():
            raise ValueError("the reconstruction holds NaN or infinite samples")
        original, reconstruction = speech.trim(original, reconstruction, sample_rate)
    except ValueError as error:
        reason, reconstruction = str(error), np.zeros_like(original)
    failed = not reconstruction.any()
    functions: dict[str, Callable[[], float]] = {}
    for name in measures:
        if name in metrics.PAIRED:
            functions[name] = partial(metrics.PAIRED[name], original, reconstruction, sample_rate)
        else:
            functions[name] = partial(metrics.UNPAIRED[name], reconstruction, sample_rate)
    if embed is not None:
        functions["similarity"] = lambda: speaker.similarity(
            embed(original, sample_rate), embed(reconstruction, sample_rate)
        )
    values = {"failure": float(failed)}
    missing = dict.fromkeys(functions, reason) if failed else _measure(functions, values)
    scored = _score_words(utterance, reference, transcribe, reconstruction, sample_rate, language)
    return replace(scored, values=values, missing=missing, failure=reason if failed else None)


def score_tts(
    utterance: str,
    target: str,
    wave: Float[np.ndarray, " S"],
    sample_rate: int,
    transcribe: Transcribe | None,
    embed: Embed | None = None,
    prompt: tuple[Float[np.ndarray, " P"], int] | None = None,
    failure: str | None = None,
    language: str = "en",
    measures: Sequence[str] = (),
) -> ScoredUtterance:
    """Returns WER, CER, similarity to the prompt's speaker, length in seconds, failure and other
    measures of synthesized speech.

    A wave that is silent or not finite is a failure, whose words are all deletions.

    Args:
        target: the text that was synthesized.
        transcribe: None: no words are scored.
        prompt: a wave and its sample rate.
        failure: what the synthesizer reports, if it failed.
        measures: names in `eval.metrics.UNPAIRED`, and `speaking_rate`.
    """
    silent = not (wave.any() and np.isfinite(wave).all())
    values = {"failure": float(failure is not None or silent), "seconds": wave.size / sample_rate}
    wave = np.zeros_like(wave) if silent else wave
    scored = _score_words(utterance, target, transcribe, wave, sample_rate, language)
    functions: dict[str, Callable[[], float]] = {
        name: partial(metrics.UNPAIRED[name], wave, sample_rate)
        for name in measures
        if name != "speaking_rate"
    }
    if "speaking_rate" in measures and scored.words is not None:
        num_words = scored.words.num_words
        functions["speaking_rate"] = lambda: quality.speaking_rate(num_words, wave, sample_rate)
    if embed is not None and prompt is not None:
        functions["similarity"] = lambda: speaker.similarity(
            embed(*prompt), embed(wave, sample_rate)
        )
    reason = "the wave is silent"
    missing = dict.fromkeys(functions, reason) if silent else _measure(functions, values)
    failure = failure or (reason if silent else None)
    return replace(scored, values=values, missing=missing, failure=failure)


def _score_words(
    utterance: str, reference: str, transcribe: Transcribe | None, wave: Float[np.ndarray, " S"],
    sample_rate: int, language: str,
) -> ScoredUtterance:  # fmt: skip
    """The word and character errors of a judge's transcript; silence has no words."""
    if transcribe is None:
        return ScoredUtterance(id=utterance, text=reference)
    hypothesis = transcribe(wave, sample_rate) if wave.any() else ""
    return score_asr(utterance, reference, hypothesis, language)


def _measure(
    measures: Mapping[str, Callable[[], float]], values: dict[str, float]
) -> dict[str, str]:
    """Adds the defined measures to `values`; returns the reasons why the others are undefined."""
    missing = {}
    for metric, measure in measures.items():
        try:
            values[metric] = measure()
        except ValueError as error:
            missing[metric] = str(error)
    return missing


def rows_of(
    list_name: str,
    utterances: Sequence[ScoredUtterance],
    provenance: Provenance,
    constants: Mapping[str, float] | None = None,
    prefix: str = "",
) -> list[Row]:
    """Returns rows of every utterance, then of the list: rates of summed counts, means of the
    other metrics.

    Args:
        constants: numbers of the system itself, such as its bitrate.
        prefix: of the word metrics; ASR_PREFIX if the system itself transcribed.

    Raises:
        ValueError: there is no utterance.
    """
    if not utterances:
        raise ValueError(f"the list {list_name} holds no utterance to score")
    rows: list[Row] = []

    def add(one: ScoredUtterance | None, metric: str, value: float, n: int) -> None:
        assert np.isfinite(value), metric
        seed = provenance.seed if one is None or one.seed is None else one.seed
        rows.append(
            Row(
                part=provenance.part, system=provenance.system, list=list_name,
                utterance=one and one.id, metric=metric, value=value, n=n, seed=seed,
                git=provenance.git, config=provenance.config,
                model=provenance.model, library=library_of(metric, provenance), machine=machine(),
            )
        )  # fmt: skip

    def add_errors(
        one: ScoredUtterance | None,
        words: text.WordErrors | None,
        characters: text.ErrorCounts | None,
        n: int | None = None,
    ) -> None:
        if words is not None:
            for metric in ("wer", "wil", "mer"):
                add(one, prefix + metric, getattr(words, metric), n or words.num_words)
        if characters is not None:
            add(one, f"{prefix}cer", characters.rate, n or characters.num_reference)

    for one in utterances:
        for metric, value in one.values.items():
            add(one, metric, value, 1)
        add_errors(one, one.words, one.characters)
    for metric in dict.fromkeys(metric for one in utterances for metric in one.values):
        values = [one.values[metric] for one in utterances if metric in one.values]
        add(None, metric, float(np.mean(values)), len(values))
    words = [one.words for one in utterances if one.words is not None]
    characters = [one.characters for one in utterances if one.characters is not None]
    if words and characters:
        sums = sum(words, text.WordErrors()), sum(characters, text.ErrorCounts())
        add_errors(None, *sums, len(words))
    for metric, value in (constants or {}).items():
        add(None, metric, value, len(utterances))
    return rows


def library_of(metric: str, origin: Provenance) -> str:
    """Returns the libraries behind a metric with their versions, and the model that scored."""
    if metric.removeprefix(ASR_PREFIX) in WORD_METRICS and metric not in WORD_METRICS:
        names, extra = text.text_libraries(origin.language), ""
    elif metric in (*WORD_METRICS, "wrong", "fault"):
        names = text.text_libraries(origin.language) + transcribe.judge_libraries(origin.judge)
        extra = origin.judge
    elif metric.startswith("similarity"):
        names, extra = speaker.speaker_libraries(origin.speaker), origin.speaker
    else:
        measure = MEASURES.get(metric)
        names, extra = (measure.libraries, measure.setting) if measure else (("numpy",), "")
    return ", ".join(_versions(names) + [extra] * bool(extra))


def all_libraries() -> str:
    """Returns all libraries that score, with their versions."""
    names = {*text.ALL_LIBRARIES, *transcribe.LIBRARIES, *speaker.LIBRARIES, "numpy"}
    names |= {*transcribe.TRANSFORMERS_LIBRARIES, *speaker.ONNX_LIBRARIES}
    return ", ".join(_versions(sorted(names.union(*(one.libraries for one in MEASURES.values())))))


def _versions(names: Iterable[str]) -> list[str]:
    return [f"{name} {_version(name)}" for name in names]


# Each call reads and parses a file, and every row names its libraries.
_version = cache(importlib.metadata.version)


@cache
def machine() -> str:
    """Returns the processor architecture, number of cores, and GPU."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}"


def table(rows: Iterable[Row], metrics: Sequence[str] | None = None) -> str:
    """Returns a Markdown table of list-level rows: a line per system and list, a column per metric.

    Raises:
        ValueError: a column has scores of different libraries, versions or judges.
    """
    of_lists = [row for row in rows if row.utterance is None]
    columns = metrics or list(dict.fromkeys(row.metric for row in of_lists))
    for column in columns:
        scored_by = sorted({row.library for row in of_lists if row.metric == column})
        if len(scored_by) > 1:
            raise ValueError(
                f"{column} was scored in {len(scored_by)} ways ({'; '.join(scored_by)}): "
                "score all systems with the same one"
            )
    lines = [
        "| system | list | n | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for system, name in dict.fromkeys((row.system, row.list) for row in of_lists):
        own = {row.metric: row for row in of_lists if (row.system, row.list) == (system, name)}
        cells = [f"{own[c].value:.3f}" if c in own else "" for c in columns]
        n = max(row.n for row in own.values())
        cells = [
            cell if c not in own or own[c].n == n else f"{cell} (n={own[c].n})"
            for c, cell in zip(columns, cells, strict=True)
        ]
        lines.append(f"| {system} | {name} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
