"""Scores voice conversion of any system: `python recipes/benchmark.py vc`.

Words are scored against the source's text (or the judge's transcript of the source), speaker
similarity against source and target.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codec import load_codec
from codec.audio import read_audio, write_audio
from codec.io import sha256_of
from codec.json_lines import write_json_lines
from codec.program import CHECKS_FAILED
from eval.benchmark import ScoredUtterance, score_tts
from eval.metrics import UNPAIRED
from eval.speaker import similarity
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
from recipes.scoring.reconstruction import decode_codes, encode_wave
from recipes.scoring.scores import score_all
from recipes.scoring.systems import command_words, run_lines

PART = "vc"
RATE = 16_000
"""Hz, of scoring."""


class ConvertedItem(NamedTuple):
    """A source, a target speaker's recording, and the conversion."""

    id: str
    text: str | None
    """Text of the source; None: the judge transcribes it."""
    audio: Path | None
    """None: nothing was made."""
    source: Path
    target: Path
    failure: str | None


def add_vc_command(kinds: Any) -> None:
    """Adds `vc` to the subparsers of benchmark.py."""
    about = "voice conversion by any system"
    parents = [list_options(), judge_options()]
    command = kinds.add_parser(PART, parents=parents, help=about, description=about.capitalize())
    add = command.add_argument
    add(
        "--list", action="append", default=[], metavar="[SYSTEM=]LIST", dest="lists",
        help="conversions to score: JSON Lines (id, source, target, audio, perhaps text and "
        "failure); repeatable",
    )  # fmt: skip
    add("--list-name", help="name of the lists in the rows (default: the file's)")
    add(
        "--pairs", type=Path, metavar="LIST",
        help="recordings to convert: JSON Lines (id, source, target, perhaps text)",
    )  # fmt: skip
    add(
        "--codec", action="append", default=[], metavar="[SYSTEM=]DIR",
        help="with --pairs: codebook 1 of the source, the others of the target (SpeechTokenizer's "
        "one-shot conversion, arXiv 2308.16692, section 4.4); repeatable",
    )  # fmt: skip
    add("--codebooks", type=int, metavar="N", help="of --codec: use the first N (default: all)")
    add(
        "--voice", action="append", default=[], metavar="[SYSTEM=]DIR",
        help="with --pairs: voice that converts (slm vc --list); repeatable",
    )  # fmt: skip
    add(
        "--run", action="append", default=[], metavar="[SYSTEM=]COMMAND",
        help="with --pairs: command for each pair; {source}, {target}, {text} and {id} are "
        "replaced, and it writes the wave {out}; repeatable",
    )  # fmt: skip
    add("--model-digest", default="", help="digest of the system of --list")
    add_measures(add, tuple(UNPAIRED))


def benchmark_vc(args: argparse.Namespace) -> None:
    """Scores the systems of the command line.

    Raises:
        ValueError: a list or option is invalid, or no item can be scored.
    """
    check_options(args)
    options = JudgeOptions.of(args)
    conversions = converted(args)
    judges, columns = options.load(), Columns(args)
    found = []
    for each in conversions:
        entries = chosen(each.entries, args)
        items = [item_of_pair(entry, each.file) for entry in entries]
        files = [path for item in items for path in (item.audio, item.source, item.target) if path]
        inputs = sha256_of(str([tuple(map(str, item)) for item in items]), 16)
        key = f"{each.system} {each.model} {inputs} {state_of_files(files)} {judges.judge_name}"
        key += f" {judges.speaker_name} {args.language} {sorted(args.measures)}"
        make = partial(ConversionScorer, options, tuple(args.measures))
        scored = score_all(args.out, items, {each.system: key}, make, args.processes)[each.system]
        own = {
            item.id: columns.of(item.id, entry) for item, entry in zip(items, entries, strict=True)
        }
        columns.check(own, each.list_name)
        origin = origin_of(
            args, PART, each.system, [each.file], judges, each.model, codebooks=args.codebooks
        )
        targets: dict[str, str | None] = {item.id: str(item.target) for item in items}
        found.append(
            ScoredSystem(
                list_name=each.list_name, scored=scored, origin=origin, constants={}, columns=own,
                references=targets,
            )
        )  # fmt: skip
    write_scores(PART, args, found)


