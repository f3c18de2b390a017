"""Scores voice conversion of any system: `python recipes/benchmark.py vc`.

Words are scored against the source's text (or the judge's transcript of the source), speaker
similarity against source and target.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codec import load_codec
from codec.audio import read_audio, write_audio
from codec.io import sha256_of
from eval.benchmark import ScoredUtterance, score_tts
from eval.metrics import UNPAIRED
from eval.speaker import similarity
from recipes.scoring.judges import Judges, digest_of_voice
from recipes.scoring.lists import locate, read_entries
from recipes.scoring.options import (
    JudgeOptions,
    add_list_sources,
    add_measures,
    check_options,
    check_sources,
    chosen,
    judge_options,
    list_name_of,
    list_options,
    named,
    named_command,
)
from recipes.scoring.reconstruction import decode_codes, encode_wave
from recipes.scoring.systems import command_words, make_lines, run_folder, run_lines, run_voice
from recipes.scoring.waves import (
    Entry,
    SystemList,
    given_list,
    located,
    score_lists,
    wave_or_failure,
)

PART = "vc"
RATE = 16_000
"""Hz, of scoring."""
FIELDS = ("id", "source", "target", "text", "out")
"""Fields of --run."""


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
    add_list_sources(
        add, "conversions to score: JSON Lines (id, source, target, audio, perhaps text and "
        "failure)",
    )  # fmt: skip
    add(
        "--pairs", type=Path, metavar="LIST",
        help="recordings to convert: JSON Lines (id, source, target, perhaps text)",
    )  # fmt: skip
    add(
        "--codec", action="append", default=[], metavar="[SYSTEM=]DIR",
        help="with --pairs: codebook 1 of the source, the others of the target, as in "
        "SpeechTokenizer's one-shot conversion (arXiv 2308.16692); repeatable",
    )  # fmt: skip
    add("--codebooks", type=int, metavar="N", help="of --codec: use the first N (default: all)")
    add(
        "--voice", action="append", default=[], metavar="[SYSTEM=]DIR",
        help="with --pairs: voice that converts (slm vc --list); with one --list: its voice; "
        "repeatable",
    )  # fmt: skip
    add(
        "--run", action="append", default=[], metavar="[SYSTEM=]COMMAND",
        help="with --pairs: command for each pair; {source}, {target}, {text} and {id} are "
        "replaced, and it writes the wave {out}; repeatable",
    )  # fmt: skip
    add_measures(add, tuple(UNPAIRED))


def benchmark_vc(args: argparse.Namespace) -> None:
    """Scores the systems of the command line.

    Raises:
        ValueError: a list or option is invalid, or no item can be scored.
    """
    check_options(args)
    check_sources(args, "pairs", ("codec", "voice", "run"))
    options = JudgeOptions.of(args)
    lists = [given_list(args, one, ("id", "source", "target", "audio")) for one in args.lists]
    if args.pairs is not None:
        lists += converted(args)
    score_lists(
        args, PART, lists, unconverted, item_of_pair,
        partial(ConversionScorer, options, tuple(args.measures)), options.load(), "target",
        codebooks=args.codebooks, measures=sorted(args.measures),
    )  # fmt: skip


def converted(args: argparse.Namespace) -> list[SystemList]:
    """Returns what each system makes of --pairs."""
    pairs = chosen(read_entries(args.pairs, ("id", "source", "target")), args)
    for pair in pairs:
        pair |= {key: str(locate(pair[key], args.pairs)) for key in ("source", "target")}
    name, found = args.list_name or list_name_of(args.pairs), []

    def add(system: str, model: str, made: list[Entry]) -> None:
        found.append(SystemList(system, model, name, args.pairs, made))

    for system, source in map(named, args.codec):
        system, codec = args.name or system, load_codec(source)
        count = codec.num_codebooks if args.codebooks is None else args.codebooks
        if not 2 <= count <= codec.num_codebooks:
            raise ValueError(f"--codebooks must be 2 to {codec.num_codebooks}, got {count}")
        folder, make = run_folder(args.out, system, name), partial(swap, codec, count)
        made = make_lines(make, f"{codec.stamp.digest} {count}", pairs, folder)
        add(system, codec.stamp.digest, made)
    for system, voice in map(named, args.voice):
        system = args.name or system
        lines = [{key: pair[key] for key in ("id", "source", "target")} for pair in pairs]
        records = run_voice("vc", voice, lines, run_folder(args.out, system, name))
        made = [
            {**pair, **{key: records[pair["id"]][key] for key in ("audio", "failure")}}
            for pair in pairs
        ]
        add(system, digest_of_voice(voice), made)
    for system, command in map(named_command, args.run):
        system = args.name or system
        words = command_words(command, FIELDS, ("source", "target", "out"))
        made = run_lines(words, pairs, run_folder(args.out, system, name), args.processes)
        add(system, args.model_digest or sha256_of(command, 16), made)
    return found


def swap(codec: Any, num_codebooks: int, pair: Mapping[str, Any], out: Path) -> Entry:
    """Writes the wave of the source's codebook 1 and the target's others; returns `audio` and
    `failure`.

    The target's codes are repeated or truncated to the source's length.
    """
    rate = codec.sample_rate
    try:
        source, target = (read_audio(pair[key], rate) for key in ("source", "target"))
    except ValueError as error:
        return {"audio": None, "failure": str(error)}
    first = encode_wave(codec, source, 1)
    others = encode_wave(codec, target, num_codebooks)[1:]
    repeats = -(-first.shape[1] // others.shape[1])
    codes = np.concatenate([first, np.tile(others, repeats)[:, : first.shape[1]]])
    write_audio(out, decode_codes(codec, codes, source.size), rate)
    return {"audio": str(out), "failure": None}


def unconverted(entry: Entry) -> Entry | None:
    """Returns the entry of the source itself, if its text is known."""
    if entry.get("text") is None:
        return None
    return {**entry, "audio": entry["source"], "failure": None}


def item_of_pair(entry: Mapping[str, Any], path: Path) -> ConvertedItem:
    """Returns an entry with its files located."""
    return ConvertedItem(
        entry["id"], entry.get("text"), located(entry, "audio", path),
        locate(entry["source"], path), locate(entry["target"], path), entry.get("failure"),
    )  # fmt: skip


class ConversionScorer:
    """Scores conversions: words against the source's, similarity to target (`similarity`) and
    source (`similarity_source`), and their difference (`similarity_gain`). A missing or silent wave
    is a failure, whose words are all deletions."""

    def __init__(self, options: JudgeOptions, measures: Sequence[str]):
        self._judges: Judges = options.load()
        self._language, self._measures = options.language, measures

    def __call__(
        self, item: ConvertedItem, names: Sequence[str]
    ) -> Iterator[tuple[str, ScoredUtterance]]:
        """Yields the scores of the one system. Without a text the source's transcript is the
        reference."""
        judge, embed = self._judges.transcribe, self._judges.embed
        source, target = read_audio(item.source, RATE), read_audio(item.target, RATE)
        text = item.text
        if text is None:
            text = judge(source, RATE) if judge is not None else ""
        wave, failure = wave_or_failure(item.audio, RATE, item.failure)
        scored = score_tts(
            item.id, text, wave, RATE, judge, embed, (target, RATE), failure, self._language,
            self._measures,
        )  # fmt: skip
        values = dict(scored.values)
        if embed is not None and "similarity" in values:
            to_source = similarity(embed(wave, RATE), embed(source, RATE))
            values["similarity_source"] = to_source
            values["similarity_gain"] = values["similarity"] - to_source
        audio = str(item.audio.resolve()) if item.audio is not None and wave.size else None
        for name in names:
            yield name, replace(scored, values=values, audio=audio)
