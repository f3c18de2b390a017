"""Listening tests: the page of a test (MUSHRA, MOS, SMOS), and the ratings that it saves.

    python recipes/benchmark.py report OUT --listening FILE --kind mushra
    python recipes/benchmark.py ratings FILES... --out OUT

The page names no system: its samples have keys, whose meaning lies in OUT/listening/TEST.jsonl.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from codec.audio import audio_info, resample_wave
from codec.io import atomic_file, parse_json, path_of_id, sha256_of
from codec.json_lines import read_json_lines, write_json_lines
from codec.program import counted
from codec.training.run import git_revision
from eval.benchmark import Row, machine, table
from eval.stats import crossed_interval
from recipes.lib.run import finished
from recipes.scoring.clips import ClipSet, audio_file, choose_clips, data_uri, read_at
from recipes.scoring.judges import safe_name
from recipes.scoring.page import html_page
from recipes.scoring.results import ANCHOR, Results
from recipes.scoring.rows import ORIGINAL, append_rows, read_rows

logger = logging.getLogger(__name__)

KINDS = {
    "mushra": "MUSHRA (ITU-R BS.1534-3): quality from 0 to 100, with hidden reference and anchor",
    "mos": "mean opinion score (ITU-T P.800): naturalness from 1 to 5",
    "smos": "similarity of the voice to the prompt, target or original, from 1 to 5",
}
RANGES = {"mushra": (0, 100), "mos": (1, 5), "smos": (1, 5)}
ANCHOR_RATE = 7_700
"""Resampling to this rate is the anchor's low-pass filter: flat up to 3.5 kHz."""
MAX_RATE = 48_000
REFERENCE_SCORE, REFERENCE_SHARE = 90, 0.15
"""ITU-R BS.1534-3, 4.1.2: raters are left out who rate the hidden reference below 90 in more than
15 % of the trials."""
INSTRUCTIONS = {
    "mushra": (
        "Compare each sample with the reference. One of the samples is the reference itself: give "
        "it 100. Another one is a version of low quality. You may play everything as often as you "
        "like."
    ),
    "mos": "Rate how natural and clear each sample of speech is, from 1 (bad) to 5 (excellent).",
    "smos": (
        "Compare the voice of each sample with the voice of the reference, whatever the words and "
        "the sound quality."
    ),
}


class Stimulus(NamedTuple):
    """A sample of a test and its origin: a line of OUT/listening/TEST.jsonl."""

    kind: str
    trial: str
    stimulus: str
    part: str
    list: str
    id: str
    system: str
    seed: int


class Trial(NamedTuple):
    """What is rated together."""

    clip_set: ClipSet
    reference: Path | None
    """What a rater compares with."""
    samples: dict[str, Path | None]
    """Recording by system; None: the anchor, made of the reference."""


def add_ratings_command(kinds: Any) -> None:
    """Adds `ratings` to the subparsers of benchmark.py."""
    about = "answers that the page of a listening test saved"
    command = kinds.add_parser("ratings", help=about, description=f"Scores {about}.")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="answers of raters")
    command.add_argument(
        "--out", type=Path, required=True, help="the first folder of `report --listening`"
    )