def converted(args: argparse.Namespace) -> list[SystemList]:
    """Returns the conversions of --list, and those that each system makes of --pairs.

    Raises:
        ValueError: the options do not fit together, or a list is invalid.
    """
    makers = [*args.codec, *args.voice, *args.run]
    if bool(args.lists) == (args.pairs is not None):
        raise ValueError("give --list with conversions, or --pairs and a system")
    if args.pairs is not None and not makers:
        raise ValueError("--pairs needs a system: --codec, --voice or --run")
    if args.lists and makers:
        raise ValueError("--codec, --voice and --run convert --pairs, not --list")
    if args.name is not None and max(len(args.lists), len(makers)) > 1:
        raise ValueError("--name names one system; write SYSTEM=... for several")
    found = []
    for argument in args.lists:
        name, value = named(argument)
        path = Path(value)
        entries = read_entries(path, ("id", "source", "target", "audio"))
        system = args.name or (name if argument != value else path.resolve().parent.name)
        list_name = args.list_name or path.name.partition(".jsonl")[0]
        found.append(SystemList(system, args.model_digest, list_name, path, entries))
    if args.pairs is not None:
        found += _made(args)
    names = [(each.system, each.list_name) for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two systems are called {twice[0]}; write SYSTEM=...")
    return found


def _made(args: argparse.Namespace) -> list[SystemList]:
    """What each system makes of --pairs."""
    pairs = chosen(read_entries(args.pairs, ("id", "source", "target")), args)
    lines = [
        {**pair, **{key: str(locate(pair[key], args.pairs)) for key in ("source", "target")}}
        for pair in pairs
    ]
    list_name = args.list_name or args.pairs.name.partition(".jsonl")[0]
    found = []

    def add(system: str, model: str, entries: list[dict[str, Any]]) -> None:
        found.append(SystemList(args.name or system, model, list_name, args.pairs, entries))

    for system, folder in map(named, args.codec):
        codec = load_codec(folder)
        out = args.out / "runs" / safe_name(args.name or system)
        count = codec.num_codebooks if args.codebooks is None else args.codebooks
        if not 2 <= count <= codec.num_codebooks:
            raise ValueError(f"--codebooks must be 2 to {codec.num_codebooks}, got {count}")
        add(system, codec.stamp.digest, [swap(codec, line, count, out) for line in lines])
    for system, folder in map(named, args.voice):
        out = args.out / "runs" / safe_name(args.name or system)
        write_json_lines(
            out / "pairs.jsonl",
            [{key: line[key] for key in ("id", "source", "target")} for line in lines],
        )
        command = [sys.executable, "-m", "slm", "vc", "--voice", folder]
        command += ["--list", str(out / "pairs.jsonl"), "--out", str(out)]
        run = subprocess.run(command, check=False, stdout=sys.stderr)
        if run.returncode not in (0, CHECKS_FAILED):
            raise ValueError(f"--voice {folder}: slm vc ended with status {run.returncode}")
        records = {one["id"]: one for one in read_entries(out / "results.jsonl", ("id", "audio"))}
        entries = []
        for line in lines:
            made = records.get(line["id"], {"audio": None, "failure": "refused"})
            audio = None if made["audio"] is None else str(out / made["audio"])
            entries.append({**line, "audio": audio, "failure": made["failure"]})
        add(system, digest_of_voice(folder), entries)
    for system, command in map(named_command, args.run):
        words = command_words(
            command, ("id", "source", "target", "text", "out"), ("source", "target", "out")
        )
        out = args.out / "runs" / safe_name(args.name or system)
        made = run_lines(words, lines, out, args.processes)
        add(system, args.model_digest or sha256_of(command, 16), made)
    return found


def swap(codec: Any, line: Mapping[str, Any], num_codebooks: int, out: Path) -> dict[str, Any]:
    """Writes the wave of the source's codebook 1 and the target's others; returns the line with
    its path.

    The target's codes are repeated or truncated to the source's length.
    """
    rate = codec.sample_rate
    try:
        source, target = (read_audio(line[key], rate) for key in ("source", "target"))
    except ValueError as error:
        return {**line, "audio": None, "failure": str(error)}
    first = encode_wave(codec, source, 1)
    others = encode_wave(codec, target, num_codebooks)[1:]
    repeats = -(-first.shape[1] // others.shape[1])
    codes = np.concatenate([first, np.tile(others, repeats)[:, : first.shape[1]]])
    path = out / f"{safe_name(line['id'])}.wav"
    write_audio(path, decode_codes(codec, codes, source.size), rate)
    return {**line, "audio": str(path), "failure": None}


def item_of_pair(entry: Mapping[str, Any], path: Path) -> ConvertedItem:
    """Returns an entry with its files located."""
    audio, failure = entry.get("audio"), entry.get("failure")
    if audio is None:
        failure = failure or "refused"
    return ConvertedItem(
        entry["id"], entry.get("text"), None if audio is None else locate(audio, path),
        locate(entry["source"], path), locate(entry["target"], path), failure,
    )  # fmt: skip


class ConversionScorer:
    """Scores conversions: words against the source's, similarity to target (`similarity`) and
    source (`similarity_source`), and their difference (`similarity_gain`)."""

    def __init__(self, options: JudgeOptions, measures: Sequence[str]):
        self._judges: Judges = options.load()
        self._language, self._measures = options.language, measures

    def __call__(
        self, item: ConvertedItem, names: Sequence[str]
    ) -> Iterator[tuple[str, ScoredUtterance]]:
        """Yields the scores of the one system. A missing or silent wave is a failure, whose words
        are all deletions."""
        source, target = read_audio(item.source, RATE), read_audio(item.target, RATE)
        text = item.text
        if text is None:
            text = self._judges.transcribe(source, RATE)
        failure, wave = item.failure, np.zeros(0, np.float32)
        if item.audio is not None:
            try:
                wave = read_audio(item.audio, RATE)
            except ValueError as error:
                failure = failure or str(error)
        scored = score_tts(
            item.id, text, wave, RATE, self._judges.transcribe, self._judges.embed,
            (target, RATE), failure, self._language, self._measures,
        )  # fmt: skip
        values = dict(scored.values)
        if self._judges.embed is not None and "similarity" in values:
            to_source = similarity(self._judges.embed(wave, RATE), self._judges.embed(source, RATE))
            values["similarity_source"] = to_source
            values["similarity_gain"] = values["similarity"] - to_source
        audio = str(item.audio) if item.audio is not None and wave.size else None
        for name in names:
            yield name, replace(scored, values=values, audio=audio)
