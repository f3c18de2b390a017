"""Voice conversion of a list of recordings, resumable: `slm vc --list`."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from codec.io import path_of_id, sha256_of
from codec.json_lines import append_json_lines, read_appended, read_json_lines, write_json_lines
from codec.program import counted
from slm.batch_tts import REFUSED, RESULTS, prompt_source
from slm.voice import Voice

logger = logging.getLogger("slm")

KEYS = ("id", "source", "target", "source_text", "target_text")


def read_vc_list(path: Path) -> list[dict[str, str]]:
    """Returns the lines of a list: id, source, target and perhaps source_text and target_text.

    Raises:
        ValueError: no such list, an empty one, a line that lacks a key or has one of another type,
            or an id that comes twice.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such list")
    lines: list[dict[str, str]] = []
    seen: set[str] = set()
    for number, entry, _ in read_json_lines(path):
        where = f"{path}, line {number}"
        for key in KEYS[:3]:
            if not isinstance(entry, dict) or not entry.get(key):
                raise ValueError(f"{where}: {key} is missing")
        line = {key: entry[key] for key in KEYS if entry.get(key)}
        wrong = next((key for key, value in line.items() if not isinstance(value, str)), None)
        if wrong is not None:
            raise ValueError(f"{where}: {wrong} must be a string, got {json.dumps(line[wrong])}")
        if line["id"].casefold() in seen:
            raise ValueError(f"{where}: the id {line['id']!r} comes twice")
        seen.add(line["id"].casefold())
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: the list is empty")
    return lines


def convert_list(voice: Voice, lines: list[dict[str, str]], folder: Path, out: Path) -> int:
    """Converts the lines of a list into `out`: ID.wav of each, and results.jsonl. Returns the
    number of lines that failed a check or were refused.

    Lines that an earlier run has converted with the same voice are skipped.

    Args:
        folder: a recording's path is relative to the current folder, or to this one.

    Raises:
        ValueError: all lines are refused.
    """
    results = out / RESULTS
    done = {line.value["id"]: line.value for line in read_appended(results)}
    reasons: list[str] = []
    append_json_lines(results, [])
    for line in tqdm(lines, desc="vc", unit="line"):
        request = ""
        try:
            path = path_of_id(out, line["id"], ".wav")
            source = prompt_source((), line["source"], folder)
            target = prompt_source(voice.prompts, line["target"], folder)
            request = _request(voice, line, [source, target])
            before = done.get(line["id"], {})
            if before.get("request") == request and (out / str(before["audio"])).is_file():
                continue
            speech = voice.convert(
                Path(source), target, line.get("source_text"), line.get("target_text")
            )
            voice.save(speech, path)
            record = {
                "audio": path.relative_to(out).as_posix(), "text": speech.text,
                "target_text": speech.prompt_text, "failure": speech.failure, "request": request,
            }  # fmt: skip
            if speech.failure is not None:
                logger.warning("%s: %s", line["id"], speech.failure)
        except ValueError as error:
            reasons.append(f"{line['id']}: {error}")
            record = {"audio": None, "failure": REFUSED, "reason": str(error), "request": request}
        named = {key: line[key] for key in ("id", "source", "target")}
        done[line["id"]] = {**named, **record}
        append_json_lines(results, [done[line["id"]]])
    write_json_lines(results, done.values())
    for reason in reasons:
        logger.warning("skipped %s", reason)
    logger.info("%s: %d skipped", counted(len(lines), "line"), len(reasons))
    if len(reasons) == len(lines):
        raise ValueError(f"no line is usable; {reasons[0]}")
    return sum(done[line["id"]]["failure"] is not None for line in lines)


def _request(voice: Voice, line: Mapping[str, str], recordings: list[Path | str]) -> str:
    """16 hex digits over everything that a conversion depends on."""
    facts: list[Any] = [dict(line), voice.digest, repr(voice.sampling)]
    for recording in recordings:
        if isinstance(recording, Path):
            found = recording.stat()
            facts.append([found.st_size, found.st_mtime_ns])
    return sha256_of(json.dumps(facts, sort_keys=True), 16)
