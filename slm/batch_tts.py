"""A list of texts to speak, which goes on where it stopped: `slm tts --list`."""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from codec.io import atomic_file, sha256_of
from slm.generation.long_form import LongText
from slm.generation.tts import Speech
from slm.voice import Voice

logger = logging.getLogger("slm")

RESULTS = "results.jsonl"


def read_list(path: Path) -> list[tuple[int, Any]]:
    """Numbered lines of a list as JSON, None where they are none; whether they say enough is
    checked later."""
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


def _check_entry(entry: Any, seen: set[str]) -> dict[str, str]:
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


def speak_list(
    voice: Voice,
    entries: list[tuple[int, Any]],
    listed: Path,
    out: Path,
    *,
    seed: int,
    batch: int,
) -> None:
    """Speaks the lines of `listed` into `out`. A list costs only its bad lines, and what an earlier
    start has made is not made again.

    A line that is whole but was refused is in results.jsonl as well, without a wave.
    """
    results, folder = out / RESULTS, listed.parent
    settings = [voice.digest, seed, repr(voice.sampling)]
    done = _made(results, out)
    made: set[str] = set()
    waiting: list[tuple[dict[str, str], LongText]] = []
    skipped: list[str] = []
    seen: set[str] = set()
    pace = Pace()
    # Half of a character, which JSON may have, is its escape again.
    with open(results, "a", encoding="utf-8", errors="backslashreplace") as file:
        for number, entry in tqdm(entries, desc="tts", unit="line"):
            known: dict[str, str] = {}
            try:
                known = _check_entry(entry, seen)
                known["request"] = _request(voice, known, folder, settings)
                if done.get(known["id"]) == known["request"]:
                    made.add(known["id"])
                    continue
                waiting.append((known, prepare(voice, known, folder, seed)))
            except (ValueError, OSError) as error:
                skipped.append(f"line {number}: {error}")
                if known:
                    _write(file, _refused(known, error, seed))
                continue
            if sum(len(passage.utterances) for _, passage in waiting) >= batch:
                _speak(voice, waiting, out, file, batch, pace)
                waiting = []
        if waiting:
            _speak(voice, waiting, out, file, batch, pace)
    _keep_newest(results)
    for reason in skipped:
        logger.warning("skipped %s", reason)
    logger.info(
        "%d lines: %d skipped, %d were there already; %s",
        len(entries), len(skipped), len(made), pace,
    )  # fmt: skip
    if entries and len(skipped) == len(entries):
        raise ValueError(f"{listed}: no line could be used")


def prepare(voice: Voice, entry: Mapping[str, str], folder: Path, seed: int) -> LongText:
    """Reads and checks a line. A prompt's path counts from the current folder, then the list's."""
    for key in ("text", "prompt_text"):
        try:
            entry.get(key, "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{key} is no text: {entry[key]!r} has half a character") from error
    text = voice.normalize(entry["text"])
    where = prompt_of(voice, entry["prompt"], folder)
    return voice.prepare_long(text, voice.prompt(where, entry.get("prompt_text")), seed)


def _recording(name: str, folder: Path) -> Path:
    return next((p for p in (Path(name), folder / name) if p.exists()), Path(name))


def prompt_of(voice: Voice, name: str, folder: Path) -> Path | str:
    """A shipped prompt's name, or where a recording is."""
    found = name if name in voice.prompts else _recording(name, folder)
    if isinstance(found, Path) and voice.prompts and not found.exists():
        known = ", ".join(sorted(voice.prompts))
        raise ValueError(f"{name}: no such recording, nor a prompt of this voice ({known})")
    return found


class Pace:
    """Speaks, and tells how much speech was made in how long."""

    def __init__(self) -> None:
        self._speech = self._taken = 0.0

    def say(self, voice: Voice, passages: list[LongText], batch: int) -> list[Speech]:
        """Voice.say, timed."""
        started = time.monotonic()
        speeches = voice.synthesize(passages, batch)
        self._taken += time.monotonic() - started
        self._speech += sum(len(each.wave) for each in speeches) / voice.codec.sample_rate
        return speeches

    def __str__(self) -> str:
        times = self._speech / self._taken
        if not self._taken:
            return "nothing was spoken"
        return f"{self._speech:.1f} s of speech in {self._taken:.1f} s: {times:.2f} times real time"


def _speak(
    voice: Voice, waiting: list[tuple[dict[str, str], LongText]], out: Path, file: Any,
    batch: int, pace: Pace,
) -> None:  # fmt: skip
    speeches = pace.say(voice, [passage for _, passage in waiting], batch)
    for (entry, _), speech in zip(waiting, speeches, strict=True):
        name = f"{entry['id']}.wav"
        voice.save(speech, out / name)
        record = {"id": entry["id"], **result(name, entry["prompt"], speech)}
        _write(file, {**record, "request": entry["request"]})


def _write(file: Any, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def _refused(entry: Mapping[str, str], error: Exception, seed: int) -> dict[str, Any]:
    """A line that was not spoken: whoever scores the list must know of it."""
    return {
        "id": entry["id"],
        "audio": None,
        "text": entry["text"],
        "prompt": entry["prompt"],
        "prompt_text": entry.get("prompt_text", ""),
        "failure": "refused",
        "reason": str(error),
        "tries": 0,
        "seed": seed,
    }


def _keep_newest(results: Path) -> None:
    """Leaves one line of each id."""
    lines = results.read_text(encoding="utf-8").splitlines()
    _replace(results, {json.loads(line)["id"]: line for line in lines}.values())


def _replace(results: Path, lines: Iterable[str]) -> None:
    with atomic_file(results) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def result(audio: str, prompt: str, speech: Speech) -> dict[str, Any]:
    """What is told of a speech, as results.jsonl and standard output have it."""
    if speech.failure is not None:
        logger.warning("%s: %s after %d tries", audio, speech.failure, speech.tries)
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


def _request(voice: "Voice", entry: Mapping[str, str], folder: Path, settings: list[Any]) -> str:
    """16 hex digits over all that decides what a line becomes; another id counts as well."""
    name = entry["prompt"]
    if name in voice.prompts:
        prompt = [voice.prompts[name].codes.tolist(), voice.prompts[name].text]
    else:
        found = _recording(name, folder).stat()
        prompt = [found.st_size, found.st_mtime_ns]
    whole = json.dumps([dict(entry), prompt, settings], sort_keys=True)
    return sha256_of(whole, 16)


def _made(results: Path, out: Path) -> dict[str, str | None]:
    """What is there, as requests by id. Results without a wave, a torn last line and all but the
    newest line of an id are taken out."""
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
