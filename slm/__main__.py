"""The command `slm`: tts and asr."""

import argparse
import fcntl
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm.pipeline import Speech, Utterance, Voice

logger = logging.getLogger("slm")


def main(argv: list[str] | None = None) -> None:
    """Exit status 0 done, 2 the user can mend it, 1 a fault of ours."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("PARLANCE_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slm", description="Speak and transcribe with a voice.")
    commands = parser.add_subparsers(required=True, metavar="tts|asr")
    tts = commands.add_parser("tts", help="text and a prompt recording to speech")
    asr = commands.add_parser("asr", help="recordings to text, one JSON line each")
    for command, run in ((tts, _tts), (asr, _asr)):
        command.set_defaults(run=run)
        command.add_argument("--voice", required=True, help="folder or hub id of a voice")
        command.add_argument("--base", help="where the voice's text LLM is, if it has moved")
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("--batch", type=int, default=8, help="items generated together")
    tts.add_argument("--text", help="what to say")
    tts.add_argument(
        "--prompt", help="recording whose voice to take on, or a shipped prompt's name"
    )
    tts.add_argument("--prompt-text", help="what the prompt says; else the model transcribes it")
    tts.add_argument("--list", help="JSON lines: id, text, prompt, and prompt_text if known")
    tts.add_argument("--out", required=True, help="a .wav; with --list a folder")
    tts.add_argument("--seed", type=int, default=0)
    tts.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    asr.add_argument("recordings", nargs="+", metavar="REC")
    return parser


def _load(arguments: argparse.Namespace) -> "Voice":
    from slm.pipeline import Voice

    if arguments.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {arguments.batch}")
    return Voice.from_pretrained(arguments.voice, base=arguments.base, device=arguments.device)


def _tts(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from slm.pipeline import check_name

    if arguments.list is None and None in (arguments.text, arguments.prompt):
        raise ValueError("give --text and --prompt, or --list")
    if arguments.list is not None and (arguments.text or arguments.prompt):
        raise ValueError("give either --text and --prompt, or --list, not both")
    entries = list(_entries(Path(arguments.list))) if arguments.list else []
    if not arguments.list:
        check_name(arguments.out)
    voice = _load(arguments)
    voice.sampling = replace(voice.sampling, greedy=arguments.greedy)
    if arguments.list:
        with _alone(Path(arguments.out)):
            _tts_list(voice, entries, Path(arguments.list).parent, arguments)
        return
    entry = {"text": arguments.text, "prompt": arguments.prompt}
    if arguments.prompt_text is not None:
        entry["prompt_text"] = arguments.prompt_text
    (speech,) = voice.speak([_prepare(voice, entry, Path(), arguments.seed)])
    voice.save(speech, arguments.out)
    print(json.dumps(_result(arguments.out, entry, speech), ensure_ascii=False))


def _prepare(voice: "Voice", entry: Mapping[str, str], folder: Path, seed: int) -> "Utterance":
    """Reads and checks a line. A prompt's path counts from the current folder, then the list's."""
    voice.coverage.check(entry["text"])
    name = entry["prompt"]
    where = name if name in voice.prompts else _recording(name, folder)
    return voice.prepare(entry["text"], voice.prompt(where, entry.get("prompt_text")), seed)


def _recording(name: str, folder: Path) -> Path:
    return next((p for p in (Path(name), folder / name) if p.exists()), Path(name))


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Lines of a list that are JSON; whether they say enough is checked later."""
    if not path.is_file():
        raise ValueError(f"{path}: no such list")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None


def _check_entry(entry: Any, seen: set[str]) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    for key in ("id", "text", "prompt"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise ValueError(f"{key} is missing")
    known = {key: entry[key] for key in ("id", "text", "prompt", "prompt_text") if entry.get(key)}
    if Path(known["id"]).is_absolute() or ".." in Path(known["id"]).parts:
        raise ValueError(f"the id {known['id']!r} leads out of the folder")
    if known["id"] in seen:
        raise ValueError(f"the id {known['id']!r} comes twice")
    seen.add(known["id"])
    return known


def _tts_list(
    voice: "Voice", entries: list[tuple[int, Any]], folder: Path, arguments: argparse.Namespace
) -> None:
    """A list costs only its bad lines. What an earlier start has made is not made again.

    A line that is whole but was refused is in results.jsonl as well, without a wave.
    """
    from tqdm import tqdm

    out = Path(arguments.out)
    results = out / "results.jsonl"
    settings = [voice.digest, arguments.seed, repr(voice.sampling)]
    done = _made(results, out)
    made: set[str] = set()
    waiting: list[tuple[dict[str, str], Utterance]] = []
    skipped: list[str] = []
    seen: set[str] = set()
    with open(results, "a", encoding="utf-8") as file:
        for number, entry in tqdm(entries, desc="tts", unit="line"):
            known: dict[str, str] = {}
            try:
                known = _check_entry(entry, seen)
                known["request"] = _request(voice, known, folder, settings)
                if done.get(known["id"]) == known["request"]:
                    made.add(known["id"])
                    continue
                waiting.append((known, _prepare(voice, known, folder, arguments.seed)))
            except (ValueError, OSError) as error:
                skipped.append(f"line {number}: {error}")
                if known:
                    _write(file, _refused(known, error, arguments.seed))
                continue
            if len(waiting) == arguments.batch:
                _speak(voice, waiting, out, file)
                waiting = []
        if waiting:
            _speak(voice, waiting, out, file)
    _keep_newest(results)
    for reason in skipped:
        logger.warning("skipped %s", reason)
    logger.info(
        "%d lines: %d skipped, %d were there already", len(entries), len(skipped), len(made)
    )
    if entries and len(skipped) == len(entries):
        raise ValueError(f"{arguments.list}: no line could be used")


def _speak(
    voice: "Voice", waiting: list[tuple[dict[str, str], "Utterance"]], out: Path, file: Any
) -> None:
    speeches = voice.speak([utterance for _, utterance in waiting])
    for (entry, _), speech in zip(waiting, speeches, strict=True):
        name = f"{entry['id']}.wav"
        voice.save(speech, out / name)
        record = {"id": entry["id"], **_result(name, entry, speech), "request": entry["request"]}
        _write(file, record)


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
    temporary = results.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    temporary.replace(results)


def _result(audio: str, entry: Mapping[str, str], speech: "Speech") -> dict[str, Any]:
    if speech.failure is not None:
        logger.warning("%s: %s after %d tries", audio, speech.failure, speech.tries)
    return {
        "audio": audio,
        "text": speech.text,
        "prompt": entry["prompt"],
        "prompt_text": speech.prompt_text,
        "failure": speech.failure,
        "tries": speech.tries,
        "seed": speech.seed,
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
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


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


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock: two runs in one folder would write the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is writing here; wait for it or choose another --out"
            ) from None
        yield


def _asr(arguments: argparse.Namespace) -> None:
    voice = _load(arguments)
    failed = []
    for path in arguments.recordings:
        try:
            text = voice.asr_file(path, arguments.batch)
        except (ValueError, OSError) as error:
            if len(arguments.recordings) == 1:
                raise
            failed.append(path)
            logger.warning("skipped: %s", error)
            continue
        print(json.dumps({"audio": path, "text": text}, ensure_ascii=False), flush=True)
    if failed:
        logger.info("%d of %d recordings skipped", len(failed), len(arguments.recordings))
    if len(failed) == len(arguments.recordings):
        raise ValueError("no recording could be used")


if __name__ == "__main__":
    main()
