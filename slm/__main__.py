"""The command `slm`: tts, asr, vc, continue and export."""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codec.program import ArgumentParser, run_program
from slm.config import CHECKS, SamplingConfig

if TYPE_CHECKING:
    from slm.voice import Voice

logger = logging.getLogger("slm")

DRAWING = ("greedy", "temperature", "top_p", "top_k")
SAMPLING = (*DRAWING, "num_candidates", "max_attempts", "checks")
"""Options of `slm tts` that are fields of SamplingConfig; those that are not given stay."""


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
    parser = ArgumentParser(prog="slm", description="Speak and transcribe with a voice.")
    commands = parser.add_subparsers(required=True, metavar="tts|asr|vc|continue|export")
    tts = commands.add_parser("tts", help="text and a prompt recording to speech")
    asr = commands.add_parser("asr", help="recordings to text, one JSON line each")
    vc = commands.add_parser("vc", help="a recording to the same words in another voice")
    goes_on = commands.add_parser("continue", help="a recording to what may follow it")
    export = commands.add_parser("export", help="a plain causal LM of transformers")
    runs = ((tts, _tts), (asr, _asr), (vc, _vc), (goes_on, _continue), (export, _export))
    for command, run in runs:
        command.set_defaults(run=run)
        command.add_argument("--voice", required=True, help="folder or hub id of a voice")
        command.add_argument("--base", help="where the voice's text LLM is, if it has moved")
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument(
            "--dtype", choices=("float32", "bfloat16"), default="float32",
            help="of the LLM's and the NAR's weights; bfloat16 takes half the memory",
        )  # fmt: skip
    for command in (tts, asr):
        command.add_argument("--batch", type=int, default=8, help="items generated together")
    _add_tts(tts)
    for command in (tts, goes_on):
        _add_drawing(command)
    _add_making(tts)
    asr.add_argument("recordings", nargs="+", metavar="REC")
    _add_vc(vc)
    goes_on.add_argument("--prompt", required=True, help="recording, or a shipped prompt's name")
    goes_on.add_argument("--seconds", type=float, required=True, help="most of what is added")
    goes_on.add_argument("--seed", type=int, default=0)
    goes_on.add_argument("--out", required=True, help="a .wav of what is added")
    export.add_argument("out", metavar="OUT", help="a new folder, or an earlier export's")
    return parser


def _add_vc(vc: argparse.ArgumentParser) -> None:
    vc.add_argument("--source", required=True, help="recording whose words are kept, of any length")
    vc.add_argument(
        "--target", required=True, help="recording of the other voice, or a shipped prompt's name"
    )
    vc.add_argument(
        "--source-text", help="what the source says; else, and where the source is so long that "
        "it takes several pieces, the model transcribes it, if the voice's NAR takes texts",
    )  # fmt: skip
    vc.add_argument("--target-text", help="what the target says; else as above")
    vc.add_argument("--out", required=True, help="a .wav")


def _add_tts(tts: argparse.ArgumentParser) -> None:
    tts.add_argument("--text", help="what to say, of any length")
    tts.add_argument(
        "--prompt", help="recording whose voice to take on, or a shipped prompt's name"
    )
    tts.add_argument(
        "--prompt-text", help="what the prompt says; else, and where the prompt is so long that "
        "only its beginning is used, the model transcribes it",
    )  # fmt: skip
    tts.add_argument("--list", help="JSON lines: id, text, prompt, and prompt_text if known")
    tts.add_argument("--out", help="a .wav; with --list a folder")
    tts.add_argument(
        "--stream", metavar="WAV", help="instead of --out: - for standard output, or a pipe named "
        ".wav, is written to while the speech is made; a file named .wav is there when it is whole",
    )  # fmt: skip
    tts.add_argument(
        "--chunk-seconds", type=float, default=0.5, help="speech that --stream makes at a time"
    )
    tts.add_argument("--seed", type=int, default=0)