def write_listening_page(results: Results, args: argparse.Namespace) -> None:
    """Writes the page of a listening test, and the meaning of its keys to OUT/listening/.

    Raises:
        ValueError: there are no clips for the test, or clips of several parts.
    """
    trials = _trials(results, args)
    files = sorted({path for trial in trials for path in (trial.reference, *trial.samples.values())
                    if path is not None})  # fmt: skip
    # Nobody without the recordings can find out which key a system has.
    named = [[trial.clip_set[:3], [*trial.samples]] for trial in trials]
    secret = sha256_of(
        f"{args.test_kind} {args.seed} {[sha256_of(path) for path in files]} {named}"
    )
    test = sha256_of(secret, 12)
    audio: list[str] = []
    shown: list[dict[str, Any]] = []
    stimuli: list[Stimulus] = []
    for trial in trials:
        clip_set = trial.clip_set
        key = sha256_of(f"{secret} {clip_set[:3]} {[*trial.samples]}", 16)
        waves, rate = _waves(trial)
        keys = {sha256_of(f"{secret} {key} {name}", 16): name for name in trial.samples}
        entry: dict[str, Any] = {"key": key, "text": _text(clip_set), "reference": None}
        if trial.reference is not None:
            entry["reference"] = len(audio)
            audio.append(_embedded(waves[None], rate, key))
        entry["stimuli"] = []
        for stimulus, name in sorted(keys.items()):
            entry["stimuli"].append({"key": stimulus, "audio": len(audio)})
            audio.append(_embedded(waves[name], rate, stimulus))
            stimuli.append(Stimulus(args.test_kind, key, stimulus, clip_set.part, clip_set.list,
                                    clip_set.id, name, args.seed))  # fmt: skip
        shown.append(entry)
    shown.sort(key=lambda entry: entry["key"])
    write_json_lines(_key_file(args.outs[0], test), [stimulus._asdict() for stimulus in stimuli])
    content = {"test": test, "kind": args.test_kind, "trials": shown, "audio": audio}
    stored = json.dumps(content).replace("<", "\\u003c")
    heading = "Listening test"
    body = (
        f"<main><h1>{heading}</h1><p>{escape(INSTRUCTIONS[args.test_kind])} Use headphones in a "
        "quiet room. Answers stay in this browser until you save them as a file.</p>"
        '<div id="trial"><noscript><p>This test needs JavaScript.</p></noscript></div></main>'
    )
    data = f'<script type="application/json" id="test">{stored}</script>\n'
    with atomic_file(args.listening) as temporary:
        page = html_page(heading, body, "listening.js", data)
        temporary.write_text(page, encoding="utf-8")
    command = f"python recipes/benchmark.py ratings FILES... --out {args.outs[0]}"
    finished(f"a test of {counted(len(stimuli), 'sample')}", args.listening, command)


def _trials(results: Results, args: argparse.Namespace) -> list[Trial]:
    parts: dict[str, list[Trial]] = {}
    for clip_set in choose_clips(results.clips, args.clips, args.seed):
        own = _trials_of(clip_set, args.test_kind)
        if own and args.part in (None, clip_set.part):
            parts.setdefault(clip_set.part, []).extend(own)
    if len(parts) > 1:
        raise ValueError(f"clips of {', '.join(parts)}: choose one with --part")
    if not parts:
        needed = {"mushra": "audio of systems and of the original recordings", "mos": "audio",
                  "smos": "audio of systems and of prompts, targets or originals"}  # fmt: skip
        raise ValueError(
            f"--kind {args.test_kind}: clips.jsonl has no clips with {needed[args.test_kind]}"
            + (f" of the part {args.part}" if args.part else "")
        )
    return next(iter(parts.values()))


def _trials_of(clip_set: ClipSet, kind: str) -> list[Trial]:
    """Returns the trials of an utterance; none if it lacks the reference."""
    audible = {name: clip.audio for name, clip in clip_set.clips.items() if clip.audio is not None}
    if kind == "mos":
        return [Trial(clip_set, None, {name: path}) for name, path in audible.items()]
    if kind == "smos":
        pairs = [(name, path, clip_set.clips[name].reference_audio)
                 for name, path in audible.items()]  # fmt: skip
        return [Trial(clip_set, reference, {name: path}) for name, path, reference in pairs
                if reference is not None and reference != path]  # fmt: skip
    reference = _original(clip_set)
    systems: dict[str, Path | None] = {k: v for k, v in audible.items() if k != ORIGINAL}
    if reference is None or not systems:
        return []
    return [Trial(clip_set, reference, {ORIGINAL: reference, ANCHOR: None, **systems})]


def _original(clip_set: ClipSet) -> Path | None:
    """Returns the recording of the same words by the same voice."""
    if ORIGINAL in clip_set.clips:
        return clip_set.clips[ORIGINAL].audio
    if clip_set.part not in ("reconstruction", ""):
        return None
    return next(iter(clip_set.clips.values())).reference_audio


