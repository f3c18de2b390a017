"""Any system as a command line: run once per line of a list, its output collected as a list.

    --run 'my-tts --text {text} --prompt {prompt} --out {out}'

The command is split like a shell's words, then each {field} is replaced within its word, so that no
text is ever read by a shell.
"""

import logging
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from codec.io import path_of_id, sha256_of
from codec.json_lines import append_json_lines, read_appended, write_json_lines
from recipes.scoring.judges import safe_name, state_of_files

logger = logging.getLogger(__name__)

FIELD = re.compile(r"\{(\w+)\}")
RESULTS = "results.jsonl"


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
    words: Sequence[str], entries: Sequence[Mapping[str, Any]], folder: Path, processes: int = 1
) -> list[dict[str, Any]]:
    """Runs the command for each entry; returns the entries with what it made.

    With {out} among its words the command writes a wave, FOLDER/ID.wav, which is `audio`; otherwise
    its standard output is the `hypothesis`. A command that fails, or writes nothing, has a
    `failure`. What an earlier run has made with the same command and line is kept.

    Args:
        entries: each with `id` and a text for every field but {out}.
        processes: commands that run at once.

    Raises:
        ValueError: the program does not exist.
    """
    makes_wave = any("{out}" in word for word in words)
    results = folder / RESULTS
    done = {line.value["id"]: line.value for line in read_appended(results)}

    def key(entry: Mapping[str, Any]) -> str:
        files = [Path(entry[name]) for name in ("prompt", "audio", "source", "target")
                 if isinstance(entry.get(name), str)]  # fmt: skip
        return sha256_of(f"{list(words)} {sorted(entry.items())} {state_of_files(files)}", 16)

    def is_done(entry: Mapping[str, Any]) -> bool:
        record = done.get(entry["id"])
        if record is None or record["key"] != key(entry):
            return False
        return not makes_wave or record["audio"] is None or Path(record["audio"]).is_file()

    waiting = [entry for entry in entries if not is_done(entry)]
    num_done, program = len(entries) - len(waiting), Path(words[0]).name
    with (
        tqdm(total=len(entries), initial=num_done, desc=program, unit="line") as progress,
        ThreadPoolExecutor(processes) as pool,
    ):
        futures = {pool.submit(_run, words, entry, folder, makes_wave): entry for entry in waiting}
        try:
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


def _run(
    words: Sequence[str], entry: Mapping[str, Any], folder: Path, makes_wave: bool
) -> dict[str, Any]:
    """`audio` or `hypothesis` of an entry, and its `failure`."""
    fields = dict(entry)
    if makes_wave:
        out = path_of_id(folder, safe_name(entry["id"]), ".wav")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        fields["out"] = str(out)

    def value(match: re.Match[str]) -> str:
        return str(fields.get(match[1]) or "")

    arguments = [FIELD.sub(value, word) for word in words]
    try:
        run = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=None
        )
    except FileNotFoundError as error:
        raise ValueError(f"--run: there is no program {words[0]!r}") from error
    except (PermissionError, OSError, ValueError) as error:
        raise ValueError(f"--run: {words[0]!r} cannot be started ({error})") from error
    failure = None
    if run.returncode:
        printed = run.stderr.decode("utf-8", "replace").strip().splitlines()
        failure = f"status {run.returncode}" + (f": {printed[-1][:200]}" if printed else "")
    if not makes_wave:
        text = run.stdout.decode("utf-8", "replace").strip()
        return {"hypothesis": None if failure else text, "failure": failure}
    written = Path(fields["out"]).is_file()
    failure = failure or (None if written else "no wave was written")
    return {"audio": fields["out"] if written else None, "failure": failure}
