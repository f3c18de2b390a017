"""The command `slm`: tts, asr, vc, continue and export."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codec.json_lines import to_json_line
from codec.program import CHECKS_FAILED, ArgumentParser, run_program
from slm.config import CHECKS, SamplingConfig, check_seed

if TYPE_CHECKING:
    from slm.export.voice_folder import VoiceSummary
    from slm.voice import Voice

logger = logging.getLogger("slm")

SAMPLING = (
    "greedy", "temperature", "top_p", "top_k", "num_candidates", "max_attempts", "checks",
)  # fmt: skip
"""Options that are fields of SamplingConfig; the others stay as the voice has them."""
STATUSES = (
    "exit status: 0 done; 2 user error; 3 done, but a result has a failure or an input was "
    "skipped; 1 internal error; 130 interrupted"
)
"""Ends the help of each command."""


def main(argv: list[str] | None = None) -> None:
    """Runs a command line; returns when it is done, exits with codec/program.py's status if not."""

    def command() -> None:
        arguments = _parser().parse_args(argv)
        form = "%(levelname)s %(message)s"
        logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        arguments.run(arguments)

    run_program(command)


def _parser() -> ArgumentParser:
    about = "TTS, ASR and voice conversion with a voice."
    parser = ArgumentParser(prog="slm", description=about, epilog=STATUSES)
    commands = parser.add_subparsers(required=True, metavar="tts|asr|vc|continue|export")
    tts = commands.add_parser("tts", help="zero-shot TTS: a text and a prompt to speech")
    asr = commands.add_parser("asr", help="recordings to transcripts, one JSON line each")
    vc = commands.add_parser("vc", help="voice conversion: a recording with another speaker")
    continuation = commands.add_parser("continue", help="continue a recording without a text")
    export = commands.add_parser("export", help="write the LLM as a causal LM of transformers")
    runs = (
        (tts, _tts), (asr, _asr), (vc, _vc), (continuation, _continue), (export, _export),
    )  # fmt: skip
    for command, run in runs:
        command.set_defaults(run=run)
        command.epilog = STATUSES
        add = command.add_argument
        add("--voice", required=True, help="voice: folder or hub id")
        add("--base", help="folder or hub id of the voice's text LLM, if it has moved")
        add("--device", default="cpu", help="cpu or cuda")
        add(
            "--dtype", choices=("float32", "bfloat16"), default="float32",
            help="dtype of the weights of LLM and NAR",
        )  # fmt: skip
    consent = "use a person's recording only with their consent"
    prompt_help = (
        f"prompt: a recording with speech (a file or a pipe), or a shipped prompt's name; {consent}"
    )

    add = tts.add_argument
    add(
        "--text",
        help='text, of any length; a blank line or <break time="0.5s"/> is a pause, '
        "[word](respelling) a pronunciation",
    )  # fmt: skip
    add("--prompt", help=prompt_help)
    add(
        "--prompt-text", metavar="TEXT",
        help="transcript of the prompt; default: by the voice's own ASR, which also transcribes a "
        "prompt that is truncated",
    )  # fmt: skip
    add(
        "--lexicon", metavar="FILE",
        help="pronunciations: lines of a word, a tab and its respelling",
    )  # fmt: skip
    add("--list", metavar="JSONL", help="lines with id, text, prompt and optional prompt_text")
    add("--out", help="output file, such as .wav; with --list a folder")
    add(
        "--stream", metavar="WAV",
        help="stream to this .wav file or named pipe instead of --out; -: standard output",
    )  # fmt: skip
    add(
        "--chunk-seconds", type=float, default=0.5, metavar="S",
        help="length of a chunk of --stream, in seconds (default 0.5)",
    )  # fmt: skip
    add(
        "--candidates", type=int, metavar="N", dest="num_candidates",
        help="best-of-N: generate N candidates per text and keep the one that the model's own ASR "
        "scores best (likelihood of the text; with interleaved sequences the CER of its "
        "transcript); N times the work",
    )  # fmt: skip
    add("--max-attempts", type=int, metavar="N", help="maximum attempts per item")
    add("--tries", type=int, dest="max_attempts", help=argparse.SUPPRESS)
    add(
        "--checks", type=_checks, metavar="NAMES",
        help=f"checks that trigger a retry: some of {','.join(CHECKS)}, or none; early, leak "
        "and mismatch transcribe the result if the voice has ASR, for up to half of the AR's time",
    )  # fmt: skip

    for command in (tts, asr):
        command.add_argument(
            "--batch", type=int, default=8, metavar="N", help="batch size (default 8)"
        )
    asr.add_argument(
        "recordings", nargs="+", metavar="REC",
        help="recordings of any length; one without speech has the failure empty",
    )  # fmt: skip

    add = vc.add_argument
    add("--source", help="recording to convert, of any length")
    add(
        "--target",
        help=f"target speaker: a recording, or a shipped prompt's name; {consent}",
    )  # fmt: skip
    add(
        "--source-text", metavar="TEXT",
        help="transcript of the source, for a NAR that takes texts; default: by the voice's own "
        "ASR, which also transcribes a long source",
    )  # fmt: skip
    add("--target-text", metavar="TEXT", help="transcript of the target; default: as above")
    add(
        "--list", metavar="JSONL",
        help="lines with id, source, target and optional source_text and target_text",
    )  # fmt: skip
    add("--out", required=True, help="output file, such as .wav; with --list a folder")

    add = continuation.add_argument
    add("--prompt", required=True, help=prompt_help)
    add(
        "--seconds", type=float, required=True, metavar="S",
        help="maximum length of the continuation, in seconds",
    )  # fmt: skip
    add("--out", required=True, help="output file of the continuation, such as .wav")

    for command in (tts, continuation):
        add = command.add_argument
        add("--seed", type=int, default=0, help="random seed (default 0)")
        add(
            "--greedy", action="store_true", default=None,
            help="greedy decoding; retries sample all the same",
        )  # fmt: skip
        add(
            "--temperature", type=float, metavar="T",
            help="softmax temperature (default: the voice's); lower is less random",
        )  # fmt: skip
        add(
            "--top-p", type=float, metavar="P",
            help="nucleus sampling: smallest set of tokens with total probability P",
        )  # fmt: skip
        add("--top-k", type=int, metavar="K", help="maximum size of the nucleus")

    export.add_argument("out", metavar="OUT", help="a new folder, or that of an earlier export")
    return parser


