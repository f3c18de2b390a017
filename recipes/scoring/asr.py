"""Scores transcripts of any system: `python recipes/benchmark.py asr`."""

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from codec.audio import read_audio
from codec.io import sha256_of
from eval.benchmark import ASR_PREFIX, ScoredUtterance, score_asr
from recipes.scoring.judges import digest_of_voice, load_judges, state_of_files
from recipes.scoring.lists import entry_name, locate, read_entries
from recipes.scoring.options import (
    Columns,
    ScoredSystem,
    add_list_sources,
    check_distinct,
    check_options,
    check_sources,
    chosen,
    list_name_of,
    list_options,
    named,
    named_command,
    origin_of,
    write_scores,
)
from recipes.scoring.scores import score_all
from recipes.scoring.systems import command_words, run_folder, run_lines

logger = logging.getLogger(__name__)

PART = "asr"
ASR_RATE = 16_000
"""Hz, of what a speech-to-text model of --model reads."""


class ListedAudio(NamedTuple):
    """A recording to transcribe, and its text."""

    id: str
    text: str
    audio: Path


class Transcripts(NamedTuple):
    """The transcripts of a list by one system."""

    system: str
    model: str
    """Digest of the system; "": unknown."""
    list_name: str
    file: Path
    scored: list[ScoredUtterance]
    entries: Mapping[str, Mapping[str, Any]]
    """The list's own columns by utterance."""


def add_asr_command(kinds: Any) -> None:
    """Adds `asr` to the subparsers of benchmark.py."""
    about = "transcripts of any system"
    command = kinds.add_parser(
        PART, parents=[list_options()], help=about, description=about.capitalize()
    )
    add = command.add_argument
    add_list_sources(
        add, "transcripts to score: JSON Lines (id, text, hypothesis), or what `slm asr` prints, "
        "with --references",
    )  # fmt: skip
    add("--references", type=Path, help="list of audio or id, and text")
    add(
        "--recordings", type=Path, metavar="LIST",
        help="recordings to transcribe: JSON Lines (id, audio, text), or a folder of recordings "
        "with a .txt for each",
    )  # fmt: skip
    add(
        "--voice", action="append", default=[], metavar="[SYSTEM=]DIR",
        help="with --recordings: voice that transcribes; with one --list: its voice; repeatable",
    )  # fmt: skip
    add(
        "--slm", action="append", default=[], metavar="[SYSTEM=]DIR",
        help="with --recordings and --codec: LLM that `slm export` wrote; repeatable",
    )  # fmt: skip
    add("--codec", help="codec of --slm: folder or hub id")
    add(
        "--model", action="append", default=[], metavar="[SYSTEM=]MODEL",
        help="with --recordings: speech-to-text model, as --judge of the other parts; repeatable",
    )  # fmt: skip
    add(
        "--run", action="append", default=[], metavar="[SYSTEM=]COMMAND",
        help="with --recordings: command for each; {audio}, {language} and {id} are replaced, and "
        "its standard output is the transcript; repeatable",
    )  # fmt: skip
    add("--threads", type=int, help="of each process (default: the cores' share)")


def benchmark_asr(args: argparse.Namespace) -> None:
    """Scores the systems of the command line.

    Raises:
        ValueError: a list or option is invalid, a text or transcript is missing, or no recording
            can be scored.
    """
    check_options(args)
    check_sources(args, "recordings", ("voice", "slm", "model", "run"))
    if args.slm and args.codec is None:
        raise ValueError("--slm needs the codec that it was trained on: --codec")
    columns = Columns(args)
    made = [listed(args, one) for one in args.lists]
    if args.recordings is not None:
        made += transcribed(args)
    check_distinct((each.system, each.list_name) for each in made)
    found = []
    for each in made:
        inputs = [each.file] if each.file.is_file() else []
        if args.references is not None:
            inputs.append(args.references)
        origin = origin_of(args, PART, each.system, inputs, model=each.model)
        found.append(
            ScoredSystem(
                list_name=each.list_name, scored=each.scored, origin=origin, constants={},
                columns=columns.of(each.scored, each.entries, each.list_name),
                references={one.id: one.audio for one in each.scored}, prefix=ASR_PREFIX,
            )
        )  # fmt: skip
    write_scores(PART, args, found)


def listed(args: argparse.Namespace, argument: str) -> Transcripts:
    """Returns the transcripts of --list; what is not in the list has lost its words.

    Raises:
        ValueError: a text or transcript is missing.
    """
    name, value = named(argument)
    path = Path(value)
    entries = {entry_name(entry, path): entry for entry in read_entries(path, ("text",))}
    if args.references is None:
        pairs = {name: (one["text"], one.get("hypothesis")) for name, one in entries.items()}
        lacking = [name for name, one in entries.items() if "hypothesis" not in one]
        if lacking:
            raise ValueError(
                f"{path}: {lacking[0]} has no hypothesis; --references names a list with the texts"
            )
    else:
        texts = {
            entry_name(entry, args.references): entry["text"]
            for entry in read_entries(args.references, ("text",))
        }
        foreign = [name for name in entries if name not in texts]
        if foreign:
            raise ValueError(f"{args.references}: has no text for {foreign[0]}")
        pairs = {name: (text, _hypothesis(entries.get(name))) for name, text in texts.items()}
    pairs = dict(chosen(list(pairs.items()), args))
    missing = sum(hypothesis is None for _, hypothesis in pairs.values())
    if missing:
        logger.warning("%d of %d have no transcript: deletions", missing, len(pairs))
    scored = [
        score_asr(name, text, hypothesis or "", args.language)
        for name, (text, hypothesis) in pairs.items()
    ]
    system = args.name or name
    model = digest_of_voice(args.voice[0]) if args.voice else args.model_digest
    own = {one.id: entries.get(one.id, {}) for one in scored}
    return Transcripts(system, model, args.list_name or list_name_of(path), path, scored, own)