def _text(clip_set: ClipSet) -> str:
    return next((clip.text for clip in clip_set.clips.values() if clip.text), "")


def _waves(trial: Trial) -> tuple[dict[str | None, np.ndarray], int]:
    """Returns the waves of the samples, and under None that of the reference, at one rate."""
    paths = {name: path for name, path in (*trial.samples.items(), (None, trial.reference))
             if path is not None}  # fmt: skip
    rate = min(MAX_RATE, max(audio_info(path).sample_rate for path in paths.values()))
    waves = {name: read_at(path, rate) for name, path in paths.items()}
    if ANCHOR in trial.samples:
        waves[ANCHOR] = low_pass(waves[None], rate)
    return waves, rate


def low_pass(wave: Float[np.ndarray, " S"], sample_rate: int) -> Float[np.ndarray, " S"]:
    """Returns a wave (S,) without what is above 3.5 kHz: the low anchor of MUSHRA."""
    narrow = resample_wave(wave, sample_rate, ANCHOR_RATE)
    wide = resample_wave(narrow, ANCHOR_RATE, sample_rate)[: wave.size]
    return np.pad(wide, (0, wave.size - wide.size))


def _embedded(wave: Float[np.ndarray, " S"], sample_rate: int, key: str) -> str:
    """Returns a sample as lossless audio, with a dither of one bit of its own: the hidden reference
    has other bytes than the reference."""
    random = np.random.default_rng(int(key, 16))
    dither = random.integers(-1, 2, wave.size).astype(np.float32) / 32_768
    return data_uri(audio_file(wave + dither, sample_rate, ".flac"), ".flac")


def _key_file(out: Path, test: str) -> Path:
    return path_of_id(out / "listening", test, ".jsonl")


class Answers(NamedTuple):
    """A checked file of a rater."""

    test: str
    rater: str
    saved: str
    scores: dict[str, float]
    """By the key of the sample."""
    record: dict[str, Any]


def score_ratings(args: argparse.Namespace) -> None:
    """Reads the answers of raters into OUT/listening/TEST/, and adds rows of all that are there.

    Raises:
        ValueError: a file has no answers of a test of OUT, or they are incomplete.
    """
    tests: dict[str, dict[str, Stimulus]] = {}
    given: dict[tuple[str, str], Answers] = {}
    for path in args.files:
        found = read_answers(path, args.out, tests)
        other = given.setdefault((found.test, found.rater), found)
        if other.scores != found.scores:
            raise ValueError(
                f"{path}: rater {found.rater} has other answers in another file; give one of them"
            )
    for (test, rater), answers in given.items():
        stored = path_of_id(args.out / "listening" / test, safe_name(rater), ".json")
        if stored.exists() and read_answers(stored, args.out, tests).saved > answers.saved:
            logger.warning("%s: newer answers of rater %s are stored", test, rater)
            continue
        stored.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(stored) as temporary:
            temporary.write_text(json.dumps(answers.record) + "\n", encoding="utf-8")
    known = {_key(row): (row.value, row.n) for row in read_rows(args.out / "rows.jsonl")}
    count = 0
    for test in dict.fromkeys(test for test, _ in given):
        files = sorted((args.out / "listening" / test).glob("*.json"))
        answers = [read_answers(path, args.out, tests) for path in files]
        rows = rows_of_test(test, tests[test], answers)
        new = [row for row in rows if known.get(_key(row)) != (row.value, row.n)]
        append_rows(args.out / "rows.jsonl", new)
        print(table(rows))
        count += len(answers)
    again = f"python recipes/benchmark.py report {args.out} --html report.html"
    finished(f"ratings of {counted(count, 'rater')}", args.out / "rows.jsonl", again)


def _key(row: Row) -> tuple[Any, ...]:
    return row.part, row.list, row.system, row.utterance, row.metric, row.library


