"""TTS of a list of texts, resumable: `slm tts --list`."""

import difflib
import errno
import json
import logging
import os
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from codec.io import check_id, path_of_id, sha256_of
from codec.json_lines import (
    JsonLine,
    append_json_lines,
    read_appended,
    scan_json_lines,
    write_json_lines,
)
from codec.program import counted, did_you_mean
from slm.export.voice_folder import VoiceSummary
from slm.generation.long_form import LongText
from slm.generation.tts import Speech
from slm.models.ar import check_task
from slm.voice import Voice

logger = logging.getLogger("slm")

RESULTS = "results.jsonl"
REFUSED = "refused"
"""The failure of a line that is skipped."""

LINE_KEYS = ("id", "text", "prompt", "prompt_text")
Line = dict[str, str]
"""id, text, prompt and perhaps prompt_text."""
NAME_ERRORS = (errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
"""Errors of a file's name, as opposed to the disk's."""


class ListEntry(NamedTuple):
    """A line of a list, as checked without the models."""

    number: int
    """Number of the line in the file."""
    line: Line
    """Its fields; empty if they are of the wrong form."""
    error: str | None
    """Why it is skipped; None: it passes."""


class Waiting(NamedTuple):
    """A line to generate in the next batch."""

    number: int
    line: Line
    request: str
    """See `_request`."""
    text: LongText


def read_tts_list(path: Path) -> list[JsonLine]:
    """The lines of a JSON Lines file, also those that cannot be used.

    Raises:
        ValueError: no such file, or one that is not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such list")
    return list(scan_json_lines(path))


def check_list(entries: Sequence[JsonLine], summary: VoiceSummary, listed: Path) -> list[ListEntry]:
    """Checks the lines of the file `listed` without the models: fields, texts and prompts. Warns of
    keys that are not used.

    Raises:
        ValueError: no line is usable.
    """
    checked: list[ListEntry] = []
    seen: dict[str, str] = {}
    unused: dict[str, int] = {}
    for number, entry, unusable in entries:
        line: Line = {}
        error = None
        try:
            if entry is None and unusable is not None:
                raise ValueError(unusable)
            line = _line_of(entry, seen)
            check_line(line, summary, listed.parent)
            for key in set(entry or ()) - set(LINE_KEYS):
                unused.setdefault(key, number)
        except (ValueError, OSError) as found:
            error = str(found)
        checked.append(ListEntry(number, line, error))
    for key, number in sorted(unused.items(), key=lambda each: (each[1], each[0])):
        logger.warning("%s, line %d: the key %s is not used", listed, number, key)
    if checked and all(each.error is not None for each in checked):
        number, _, error = checked[0]
        raise ValueError(f"{listed}: no line is usable; line {number}: {error}")
    return checked


def check_line(
    line: Line,
    summary: VoiceSummary,
    folder: Path,
    names: tuple[str, str] = ("text", "prompt_text"),
) -> None:
    """Raises ValueError for a text or prompt that the voice cannot use.

    Args:
        folder: a prompt's path is relative to the current folder, or to this one.
        names: of the text and of the prompt's text, for messages.
    """
    prompt_text = line.get("prompt_text")
    summary.coverage.check(line["text"], names[0])
    if prompt_text is not None:
        summary.coverage.check(prompt_text, names[1])
    prompt = prompt_source(summary.prompts, line["prompt"], folder)
    if isinstance(prompt, Path) and prompt_text is None:
        try:
            check_task(summary.tasks, "asr")
        except ValueError as error:
            raise ValueError(f"{error}; give {names[1]}") from None


def _line_of(entry: Any, seen: dict[str, str]) -> Line:
    """The known fields of a line. Raises ValueError for a missing field, one of another type or a
    misspelled one, and for an id whose file is in `seen`, to which its own is added."""
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    for key in entry.keys() - set(LINE_KEYS):
        if difflib.get_close_matches(key, set(LINE_KEYS) - entry.keys(), cutoff=0.8):
            raise ValueError(f"{key}: no such key{did_you_mean(key, LINE_KEYS)}")
    for key in ("id", "text", "prompt"):
        if entry.get(key) in (None, ""):
            raise ValueError(f"{key} is missing")
        if not isinstance(entry[key], str):
            raise ValueError(f"{key} must be a string, got {json.dumps(entry[key])}")
    if not isinstance(entry.get("prompt_text"), str | None):
        raise ValueError(f"prompt_text is not a text: {entry['prompt_text']!r}")
    known = {key: entry[key] for key in LINE_KEYS if entry.get(key)}
    name = known["id"]
    check_id(name, ".wav")
    # macOS and Windows do not distinguish case, nor macOS forms of Unicode.
    file = unicodedata.normalize("NFC", str(Path(name))).casefold()
    if seen.get(file) == name:
        raise ValueError(f"the id {name!r} comes twice")
    if file in seen:
        raise ValueError(f"the id {name!r} and {seen[file]!r} are one file on some file systems")
    seen[file] = name
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
) -> int:
    """Generates the lines of the file `listed` into `out`: ID.wav of each line, and results.jsonl.
    Returns the number of lines that failed a check, now or in an earlier run, or were skipped.

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
    waiting: list[Waiting] = []
    skipped: list[str] = []
    throughput, num_done = Throughput(), 0

    def refuse(number: int, line: Line, error: Exception) -> None:
        skipped.append(f"line {number}: {error}")
        if line:
            append_json_lines(results, [_refused(line, error, seed)])

    def generate() -> None:
        speeches = throughput.synthesize(voice, [each.text for each in waiting], batch)
        for (number, line, request, _), speech in zip(waiting, speeches, strict=True):
            name = f"{line['id']}.wav"
            try:
                voice.save(speech, out / name)
            except (ValueError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in NAME_ERRORS:
                    raise
                refuse(number, line, error)
                continue
            record = {"id": line["id"], **result(name, line["prompt"], speech)}
            append_json_lines(results, [{**record, "request": request}])
        waiting.clear()

    append_json_lines(results, [])
    with tqdm(entries, desc="tts", unit="line") as progress:
        for number, line, error in progress:
            try:
                if error is not None:
                    raise ValueError(error)
                path_of_id(out, line["id"], ".wav")
                request = _request(voice, line, folder, settings)
                if done.get(line["id"]) == request:
                    num_done += 1
                    continue
                text = prepare_line(voice, line, folder, seed)
                waiting.append(Waiting(number, line, request, text))
            except (ValueError, OSError) as refusal:
                refuse(number, line, refusal)
                continue
            if sum(len(each.text.utterances) for each in waiting) >= batch:
                generate()
        if waiting:
            generate()
    records = _keep_newest(results)
    for reason in skipped:
        logger.warning("skipped %s", reason)
    logger.info(
        "%s: %d skipped, %d done before; %s",
        counted(len(entries), "line"), len(skipped), num_done, throughput,
    )  # fmt: skip
    if entries and len(skipped) == len(entries):
        raise ValueError(f"{listed}: no line is usable")
    names = {each.line.get("id") for each in entries}
    listed_records = [record for record in records if record["id"] in names]
    return len(skipped) + sum(one["failure"] not in (None, REFUSED) for one in listed_records)


def prepare_line(voice: Voice, line: Mapping[str, str], folder: Path, seed: int) -> LongText:
    """Checks and encodes a line; a prompt's path is relative to the current folder, or `folder`.

    Raises:
        ValueError: a text, prompt or prompt text that the voice cannot use.
    """
    text = voice.normalize(line["text"])
    prompt = prompt_source(voice.prompts, line["prompt"], folder)
    return voice.prepare_long(text, voice.prompt(prompt, line.get("prompt_text")), seed)


def _recording(name: str, folder: Path) -> Path:
    # Path.exists raises an error for a name that is too long.
    return next((p for p in (Path(name), folder / name) if os.path.exists(p)), Path(name))


def prompt_source(prompts: Iterable[str], name: str, folder: Path) -> Path | str:
    """The name of a shipped prompt, or the path of a recording.

    Raises:
        ValueError: neither.
    """
    names = sorted(prompts)
    if name in names:
        return name
    found = _recording(name, folder)
    if not os.path.exists(found):
        known = f" ({', '.join(names)})" if names else ", which has none"
        shown = name if len(name) < 200 else f"{name[:200]}..."
        raise ValueError(f"{shown}: no such recording, nor a prompt of this voice{known}")
    return found


def _refused(line: Line, error: Exception, seed: int) -> dict[str, Any]:
    """The record of a bad line; half of a surrogate pair becomes a question mark."""
    known = {key: text.encode("utf-8", "replace").decode() for key, text in line.items()}
    return {
        "id": known["id"],
        "audio": None,
        "text": known["text"],
        "prompt": known["prompt"],
        "prompt_text": known.get("prompt_text", ""),
        "failure": REFUSED,
        "reason": str(error),
        "tries": 0,
        "seed": seed,
    }


def _keep_newest(results: Path) -> list[dict[str, Any]]:
    """Keeps the last record of each id, and returns them."""
    records = {line.value["id"]: line.value for line in read_appended(results)}
    write_json_lines(results, records.values())
    return list(records.values())


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
    kept: dict[str, dict[str, Any]] = {}
    for line in scan_json_lines(results):
        try:
            if line.error is None and (out / line.value["audio"]).is_file():
                kept[line.value["id"]] = line.value
        except (AttributeError, KeyError, TypeError, ValueError, OSError):
            continue
    write_json_lines(results, kept.values())
    return {name: record.get("request") for name, record in kept.items()}
