"""TTS of a list of texts, resumable: `slm tts --list`."""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from codec.io import atomic_file, sha256_of
from codec.program import counted
from slm.export.voice_folder import VoiceSummary
from slm.generation.long_form import LongText
from slm.generation.tts import Speech
from slm.models.ar import check_task
from slm.voice import Voice

logger = logging.getLogger("slm")

RESULTS = "results.jsonl"

Line = dict[str, str]
"""id, text, prompt and perhaps prompt_text."""


class ListEntry(NamedTuple):
    """A line of a list, as checked without the models."""

    number: int
    """Number of the line in the file."""
    line: Line
    """Its fields; empty if they are of the wrong form."""
    error: str | None
    """Why it is skipped; None: it passes."""


def read_tts_list(path: Path) -> list[tuple[int, Any]]:
    """The lines of a JSONL file with their numbers; None for a line that is not JSON.

    Raises:
        ValueError: no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such list")
    entries: list[tuple[int, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                entries.append((number, json.loads(line)))
            except ValueError:
                entries.append((number, None))
    return entries


def check_list(
    entries: Sequence[tuple[int, Any]], summary: VoiceSummary, listed: Path
) -> list[ListEntry]:
    """Checks the lines of the file `listed` without the models: fields, texts and prompts.

    Raises:
        ValueError: no line is usable.
    """
    checked: list[ListEntry] = []
    seen: set[str] = set()
    for number, entry in entries:
        line: Line = {}
        error = None
        try:
            line = _line_of(entry, seen)
            _check_line(line, summary, listed.parent)
        except ValueError as found:
            error = str(found)
        checked.append(ListEntry(number, line, error))
    if checked and all(each.error is not None for each in checked):
        number, _, error = checked[0]
        raise ValueError(f"{listed}: no line is usable; line {number}: {error}")
    return checked


def _check_line(line: Line, summary: VoiceSummary, folder: Path) -> None:
    """Raises ValueError for a text or prompt that the voice cannot use."""
    text, prompt_text = line["text"], line.get("prompt_text")
    check_unicode(text=text, prompt_text=prompt_text)
    summary.coverage.check(text, "text")
    if prompt_text is not None:
        summary.coverage.check(prompt_text, "prompt_text")
    prompt = prompt_source(summary.prompts, line["prompt"], folder)
    if isinstance(prompt, Path) and prompt_text is None:
        try:
            check_task(summary.tasks, "asr")
        except ValueError as error:
            raise ValueError(f"{error}; give prompt_text") from None


def _line_of(entry: Any, seen: set[str]) -> Line:
    """The known fields of a line. Raises ValueError for a missing field and one of another type,
    and for an id of `seen`, to which its own is added."""
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    for key in ("id", "text", "prompt"):
        if entry.get(key) in (None, ""):
            raise ValueError(f"{key} is missing")
        if not isinstance(entry[key], str):
            raise ValueError(f"{key} must be a string, got {json.dumps(entry[key])}")
    if not isinstance(entry.get("prompt_text"), str | None):
        raise ValueError(f"prompt_text is not a text: {entry['prompt_text']!r}")
    known = {key: entry[key] for key in ("id", "text", "prompt", "prompt_text") if entry.get(key)}
    if Path(known["id"]).is_absolute() or ".." in Path(known["id"]).parts:
        raise ValueError(f"the id {known['id']!r} leads out of the folder")
    if known["id"] in seen:
        raise ValueError(f"the id {known['id']!r} comes twice")
    seen.add(known["id"])
    return known


@dataclass
class Throughput:
    """How much speech was generated in how much time."""

    speech_seconds: float = 0.0
    elapsed_seconds: float = 0.0

    def synthesize(self, voice: Voice, texts: list[LongText], batch: int) -> list[Speech]:
        """`Voice.synthesize`, timed."""
        started = time.monotonic()
        speeches = voice.synthesize(texts, batch)
        self.elapsed_seconds += time.monotonic() - started
        num_samples = sum(len(speech.wave) for speech in speeches)
        self.speech_seconds += num_samples / voice.codec.sample_rate
        return speeches

    def __str__(self) -> str:
        if not self.elapsed_seconds:
            return "nothing was generated"
        factor = self.speech_seconds / self.elapsed_seconds
        return (
            f"{self.speech_seconds:.1f} s of speech in {self.elapsed_seconds:.1f} s: "
            f"{factor:.2f} times real time"
        )


def synthesize_list(
    voice: Voice,
    entries: Sequence[ListEntry],
    listed: Path,
    out: Path,
    *,
    seed: int,
    batch: int,
) -> None:
    """Generates the lines of the file `listed` into `out`: ID.wav of each line, and results.jsonl.

    Lines that an earlier run has generated with the same settings are skipped; so are bad lines,
    those of `check_list` and those that the models refuse. A bad line with an id is in
    results.jsonl, without audio.

    Raises:
        ValueError: all lines are bad.
    """
    results, folder = out / RESULTS, listed.parent
    settings = [voice.digest, seed, repr(voice.sampling)]
    settings += [voice.lexicon] if voice.lexicon else []
    done = _finished(results, out)
    waiting: list[tuple[Line, LongText]] = []
    skipped: list[str] = []
    throughput, num_done = Throughput(), 0

    def generate(file: IO[str]) -> None:
        speeches = throughput.synthesize(voice, [text for _, text in waiting], batch)
        for (line, _), speech in zip(waiting, speeches, strict=True):
            name = f"{line['id']}.wav"
            voice.save(speech, out / name)
            record = {"id": line["id"], **result(name, line["prompt"], speech)}
            _append(file, {**record, "request": line["request"]})
        waiting.clear()

    # Lone surrogates, which JSON may contain, are written as escapes.
    with (
        open(results, "a", encoding="utf-8", errors="backslashreplace") as file,
        tqdm(entries, desc="tts", unit="line") as progress,
    ):
        for number, line, error in progress:
            try:
                if error is not None:
                    raise ValueError(error)
                request = _request(voice, line, folder, settings)
                if done.get(line["id"]) == request:
                    num_done += 1
                    continue
                text = prepare_line(voice, line, folder, seed)
                waiting.append(({**line, "request": request}, text))
            except (ValueError, OSError) as refusal:
                skipped.append(f"line {number}: {refusal}")
                if line:
                    _append(file, _refused(line, refusal, seed))
                continue
            if sum(len(text.utterances) for _, text in waiting) >= batch:
                generate(file)
        if waiting:
            generate(file)
    _keep_newest(results)
    for reason in skipped:
        logger.warning("skipped %s", reason)
    logger.info(
        "%s: %d skipped, %d done before; %s",
        counted(len(entries), "line"), len(skipped), num_done, throughput,
    )  # fmt: skip
    if entries and len(skipped) == len(entries):
        raise ValueError(f"{listed}: no line is usable")


def check_unicode(**texts: str | None) -> None:
    """Raises ValueError for a text with a lone surrogate."""
    for name, text in texts.items():
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is no text: {text!r} has half a character") from error


def prepare_line(voice: Voice, line: Mapping[str, str], folder: Path, seed: int) -> LongText:
    """Checks and encodes a line; a prompt's path is relative to the current folder, or `folder`.

    Raises:
        ValueError: a text, prompt or prompt text that the voice cannot use.
    """
    check_unicode(text=line["text"], prompt_text=line.get("prompt_text"))
    text = voice.normalize(line["text"])
    prompt = prompt_source(voice.prompts, line["prompt"], folder)
    return voice.prepare_long(text, voice.prompt(prompt, line.get("prompt_text")), seed)


def _recording(name: str, folder: Path) -> Path:
    return next((p for p in (Path(name), folder / name) if p.exists()), Path(name))


def prompt_source(prompts: Iterable[str], name: str, folder: Path) -> Path | str:
    """The name of a shipped prompt, or the path of a recording.

    Raises:
        ValueError: neither.
    """
    names = sorted(prompts)
    if name in names:
        return name
    found = _recording(name, folder)
    if not found.exists():
        known = f" ({', '.join(names)})" if names else ", which has none"
        raise ValueError(f"{name}: no such recording, nor a prompt of this voice{known}")
    return found


def _append(file: IO[str], record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def _refused(line: Line, error: Exception, seed: int) -> dict[str, Any]:
    """The record of a bad line."""
    return {
        "id": line["id"],
        "audio": None,
        "text": line["text"],
        "prompt": line["prompt"],
        "prompt_text": line.get("prompt_text", ""),
        "failure": "refused",
        "reason": str(error),
        "tries": 0,
        "seed": seed,
    }


def _keep_newest(results: Path) -> None:
    """Keeps the last record of each id."""
    lines = results.read_text(encoding="utf-8").splitlines()
    _replace(results, {json.loads(line)["id"]: line for line in lines}.values())


def _replace(results: Path, lines: Iterable[str]) -> None:
    with atomic_file(results) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def result(audio: str, prompt: str, speech: Speech) -> dict[str, Any]:
    """The record of a speech, for results.jsonl and standard output. Logs a failure."""
    if speech.failure is not None:
        logger.warning("%s: %s after %s", audio, speech.failure, counted(speech.tries, "attempt"))
    return {
        "audio": audio,
        "text": speech.text,
        "prompt": prompt,
        "prompt_text": speech.prompt_text,
        "failure": speech.failure,
        "tries": speech.tries,
        "seed": speech.seed,
        "score": speech.score,
    }


def _request(voice: Voice, line: Line, folder: Path, settings: list[Any]) -> str:
    """16 hex digits over everything that a line's speech depends on."""
    source = prompt_source(voice.prompts, line["prompt"], folder)
    if isinstance(source, str):
        prompt = [voice.prompts[source].codes.tolist(), voice.prompts[source].text]
    else:
        found = source.stat()
        prompt = [found.st_size, found.st_mtime_ns]
    return sha256_of(json.dumps([dict(line), prompt, settings], sort_keys=True), 16)


def _finished(results: Path, out: Path) -> dict[str, str | None]:
    """Requests of finished lines, by id. Removes records without audio, a truncated last line, and
    all but the last record of an id from the file."""
    if not results.exists():
        return {}
    kept: dict[str, tuple[str, str | None]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            if (out / record["audio"]).is_file():
                kept[record["id"]] = line, record.get("request")
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    _replace(results, (line for line, _ in kept.values()))
    return {name: request for name, (_, request) in kept.items()}
