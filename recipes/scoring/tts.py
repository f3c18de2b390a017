"""Scores synthesized speech: `python recipes/benchmark.py tts`."""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codec.audio import read_audio
from codec.io import sha256_of
from codec.json_lines import write_json_lines
from codec.program import CHECKS_FAILED
from eval.benchmark import ScoredUtterance, score_tts
from eval.metrics import UNPAIRED
from recipes.scoring.judges import Judges, digest_of_voice, safe_name, state_of_files
from recipes.scoring.lists import locate, read_entries
from recipes.scoring.options import (
    Columns,
    JudgeOptions,
    ScoredSystem,
    SystemList,
    add_measures,
    check_options,
    chosen,
    judge_options,
    list_options,
    named,
    named_command,
    origin_of,
    write_scores,
)
from recipes.scoring.scores import score_all
from recipes.scoring.speaker_references import (
    SpeakerRecording,
    SpeakerReferences,
    check_speakers,
    read_speakers,
)
from recipes.scoring.systems import command_words, run_lines

PART = "tts"
LENGTHS = (3, 10, 25, 75)
"""Limits in words of the groups of the column `length`; 75 words take about 30 s."""


class SpeechItem(NamedTuple):
    """A text, and the wave that a system made of it."""

    id: str
    text: str
    audio: Path | None
    """None: nothing was made."""
    prompt: Path | None
    failure: str | None
    """What the system reports."""
    seed: int | None
    speaker: str | None


def add_tts_command(kinds: Any) -> None:
    """Adds `tts` to the subparsers of benchmark.py."""
    about = "synthesized texts of any system"
    parents = [list_options(), judge_options()]
    command = kinds.add_parser(PART, parents=parents, help=about, description=about.capitalize())
    add = command.add_argument
    add(
        "--list", action="append", default=[], metavar="[SYSTEM=]LIST", dest="lists",
        help="waves to score: JSON Lines (id, text, audio, perhaps prompt, failure, seed), or a "
        "folder of recordings with a .txt for each; repeatable",
    )  # fmt: skip
    add("--list-name", help="name of the lists in the rows (default: the file's)")
    add(
        "--texts", type=Path, metavar="LIST",
        help="texts to synthesize with --voice or --run: JSON Lines (id, text, prompt)",
    )  # fmt: skip
    add(
        "--voice", action="append", default=[], metavar="[SYSTEM=]DIR",
        help="with --texts: voice that synthesizes them; with one --list: its voice; repeatable",
    )  # fmt: skip
    add(
        "--run", action="append", default=[], metavar="[SYSTEM=]COMMAND",
        help="with --texts: command for each line; {text}, {prompt}, {prompt_text}, {language} and "
        "{id} are replaced, and it writes the wave {out}; repeatable",
    )  # fmt: skip
    add("--model-digest", default="", help="digest of the system of --list")
    add_measures(add, (*UNPAIRED, "speaking_rate"))
    add("--rate", type=int, default=16000, help="in Hz, of scoring (default: 16000)")
    add(
        "--speakers", type=Path, metavar="LIST",
        help="recordings of speakers: JSON Lines (audio, speaker, perhaps sex), for the similarity "
        "to the item's `speaker` and to others",
    )  # fmt: skip
    add("--prompts", type=Path, help="folder of the prompts, if their paths are relative to it")