def _checks(names: str) -> tuple[str, ...]:
    return () if names == "none" else tuple(names.split(","))


def _load(arguments: argparse.Namespace, **sampling: Any) -> "Voice":
    """The voice, with these fields of its sampling configuration changed."""
    import torch

    from slm.voice import Voice

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    voice = Voice.from_pretrained(
        arguments.voice, base=arguments.base, device=arguments.device, dtype=dtype
    )
    voice.sampling = replace(voice.sampling, **sampling)
    return voice


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingConfig that were given. Raises ValueError for a bad value."""
    values = {name: getattr(arguments, name, None) for name in SAMPLING}
    given = {name: value for name, value in values.items() if value is not None}
    SamplingConfig(**given)
    return given


def _check_numbers(arguments: argparse.Namespace) -> None:
    if getattr(arguments, "batch", 1) < 1:
        raise ValueError(f"--batch must be at least 1, got {arguments.batch}")
    check_seed(getattr(arguments, "seed", 0), "--seed")
    for name in ("chunk_seconds", "seconds"):
        if not 0 < getattr(arguments, name, 1.0) < inf:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} must be positive and finite, got {getattr(arguments, name)}"
            )


def _check_place(target: str, *, is_folder: bool = False) -> None:
    """Raises ValueError where nothing can be written; missing folders are created later."""
    place = Path(target) if is_folder else Path(target).parent
    if is_folder and place.is_file():
        raise ValueError(f"{target}: is a file; name a folder")
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{target}: {place} is no folder; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{target}: {place} may not be written to; choose another place")


def _check_prompt(summary: "VoiceSummary", name: str) -> None:
    """Raises ValueError for a name that is neither a recording nor a shipped prompt."""
    from slm.batch_tts import prompt_source

    prompt_source(summary.prompts, name, Path())


def _check_recording(path: str) -> None:
    if not Path(path).exists():
        raise ValueError(f"{path}: no such recording")


def _tts(arguments: argparse.Namespace) -> None:
    from codec.io import FileLock
    from slm.batch_tts import (
        Throughput,
        check_line,
        check_list,
        prepare_line,
        read_tts_list,
        result,
        synthesize_list,
    )
    from slm.tokenization.markup import load_lexicon
    from slm.voice import check_name

    _check_tts_flags(arguments)
    target = arguments.stream if arguments.out is None else arguments.out
    listed = Path(arguments.list) if arguments.list else None
    entries = read_tts_list(listed) if listed is not None else []
    if target != "-":
        _check_place(target, is_folder=listed is not None)
    if listed is None and target != "-":
        check_name(target)
    sampling = _sampling(arguments)
    lexicon = load_lexicon(arguments.lexicon) if arguments.lexicon else {}
    summary = _check_tts_of(arguments)
    if listed is not None:
        checked = check_list(entries, summary, listed)
        out = Path(target)
        try:
            voice = _load(arguments, **sampling)
            voice.lexicon = lexicon
            with FileLock(out):
                num_failed = synthesize_list(
                    voice, checked, listed, out, seed=arguments.seed, batch=arguments.batch
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command continues") from None
        _end(failed=num_failed > 0)
        return
    line = {"text": arguments.text, "prompt": arguments.prompt}
    if arguments.prompt_text is not None:
        line["prompt_text"] = arguments.prompt_text
    check_line(line, summary, Path(), ("--text", "--prompt-text"))
    voice = _load(arguments, **sampling)
    voice.lexicon = lexicon
    text = prepare_line(voice, line, Path(), arguments.seed)
    if arguments.stream is not None:
        failures: list[str] = []
        waves = voice.stream_prepared(text, arguments.chunk_seconds, failures)
        tags = voice.tags(arguments.seed)
        _stream(arguments.stream, waves, voice.codec.sample_rate, tags)
        _end(failed=bool(failures))
        return
    throughput = Throughput()
    (speech,) = throughput.synthesize(voice, [text], arguments.batch)
    voice.save(speech, target)
    logger.info("%s", throughput)
    _print(result(target, arguments.prompt, speech))
    _end(failed=speech.failure is not None)


def _end(*, failed: bool) -> None:
    """Exits with the status of a failure that the output states, if there is one."""
    if failed:
        raise SystemExit(CHECKS_FAILED)


def _check_tts_flags(arguments: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    if arguments.list is None and None in (arguments.text, arguments.prompt):
        raise ValueError("give --text and --prompt, or --list")
    if arguments.list is not None and (arguments.text or arguments.prompt):
        raise ValueError("give either --text and --prompt, or --list, not both")
    if (arguments.out is None) == (arguments.stream is None):
        raise ValueError("give either --out or --stream")
    if arguments.stream is not None and arguments.list is not None:
        raise ValueError("--stream is for --text; a list goes to a folder (--out)")
    if arguments.stream is not None and arguments.num_candidates not in (None, 1):
        raise ValueError("--stream has no --candidates: a chunk that was sent cannot be replaced")
    if arguments.stream not in (None, "-") and Path(arguments.stream).suffix.lower() != ".wav":
        raise ValueError(f"--stream {arguments.stream}: only WAV is streamed; call it .wav, or -")
    if arguments.stream == "-" and sys.stdout.isatty():
        raise ValueError("--stream - writes sound; pipe it to a player, such as `| aplay`")
    _check_numbers(arguments)


def _check_tts_of(arguments: argparse.Namespace) -> "VoiceSummary":
    """The summary of the voice. Raises ValueError for options that it does not support."""
    from slm.export.voice_folder import VoiceSummary

    summary = VoiceSummary.read(arguments.voice)
    summary.check_task("tts")
    if (arguments.num_candidates or 1) > 1 and summary.tasks.get("asr", 1.0) == 0:
        raise ValueError(
            "--candidates: they are compared by the voice's own ASR, but it was trained without asr"
        )
    return summary


def _stream(
    target: str, waves: Iterable[np.ndarray], sample_rate: int, tags: Mapping[str, str]
) -> None:
    """Writes a WAV file, a named pipe or standard output while the waves are generated."""
    from codec.io import atomic_file
    from slm.generation.streaming import write_wav

    started, count = time.monotonic(), 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal count
        for wave in waves:
            if not count and len(wave):
                logger.info("first chunk after %.2f s", time.monotonic() - started)
            count += len(wave)
            yield wave
        seconds = time.monotonic() - started
        logger.info("%.2f s of speech in %.2f s", count / sample_rate, seconds)

    if target != "-":
        path = Path(target)
        is_pipe = path.exists() and not path.is_file()
        # After an error an earlier file is unchanged.
        opened = nullcontext(path) if is_pipe else atomic_file(path)
        with opened as place, open(place, "wb") as file:
            write_wav(file, counted(), sample_rate, tags)
        return
    try:
        write_wav(sys.stdout.buffer, counted(), sample_rate, tags)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ValueError("the player ended before the stream") from None


def _print(record: object) -> None:
    print(to_json_line(record), flush=True)


def _asr(arguments: argparse.Namespace) -> None:
    from slm.export.voice_folder import VoiceSummary

    _check_numbers(arguments)
    VoiceSummary.read(arguments.voice).check_task("asr")
    missing = [path for path in arguments.recordings if not Path(path).exists()]
    if len(missing) == len(arguments.recordings):
        _check_recording(missing[0])
    voice = _load(arguments)
    skipped, num_failed = [], 0
    for path in arguments.recordings:
        try:
            made = voice.transcribe_file(path, arguments.batch)
        except (ValueError, OSError) as error:
            if len(arguments.recordings) == 1:
                raise
            skipped.append(path)
            logger.warning("skipped: %s", error)
            continue
        _print({"audio": path, "text": made.text, "failure": made.failure})
        num_failed += made.failure is not None
    if skipped:
        logger.info("%d of %d recordings skipped", len(skipped), len(arguments.recordings))
    if len(skipped) == len(arguments.recordings):
        raise ValueError("no recording could be used")
    _end(failed=bool(skipped) or num_failed > 0)


def _vc(arguments: argparse.Namespace) -> None:
    from codec.io import FileLock
    from codec.transcripts import has_words
    from slm.batch_tts import prompt_source
    from slm.batch_vc import convert_list, read_vc_list
    from slm.export.voice_folder import VoiceSummary
    from slm.voice import check_name

    one = (arguments.source, arguments.target, arguments.source_text, arguments.target_text)
    if arguments.list is None and None in one[:2]:
        raise ValueError("give --source and --target, or --list")
    if arguments.list is not None and any(value is not None for value in one):
        raise ValueError("give either --source and --target, or --list, not both")
    listed = Path(arguments.list) if arguments.list is not None else None
    lines = read_vc_list(listed) if listed is not None else []
    if listed is None:
        check_name(arguments.out)
    _check_place(arguments.out, is_folder=listed is not None)
    summary = VoiceSummary.read(arguments.voice)
    summary.check_task("conversion")
    if listed is not None:
        out = Path(arguments.out)
        voice = _load(arguments)
        try:
            with FileLock(out):
                num_failed = convert_list(voice, lines, listed.parent, out)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command continues") from None
        _end(failed=num_failed > 0)
        return
    _check_recording(arguments.source)
    _check_prompt(summary, arguments.target)
    if arguments.target_text is not None and not has_words(arguments.target_text):
        raise ValueError(f"--target-text {arguments.target_text!r} has no words")
    voice = _load(arguments)
    target = prompt_source(voice.prompts, arguments.target, Path())
    speech = voice.convert(
        Path(arguments.source), target, arguments.source_text, arguments.target_text
    )
    voice.save(speech, arguments.out)
    files = {"audio": arguments.out, "source": arguments.source, "target": arguments.target}
    texts = {"text": speech.text, "target_text": speech.prompt_text}
    _print({**files, **texts, "failure": speech.failure})
    _end(failed=speech.failure is not None)


def _continue(arguments: argparse.Namespace) -> None:
    from slm.batch_tts import prompt_source, result
    from slm.export.voice_folder import VoiceSummary
    from slm.generation.conversion import check_continuation
    from slm.voice import check_name

    check_name(arguments.out)
    _check_place(arguments.out)
    _check_numbers(arguments)
    sampling = _sampling(arguments)
    summary = VoiceSummary.read(arguments.voice)
    check_continuation(summary.tasks)
    _check_prompt(summary, arguments.prompt)
    voice = _load(arguments, **sampling)
    prompt = prompt_source(voice.prompts, arguments.prompt, Path())
    speech = voice.continue_speech(prompt, arguments.seconds, arguments.seed)
    voice.save(speech, arguments.out)
    _print(result(arguments.out, arguments.prompt, speech))
    _end(failed=speech.failure is not None)


def _export(arguments: argparse.Namespace) -> None:
    from slm.export.causal_lm import check_free, export

    check_free(Path(arguments.out))
    _check_place(arguments.out)
    export(_load(arguments).lm, arguments.out)
    logger.info("%s: AutoModelForCausalLM loads it; see its README.md", arguments.out)


if __name__ == "__main__":
    main()