def read_answers(path: Path, out: Path, tests: dict[str, dict[str, Stimulus]]) -> Answers:
    """Returns the answers of a file.

    Args:
        out: the folder with listening/TEST.jsonl.
        tests: the samples of tests by key; those of the file's test are added.

    Raises:
        ValueError: the file is no answers, is of another test, or lacks a score or has a wrong one.
    """
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        test, rater, saved = (str(record[key]) for key in ("test", "rater", "saved"))
        scores = {str(one["stimulus"]): float(one["score"]) for one in record["answers"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: no answers of a listening test ({error})") from error
    if not rater.strip():
        raise ValueError(f"{path}: the rater has no name")
    if test not in tests:
        keys = _key_file(out, test)
        if not keys.is_file():
            raise ValueError(f"{path}: {out} has no test {test}; --out names the first folder of "
                             "`report --listening`")  # fmt: skip
        lines = [Stimulus(**line.value) for line in read_json_lines(keys)]
        tests[test] = {line.stimulus: line for line in lines}
    stimuli = tests[test]
    lacking = len(stimuli.keys() - scores.keys())
    if lacking:
        raise ValueError(
            f"{path}: rater {rater} has no score of {lacking} of {len(stimuli)} samples"
        )
    if scores.keys() - stimuli.keys():
        raise ValueError(f"{path}: has scores of unknown samples")
    low, high = RANGES[next(iter(stimuli.values())).kind]
    wrong = [score for score in scores.values() if not low <= score <= high]
    if wrong:
        raise ValueError(f"{path}: a score of {wrong[0]:g}; it must be {low} to {high}")
    return Answers(test, rater, saved, scores, record)


def rows_of_test(
    test: str, stimuli: Mapping[str, Stimulus], answers: Sequence[Answers]
) -> list[Row]:
    """Returns rows of the mean scores: of every utterance, and of each list and system, with the
    ends of its 95 % interval and the number of raters.

    Raises:
        ValueError: post-screening leaves no rater.
    """
    kept = [one for one in answers if not _is_screened_out(stimuli, one)]
    left_out = sorted({one.rater for one in answers} - {one.rater for one in kept})
    if left_out:
        logger.warning(
            "left out, as they rate the hidden reference below %d in more than %.0f %% of the "
            "trials (ITU-R BS.1534-3): %s",
            REFERENCE_SCORE, 100 * REFERENCE_SHARE, ", ".join(left_out),
        )  # fmt: skip
    if not kept:
        raise ValueError(f"test {test}: post-screening leaves no rater")
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for key, stimulus in stimuli.items():
        own = groups.setdefault((stimulus.list, stimulus.system), {})
        own[stimulus.id] = [one.scores[key] for one in kept]
    first = next(iter(stimuli.values()))
    plain = Row(
        part="ratings", system="", list="", utterance=None, metric=first.kind, value=0.0, n=0,
        seed=first.seed, git=git_revision(), config=test, model="",
        library=f"listening test {test}", machine=machine(),
    )  # fmt: skip
    rows: list[Row] = []
    for (list_name, system), utterances in groups.items():
        own = replace(plain, list=list_name, system=system)
        scores = np.array([*utterances.values()]).T  # (raters, utterances)
        means = zip(utterances, scores.mean(axis=0).tolist(), strict=True)
        rows += [replace(own, utterance=name, value=mean, n=len(kept)) for name, mean in means]
        value, low, high = crossed_interval(scores)
        ends = {"": value, "_low": low, "_high": high, "_raters": float(len(kept))}
        rows += [replace(own, metric=first.kind + end, value=number, n=scores.shape[1])
                 for end, number in ends.items() if number is not None]  # fmt: skip
    return rows


def _is_screened_out(stimuli: Mapping[str, Stimulus], answers: Answers) -> bool:
    references = [answers.scores[key] for key, one in stimuli.items()
                  if one.kind == "mushra" and one.system == ORIGINAL]  # fmt: skip
    below = sum(score < REFERENCE_SCORE for score in references)
    return below > REFERENCE_SHARE * len(references)