def benchmark_tts(args: argparse.Namespace) -> None:
    """Scores the systems of the command line.

    Raises:
        ValueError: a list or option is invalid, or no item can be scored.
    """
    check_options(args)
    options = JudgeOptions.of(args)
    listed = system_lists(args)
    judges, columns = options.load(), Columns(args)
    speakers = [] if args.speakers is None else read_speakers(args.speakers)
    if args.speakers is not None and args.speaker is None:
        raise ValueError("--speakers needs a speaker encoder: --speaker")
    known = f"{speakers} {state_of_files([one.audio for one in speakers])}"
    found: list[ScoredSystem] = []
    for each in listed:
        entries = chosen(each.entries, args)
        if args.speakers is not None:
            check_speakers(entries, speakers, args.speakers)
        items = [item_of(entry, each.file, args.prompts) for entry in entries]
        files = [path for item in items for path in (item.audio, item.prompt) if path is not None]
        inputs = sha256_of(str([tuple(map(str, item)) for item in items]), 16)
        key = f"{each.system} {each.model} {inputs} {state_of_files(files)} {judges.judge_name}"
        key += f" {judges.speaker_name} {args.language} {args.rate} {known} {sorted(args.measures)}"
        make = partial(SpeechScorer, options, args.rate, tuple(args.measures), tuple(speakers))
        scored = score_all(args.out, items, {each.system: key}, make, args.processes)[each.system]
        own = {
            item.id: columns.of(item.id, {"length": length_group(item.text), **entry})
            for item, entry in zip(items, entries, strict=True)
        }
        columns.check(own, each.list_name)
        seed = min((one.seed for one in scored if one.seed is not None), default=0)
        origin = origin_of(
            args, PART, each.system, [each.file] if each.file.is_file() else [], judges,
            each.model, seed, rate=args.rate,
        )  # fmt: skip
        prompts = {item.id: str(item.prompt) if item.prompt else None for item in items}
        found.append(
            ScoredSystem(
                list_name=each.list_name, scored=scored, origin=origin, constants={}, columns=own,
                references=prompts,
            )
        )  # fmt: skip
    write_scores(PART, args, found)