def _add_drawing(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--greedy", action="store_true", default=None,
        help="take the likeliest token; what is made again is drawn all the same",
    )  # fmt: skip
    command.add_argument("--temperature", type=float, help="1: as trained; lower is more even")
    command.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this share")
    command.add_argument("--top-k", type=int, help="and from no more than so many")


def _add_making(tts: argparse.ArgumentParser) -> None:
    tts.add_argument(
        "--candidates", type=int, metavar="N", dest="num_candidates",
        help="best-of-N: generate N candidates per text and keep the one whose text has the "
        "highest likelihood under the model's own ASR; N times the work",
    )  # fmt: skip
    tts.add_argument("--max-attempts", type=int, metavar="N", help="maximum attempts per item")
    tts.add_argument("--tries", type=int, dest="max_attempts", help=argparse.SUPPRESS)
    tts.add_argument(
        "--checks", type=_checks, metavar="NAMES",
        help=f"what is a failure: some of {','.join(CHECKS)}, or none; where the voice can "
        "transcribe, early and leak make it transcribe its own speech, up to half of codebook 1's "
        "time again",
    )  # fmt: skip


def _checks(names: str) -> tuple[str, ...]:
    return () if names == "none" else tuple(names.split(","))


def _load(arguments: argparse.Namespace) -> "Voice":
    import torch

    from slm.voice import Voice

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    return Voice.from_pretrained(
        arguments.voice, base=arguments.base, device=arguments.device, dtype=dtype
    )


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingConfig that were given, checked before a voice is loaded."""
    values = {name: getattr(arguments, name, None) for name in SAMPLING}
    given = {name: value for name, value in values.items() if value is not None}
    SamplingConfig(**given)
    return given


def _check_place(target: str, *, is_folder: bool = False) -> None:
    """Raises ValueError where nothing can be written; folders that are missing are made later."""
    place = Path(target) if is_folder else Path(target).parent
    if is_folder and place.is_file():
        raise ValueError(f"{target}: is a file; name a folder")
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{target}: {place} is no folder; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{target}: {place} may not be written to; choose another place")


def _tts(arguments: argparse.Namespace) -> None:
    from codec.io import FileLock
    from slm.batch_tts import Pace, prepare, read_list, result, speak_list
    from slm.voice import check_name

    _check_tts(arguments)
    target = arguments.stream if arguments.out is None else arguments.out
    listed = Path(arguments.list) if arguments.list else None
    entries = read_list(listed) if listed is not None else []
    if target != "-":
        _check_place(target, is_folder=listed is not None)
    if listed is None and target != "-":
        check_name(target)
    given = _sampling(arguments)
    voice = _load(arguments)
    voice.sampling = replace(voice.sampling, **given)
    if listed is not None:
        out = Path(target)
        with FileLock(out):
            speak_list(voice, entries, listed, out, seed=arguments.seed, batch=arguments.batch)
        return
    entry = {"text": arguments.text, "prompt": arguments.prompt}
    if arguments.prompt_text is not None:
        entry["prompt_text"] = arguments.prompt_text
    passage = prepare(voice, entry, Path(), arguments.seed)
    if arguments.stream is not None:
        waves = voice.stream_prepared(passage, arguments.chunk_seconds)
        _stream(arguments.stream, waves, voice.codec.sample_rate)
        return
    pace = Pace()
    (speech,) = pace.say(voice, [passage], arguments.batch)
    voice.save(speech, target)
    logger.info("%s", pace)
    _tell(result(target, arguments.prompt, speech))


def _check_tts(arguments: argparse.Namespace) -> None:
    if arguments.list is None and None in (arguments.text, arguments.prompt):
        raise ValueError("give --text and --prompt, or --list")
    if arguments.list is not None and (arguments.text or arguments.prompt):
        raise ValueError("give either --text and --prompt, or --list, not both")
    if (arguments.out is None) == (arguments.stream is None):
        raise ValueError("give either --out or --stream")
    if arguments.stream is not None and arguments.list is not None:
        raise ValueError("--stream is for --text; a list goes to a folder (--out)")
    if arguments.stream is not None and arguments.num_candidates not in (None, 1):
        raise ValueError("--stream has no --candidates: what has been heard cannot be exchanged")
    if arguments.stream not in (None, "-") and Path(arguments.stream).suffix.lower() != ".wav":
        raise ValueError(f"--stream {arguments.stream}: only WAV is streamed; call it .wav, or -")
    if arguments.stream == "-" and sys.stdout.isatty():
        raise ValueError("--stream - writes sound; pipe it to a player, such as `| aplay`")
    if arguments.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {arguments.batch}")


def _stream(target: str, waves: Iterable[np.ndarray], sample_rate: int) -> None:
    """Writes a WAV file while it is made; to standard output nothing else goes then."""
    from codec.io import atomic_file
    from slm.generation.streaming import write_wav

    started, count = time.monotonic(), 0

    def told() -> Iterator[np.ndarray]:
        nonlocal count
        for wave in waves:
            if not count and len(wave):
                logger.info("first sound after %.2f s", time.monotonic() - started)
            count += len(wave)
            yield wave
        seconds = time.monotonic() - started
        logger.info("%.2f s of speech in %.2f s", count / sample_rate, seconds)

    if target != "-":
        path = Path(target)
        is_pipe = path.exists() and not path.is_file()
        # What fails on the way leaves an earlier file as it was.
        kept = nullcontext(path) if is_pipe else atomic_file(path)
        with kept as place, open(place, "wb") as file:
            write_wav(file, told(), sample_rate)
        return
    try:
        write_wav(sys.stdout.buffer, told(), sample_rate)
        sys.stdout.flush()
    except BrokenPipeError:
        # Or the interpreter complains once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ValueError("the player has gone before the end") from None


def _tell(record: object) -> None:
    print(json.dumps(record, ensure_ascii=False), flush=True)


def _asr(arguments: argparse.Namespace) -> None:
    if arguments.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {arguments.batch}")
    voice = _load(arguments)
    failed = []
    for path in arguments.recordings:
        try:
            heard = voice.transcribe_file(path, arguments.batch)
        except (ValueError, OSError) as error:
            if len(arguments.recordings) == 1:
                raise
            failed.append(path)
            logger.warning("skipped: %s", error)
            continue
        _tell({"audio": path, "text": heard.text, "failure": heard.failure})
    if failed:
        logger.info("%d of %d recordings skipped", len(failed), len(arguments.recordings))
    if len(failed) == len(arguments.recordings):
        raise ValueError("no recording could be used")


def _vc(arguments: argparse.Namespace) -> None:
    from slm.batch_tts import prompt_of
    from slm.voice import check_name

    check_name(arguments.out)
    _check_place(arguments.out)
    voice = _load(arguments)
    target = prompt_of(voice, arguments.target, Path())
    speech = voice.convert(
        Path(arguments.source), target, arguments.source_text, arguments.target_text
    )
    voice.save(speech, arguments.out)
    told = {"audio": arguments.out, "source": arguments.source, "target": arguments.target}
    texts = {"text": speech.text, "target_text": speech.prompt_text}
    _tell({**told, **texts, "failure": speech.failure})


def _continue(arguments: argparse.Namespace) -> None:
    from slm.batch_tts import prompt_of, result
    from slm.voice import check_name

    check_name(arguments.out)
    _check_place(arguments.out)
    given = _sampling(arguments)
    voice = _load(arguments)
    voice.sampling = replace(voice.sampling, **given)
    prompt = prompt_of(voice, arguments.prompt, Path())
    speech = voice.continue_speech(prompt, arguments.seconds, arguments.seed)
    voice.save(speech, arguments.out)
    _tell(result(arguments.out, arguments.prompt, speech))


def _export(arguments: argparse.Namespace) -> None:
    from slm.export.causal_lm import check_free, export

    check_free(Path(arguments.out))
    _check_place(arguments.out)
    export(_load(arguments).lm, arguments.out)
    logger.info("%s: AutoModelForCausalLM loads it; its README.md says how", arguments.out)


if __name__ == "__main__":
    main()