def _hypothesis(entry: dict[str, Any] | None) -> str | None:
    return None if entry is None else entry.get("hypothesis", entry["text"])


def transcribed(args: argparse.Namespace) -> list[Transcripts]:
    """Returns the transcripts of --recordings by each system, which are kept in OUT."""
    listed = read_entries(args.recordings, ("text", "audio"))
    entries = {entry_name(one, args.recordings): one for one in chosen(listed, args)}
    items = [
        ListedAudio(name, one["text"], locate(one["audio"], args.recordings))
        for name, one in entries.items()
    ]
    list_name = args.list_name or list_name_of(args.recordings)
    state = f"{state_of_files([item.audio for item in items])} {[item.text for item in items]}"
    found: list[Transcripts] = []

    def add(system: str, model: str, scored: list[ScoredUtterance]) -> None:
        found.append(Transcripts(system, model, list_name, args.recordings, scored, entries))

    for kind in ("voice", "slm", "model"):
        for system, source in map(named, getattr(args, kind)):
            system = args.name or system
            options = TranscriberOptions(
                kind=kind, source=source, codec=args.codec, threads=args.threads,
                language=args.language,
            )  # fmt: skip
            model = options.digest()
            keys = {system: f"{state} {kind} {model} {args.language}"}
            make = partial(RecordingScorer, options)
            add(system, model, score_all(args.out, items, keys, make, args.processes)[system])
    for system, command in map(named_command, args.run):
        system = args.name or system
        words = command_words(command, ("audio", "id", "language"), ("audio",))
        lines = [
            {"id": item.id, "audio": str(item.audio), "language": args.language} for item in items
        ]
        folder = run_folder(args.out, system, list_name)
        made = run_lines(words, lines, folder, args.processes)
        scored = [
            scored_transcript(item, one["hypothesis"], one["failure"], args.language)
            for item, one in zip(items, made, strict=True)
        ]
        add(system, args.model_digest or sha256_of(command, 16), scored)
    return found


def scored_transcript(
    item: ListedAudio, hypothesis: str | None, failure: str | None, language: str
) -> ScoredUtterance:
    """Returns the scores of a transcript. All words are deletions where the system has failed."""
    scored = score_asr(item.id, item.text, hypothesis or "", language)
    audio = str(item.audio.resolve()) if item.audio.is_file() else None
    values = {"failure": float(failure is not None)}
    return replace(scored, values=values, audio=audio, failure=failure)


@dataclass(frozen=True, kw_only=True, slots=True)
class TranscriberOptions:
    """A system that transcribes, not loaded yet."""

    kind: str
    """voice, slm or model."""
    source: str
    """Folder or hub id."""
    codec: str | None
    threads: int
    language: str

    def digest(self) -> str:
        """Returns a digest of its weights."""
        if self.kind == "voice":
            return digest_of_voice(self.source)
        if self.kind == "model":
            return load_judges(self.source, None, language=self.language).judge_name
        from codec import load_codec

        assert self.codec is not None
        files = [sha256_of(file, 16) for file in sorted(Path(self.source).glob("*.safetensors"))]
        return sha256_of(" ".join([*files, load_codec(self.codec).stamp.digest]), 16)

    def load(self) -> Callable[[Path], str]:
        """Returns a recording's path to its transcript.

        Raises:
            ValueError: the system cannot be loaded.
        """
        import torch

        torch.set_num_threads(self.threads)
        if self.kind == "model":
            judges = load_judges(
                self.source, None, num_threads=self.threads, language=self.language
            )
            judge = judges.transcribe
            assert judge is not None
            return lambda path: judge(read_audio(path, ASR_RATE), ASR_RATE)
        if self.kind == "voice":
            from slm import Voice

            voice = Voice.from_pretrained(self.source)
            return lambda path: voice.transcribe_file(path).text
        from codec import load_codec
        from slm.export.causal_lm import load_export
        from slm.generation.asr import audible_pieces, join_transcripts, transcribe
        from slm.generation.asr import transcribe_pieces as in_pieces

        assert self.codec is not None
        codec, lm = load_codec(self.codec), load_export(self.source)
        lm.vocabulary.check_codec(codec.stamp, self.codec)
        longest = round(MAX_PIECE_SECONDS * codec.sample_rate)

        def transcript(path: Path) -> str:
            pieces = audible_pieces([read_audio(path, codec.sample_rate)], longest)
            return join_transcripts(in_pieces(codec, pieces, partial(transcribe, lm))).text

        return transcript


MAX_PIECE_SECONDS = 15.0
"""Maximum length of what an exported LLM transcribes at once; it has no record of its training
data's lengths."""


class RecordingScorer:
    """Transcribes a recording with a system, and scores the transcript."""

    def __init__(self, options: TranscriberOptions):
        self._transcribe = options.load()
        self._language = options.language

    def __call__(
        self, item: ListedAudio, names: Sequence[str]
    ) -> Iterator[tuple[str, ScoredUtterance]]:
        """Yields the scores of the one system. A recording that is missing, or that the system
        refuses, is a failure."""
        hypothesis, failure = None, None
        try:
            hypothesis = self._transcribe(item.audio)
        except (ValueError, OSError) as error:
            failure = str(error)
        scored = scored_transcript(item, hypothesis, failure, self._language)
        for name in names:
            yield name, scored