def system_lists(args: argparse.Namespace) -> list[SystemList]:
    """Returns the lists of --list, and what --voice and --run make of --texts.

    Raises:
        ValueError: the options do not fit together, or a list is invalid.
    """
    runs = [named_command(run) for run in args.run]
    if bool(args.lists) == (args.texts is not None):
        raise ValueError("give --list with waves, or --texts with --voice or --run")
    if args.texts is not None and not (args.voice or runs):
        raise ValueError("--texts needs a system: --voice or --run")
    if args.lists and (runs or len(args.voice) > 1):
        raise ValueError("--run and several --voice synthesize --texts, not --list")
    if args.name is not None and max(len(args.lists), len(args.voice) + len(runs)) > 1:
        raise ValueError("--name names one system; write SYSTEM=... for several")
    found = [_given(args, argument) for argument in args.lists]
    if args.texts is not None:
        entries = read_entries(args.texts, ("id", "text"))
        name = args.list_name or args.texts.name.partition(".jsonl")[0]
        chosen_entries = chosen(entries, args)
        for system, folder in map(named, args.voice):
            system = args.name or system
            found.append(_synthesized(args, system, folder, chosen_entries, name))
        for system, command in runs:
            system = args.name or system
            words = command_words(
                command, ("id", "text", "prompt", "prompt_text", "language", "out"),
                ("text", "out"),
            )  # fmt: skip
            lines = [
                {"language": args.language, **one, **_prompt_of(one, args)}
                for one in chosen_entries
            ]
            made = run_lines(words, lines, args.out / "runs" / safe_name(system), args.processes)
            model = args.model_digest or sha256_of(command, 16)
            found.append(SystemList(system, model, name, args.texts, made))
    names = [(each.system, each.list_name) for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two systems are called {twice[0]}; write SYSTEM=...")
    return found


def _given(args: argparse.Namespace, argument: str) -> SystemList:
    """A list of waves that exist."""
    name, value = named(argument)
    path = Path(value)
    needed = ("id", "text", "audio")
    is_named = argument != value
    folder = path if path.is_dir() else path.resolve().parent
    system = args.name or (name if is_named else folder.name)
    model = digest_of_voice(args.voice[0]) if args.voice else args.model_digest
    listed = args.list_name or path.name.partition(".jsonl")[0]
    return SystemList(system, model, listed, path, read_entries(path, needed))


def _prompt_of(entry: Mapping[str, Any], args: argparse.Namespace) -> dict[str, str]:
    """The prompt's path, if the entry has one."""
    if not entry.get("prompt"):
        return {}
    return {"prompt": str(locate(entry["prompt"], args.texts, args.prompts))}


def _synthesized(
    args: argparse.Namespace, system: str, folder: str, entries: Sequence[Mapping[str, Any]],
    name: str,
) -> SystemList:  # fmt: skip
    """What a voice makes of the texts, by `slm tts --list`, which resumes."""
    out = args.out / "runs" / safe_name(system)
    listed = out / "texts.jsonl"
    keys = ("id", "text", "prompt", "prompt_text")
    lines = []
    for entry in entries:
        line = {key: entry[key] for key in keys if entry.get(key)}
        place = _prompt_of(entry, args).get("prompt")
        lines.append(line | ({"prompt": place} if place and Path(place).is_file() else {}))
    write_json_lines(listed, lines)
    command = [sys.executable, "-m", "slm", "tts", "--voice", folder, "--list", str(listed)]
    command += ["--out", str(out), "--seed", str(args.seed)]
    run = subprocess.run(command, check=False, stdout=sys.stderr)
    if run.returncode not in (0, CHECKS_FAILED):
        raise ValueError(f"--voice {folder}: slm tts ended with status {run.returncode}")
    made = {entry["id"]: entry for entry in read_entries(out / "results.jsonl", ("id", "audio"))}
    found = []
    for entry in entries:
        record = made.get(entry["id"], {"audio": None, "failure": "refused"})
        audio = None if record["audio"] is None else str(out / record["audio"])
        found.append(
            {**entry, **_prompt_of(entry, args), "audio": audio, "failure": record["failure"],
             "seed": record.get("seed")}
        )  # fmt: skip
    return SystemList(system, digest_of_voice(folder), name, args.texts, found)


def item_of(entry: Mapping[str, Any], path: Path, prompts: Path | None) -> SpeechItem:
    """Returns an entry with its files located."""
    audio, prompt = entry.get("audio"), entry.get("prompt")
    failure = entry.get("failure")
    if audio is None:
        failure = failure or "refused"
    return SpeechItem(
        entry["id"], entry["text"], None if audio is None else locate(audio, path),
        locate(prompt, path, prompts) if prompt else None, failure, entry.get("seed"),
        None if entry.get("speaker") is None else str(entry["speaker"]),
    )  # fmt: skip


def length_group(text: str) -> str:
    """Returns the group of a text's number of words, such as `words 4-10`."""
    count = len(text.split())
    low = 1
    for high in LENGTHS:
        if count <= high:
            return f"{low}-{high} words"
        low = high + 1
    return f"{low} words or more"


class SpeechScorer:
    """Scores synthesized speech. A missing, silent or non-finite wave is a failure, whose words
    are all deletions."""

    def __init__(
        self, options: JudgeOptions, rate: int, measures: Sequence[str],
        speakers: Sequence[SpeakerRecording],
    ):  # fmt: skip
        self._judges: Judges = options.load()
        self._language, self._rate, self._measures = options.language, rate, measures
        embed = self._judges.embed
        self._references = SpeakerReferences(speakers, embed, rate) if embed is not None else None

    def __call__(
        self, item: SpeechItem, names: Sequence[str]
    ) -> Iterator[tuple[str, ScoredUtterance]]:
        """Yields the scores of the one system."""
        failure, wave, prompt = item.failure, np.zeros(0, np.float32), None
        if item.audio is not None:
            try:
                wave = read_audio(item.audio, self._rate)
            except ValueError as error:  # Missing, silent or NaN.
                failure = failure or str(error)
        if wave.size and self._judges.embed is not None and item.prompt is not None:
            prompt = (read_audio(item.prompt, self._rate), self._rate)
        scored = score_tts(
            item.id, item.text, wave, self._rate, self._judges.transcribe, self._judges.embed,
            prompt, failure, self._language, self._measures,
        )  # fmt: skip
        values = dict(scored.values)
        if "similarity" in values and item.speaker is not None and self._references is not None:
            assert self._judges.embed is not None
            embedding = self._judges.embed(wave, self._rate)
            exclude = [item.prompt] if item.prompt is not None else []
            values |= self._references.of(item.speaker, embedding, exclude)
        audio = str(item.audio) if item.audio is not None and wave.size else None
        for name in names:
            yield name, replace(scored, values=values, seed=item.seed, audio=audio)
