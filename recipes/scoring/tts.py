"""Scores synthesized speech: `python recipes/benchmark.py tts`."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from codec.audio import read_audio
from codec.io import sha256_of
from eval.benchmark import ScoredUtterance, score_tts
from eval.metrics import UNPAIRED
from recipes.scoring.judges import Judges, digest_of_voice, state_of_files
from recipes.scoring.lists import read_entries
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
from recipes.scoring.speaker_references import (
    SpeakerRecording,
    SpeakerReferences,
    check_speakers,
    read_speakers,
)
from recipes.scoring.systems import command_words, run_folder, run_lines, run_voice
from recipes.scoring.waves import (
    Entry,
    SystemList,
    given_list,
    located,
    score_lists,
    wave_or_failure,
)

PART = "tts"
VOICE_KEYS = ("id", "text", "prompt", "prompt_text")
"""Keys of a line of `slm tts --list`."""
FIELDS = (*VOICE_KEYS, "language", "out")
"""Fields of --run."""


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
    add_list_sources(
        add, "waves to score: JSON Lines (id, text, audio, perhaps prompt, failure, seed), or a "
        "folder of recordings with a .txt for each",
    )  # fmt: skip
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
    check_sources(args, "texts", ("voice", "run"))
    if args.speakers is not None and args.speaker is None:
        raise ValueError("--speakers needs a speaker encoder: --speaker")
    options = JudgeOptions.of(args)
    speakers = [] if args.speakers is None else read_speakers(args.speakers)
    lists = [given_list(args, one, ("id", "text", "audio")) for one in args.lists]
    if args.texts is not None:
        lists += synthesized(args)
    if args.speakers is not None:
        for each in lists:
            check_speakers(each.entries, speakers, args.speakers)
    score_lists(
        args, PART, lists, recorded, partial(item_of, prompts=args.prompts),
        partial(SpeechScorer, options, args.rate, tuple(args.measures), tuple(speakers)),
        options.load(), "prompt",
        f"{speakers} {state_of_files([one.audio for one in speakers])}",
        rate=args.rate, measures=sorted(args.measures),
    )  # fmt: skip


def synthesized(args: argparse.Namespace) -> list[SystemList]:
    """Returns what --voice and --run make of --texts."""
    entries = chosen(read_entries(args.texts, ("id", "text")), args)
    for entry in entries:
        prompt = located(entry, "prompt", args.texts, args.prompts)
        if prompt is not None and prompt.is_file():  # Else the name of a voice's own prompt.
            entry["prompt"] = str(prompt)
    name, found = args.list_name or list_name_of(args.texts), []

    def add(system: str, model: str, made: list[Entry]) -> None:
        found.append(SystemList(system, model, name, args.texts, made))

    for system, voice in map(named, args.voice):
        system = args.name or system
        lines = [{key: one[key] for key in VOICE_KEYS if one.get(key)} for one in entries]
        folder = run_folder(args.out, system, name)
        records = run_voice("tts", voice, lines, folder, "--seed", str(args.seed))
        made = [
            {**one, **{key: records[one["id"]][key] for key in ("audio", "failure", "seed")}}
            for one in entries
        ]
        add(system, digest_of_voice(voice), made)
    for system, command in map(named_command, args.run):
        system = args.name or system
        words = command_words(command, FIELDS, ("text", "out"))
        lines = [{"language": args.language, **one} for one in entries]
        made = run_lines(words, lines, run_folder(args.out, system, name), args.processes)
        add(system, args.model_digest or sha256_of(command, 16), made)
    return found


def recorded(entry: Entry) -> Entry | None:
    """Returns the entry of the recording of a text, if the list has it as `recording`."""
    if not entry.get("recording"):
        return None
    return {**entry, "audio": entry["recording"], "failure": None, "seed": None}


def item_of(entry: Mapping[str, Any], path: Path, prompts: Path | None) -> SpeechItem:
    """Returns an entry with its files located."""
    return SpeechItem(
        entry["id"], entry["text"], located(entry, "audio", path),
        located(entry, "prompt", path, prompts), entry.get("failure"), entry.get("seed"),
        None if entry.get("speaker") is None else str(entry["speaker"]),
    )  # fmt: skip


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
        wave, failure = wave_or_failure(item.audio, self._rate, item.failure)
        embed, prompt, missing = self._judges.embed, None, {}
        if embed is not None and item.prompt is not None:
            try:
                prompt = (read_audio(item.prompt, self._rate), self._rate)
            except ValueError as error:  # Perhaps the name of a voice's own prompt.
                missing = {"similarity": str(error)}
        scored = score_tts(
            item.id, item.text, wave, self._rate, self._judges.transcribe, embed, prompt, failure,
            self._language, self._measures,
        )  # fmt: skip
        values = dict(scored.values)
        if embed is not None and self._references is not None and wave.size and item.speaker:
            exclude = [item.prompt] if item.prompt is not None else []
            try:
                embedding = embed(wave, self._rate)
                values |= self._references.of(item.speaker, embedding, exclude)
            except ValueError as error:  # Too short.
                missing |= {"similarity_speaker": str(error)}
        audio = str(item.audio.resolve()) if item.audio is not None and wave.size else None
        missing = {**scored.missing, **missing}
        for name in names:
            yield name, replace(scored, values=values, missing=missing, seed=item.seed, audio=audio)
