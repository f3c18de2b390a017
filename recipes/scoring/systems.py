"""What systems make of lists: waves and transcripts, kept in OUT/runs/SYSTEM/LIST/.

A command of any system runs once per line:

    --run 'my-tts --text {text} --prompt {prompt} --out {out}'

It is split like a shell's words, then each {field} is replaced within its word, so that no text is
ever read by a shell.
"""

import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from codec.io import sha256_of
from codec.json_lines import append_json_lines, read_appended, write_json_lines
from codec.program import CHECKS_FAILED
from recipes.scoring.judges import safe_name, state_of_files
from recipes.scoring.lists import read_entries

logger = logging.getLogger(__name__)

FIELD = re.compile(r"\{(\w+)\}")
RESULTS = "results.jsonl"
RECORDINGS = ("prompt", "audio", "source", "target")
"""Keys of entries that name recordings."""
Entry = dict[str, Any]


def run_folder(out: Path, system: str, list_name: str) -> Path:
    """Returns the folder of what a system makes of a list."""
    return out / "runs" / safe_name(system) / safe_name(list_name)


def command_words(command: str, fields: Sequence[str], needed: Sequence[str]) -> list[str]:
    """Returns the words of a command template.

    Args:
        fields: those that may occur.
        needed: those that must.

    Raises:
        ValueError: it is no command line, has an unknown field or lacks a needed one.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--run {command!r}: {error}") from error
    if not words:
        raise ValueError("--run: the command is empty")
    found = {name for word in words for name in FIELD.findall(word)}
    unknown = sorted(found - set(fields))
    if unknown:
        raise ValueError(
            f"--run: {{{unknown[0]}}} is no field; the fields are "
            + ", ".join(f"{{{name}}}" for name in fields)
        )
    lacking = [name for name in needed if name not in found]
    if lacking:
        raise ValueError(f"--run: the command has no {{{lacking[0]}}}")
    return words


def run_lines(
    words: Sequence[str], entries: Sequence[Entry], folder: Path, processes: int = 1
) -> list[Entry]:
    """Runs a command for each entry; returns the entries with what it made (see `make_lines`).

    With {out} among its words the command writes a wave, which is `audio`; otherwise its standard
    output is the `hypothesis`. A command that fails, or writes nothing, has a `failure`.

    Args:
        entries: each with `id` and a text for every field but {out}.
        processes: commands that run at once.

    Raises:
        ValueError: the program does not exist.
    """
    makes_wave = any("{out}" in word for word in words)
    make = partial(_run, words, makes_wave=makes_wave)
    return make_lines(make, " ".join(words), entries, folder, processes)


def make_lines(
    make: Callable[[Entry, Path], Entry], system: str, entries: Sequence[Entry], folder: Path,
    processes: int = 1,
) -> list[Entry]:  # fmt: skip
    """Returns the entries with what a system makes of each: `audio` or `hypothesis`, and `failure`.

    What an earlier run has made is kept, but for failures and for lines that have changed.

    Args:
        make: called with an entry and the path of the wave that it may write.
        system: everything that the result depends on besides the entry and its recordings.
        processes: entries at once.
    """
    results = folder / RESULTS
    done = {line.value["id"]: line.value for line in read_appended(results)}

    def key(entry: Entry) -> str:
        files = [Path(entry[name]) for name in RECORDINGS if isinstance(entry.get(name), str)]
        return sha256_of(f"{system} {sorted(entry.items())} {state_of_files(files)}", 16)

    def is_done(entry: Entry) -> bool:
        record = done.get(entry["id"])
        if record is None or record["key"] != key(entry) or record["failure"] is not None:
            return False
        return record.get("audio") is None or Path(record["audio"]).is_file()

    waiting = [entry for entry in entries if not is_done(entry)]
    num_done, label = len(entries) - len(waiting), folder.parent.name
    pool = ThreadPoolExecutor(processes)
    try:
        with tqdm(total=len(entries), initial=num_done, desc=label, unit="line") as progress:
            futures = {
                pool.submit(make, entry, folder / f"{safe_name(entry['id'])}.wav"): entry
                for entry in waiting
            }
            for future in as_completed(futures):
                entry = futures[future]
                done[entry["id"]] = {"key": key(entry), **entry, **future.result()}
                append_json_lines(results, [done[entry["id"]]])
                progress.update()
    finally:
        pool.shutdown(cancel_futures=True)
    made = [done.pop(entry["id"]) for entry in entries]
    write_json_lines(results, [*made, *done.values()])
    failed = [one for one in made if one["failure"] is not None]
    if failed:
        logger.warning("%d of %d lines failed: %s", len(failed), len(made), failed[0]["failure"])
    return made


def _run(words: Sequence[str], entry: Entry, out: Path, *, makes_wave: bool) -> Entry:
    """`audio` or `hypothesis` of an entry, and its `failure`."""
    fields = dict(entry)
    if makes_wave:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        fields["out"] = str(out)

    def value(match: re.Match[str]) -> str:
        return str(fields.get(match[1]) or "")

    arguments = [FIELD.sub(value, word) for word in words]
    try:
        run = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise ValueError(f"--run: there is no program {words[0]!r}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"--run: {words[0]!r} cannot be started ({error})") from error
    failure = None
    if run.returncode:
        printed = run.stderr.decode("utf-8", "replace").strip().splitlines()
        failure = f"status {run.returncode}" + (f": {printed[-1][:200]}" if printed else "")
    if not makes_wave:
        text = run.stdout.decode("utf-8", "replace").strip()
        return {"hypothesis": None if failure else text, "failure": failure}
    written = out.is_file()
    failure = failure or (None if written else "no wave was written")
    return {"audio": str(out) if written else None, "failure": failure}


def run_voice(
    command: str, voice: str, lines: Sequence[Entry], folder: Path, *options: str
) -> dict[str, Entry]:
    """Runs `slm COMMAND --list`, which resumes; returns the record of each line by id, with the
    paths of waves.

    Args:
        lines: of the list.

    Raises:
        ValueError: it ended with an error, which it has printed.
    """
    listed = folder / "lines.jsonl"
    write_json_lines(listed, lines)
    words = [sys.executable, "-m", "slm", command, "--voice", voice, "--list", str(listed)]
    run = subprocess.run([*words, "--out", str(folder), *options], check=False, stdout=sys.stderr)
    if run.returncode not in (0, CHECKS_FAILED):
        raise ValueError(f"--voice {voice}: slm {command} ended with status {run.returncode}")
    records = {one["id"]: one for one in read_entries(folder / RESULTS, ("id", "audio"))}
    found = {}
    for line in lines:  # A line that is no request of the voice has no record.
        record = records.get(line["id"], {"audio": None, "failure": "refused", "seed": None})
        audio = None if record["audio"] is None else str(folder / record["audio"])
        found[line["id"]] = {**record, "audio": audio}
    return found
