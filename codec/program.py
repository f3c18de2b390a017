"""Exit status and error messages of all programs, and their argument parser.

Exit status 0: done; 1: internal error, with its traceback; 2: user error, one line that names the
remedy; 3: done, but a result has a failure or an input was skipped (`slm`); 130: interrupted, one
line; 143: ended by SIGTERM, after a training has saved a checkpoint; 141: the reader of standard
output has closed it.
PARLANCE_TRACEBACK=1 shows the traceback of a user error.
"""

import argparse
import difflib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

ASKED_PROCESSES = "PARLANCE_NUM_PROCESSES"
"""Environment variable with the number of processes, of all machines, that `accelerate launch` was
asked for; recipes/lib/launcher.py sets it."""

RANK_DELAY = 5.0
"""Seconds that a rank other than a machine's first one waits before it prints its error: when all
ranks fail alike, the launcher has ended it by then."""

MAX_MESSAGE = 4000
"""Characters of an error message: it may have values of a file."""

SYNONYMS = {
    "audio_filepath": ("audio",),
    "batch_size": ("batch", "batch_seconds", "frames"),
    "checkpoint": ("voice", "codec", "start_from"),
    "dataset": ("train", "cuts"),
    "end": ("duration",),
    "epochs": ("steps",),
    "eval": ("dev",),
    "file": ("list", "out", "audio"),
    "gpu": ("device",),
    "grad_accum": ("accumulate",),
    "gradient_accumulation_steps": ("accumulate",),
    "input": ("text", "recordings", "train"),
    "lang": ("language",),
    "learning_rate": ("lr",),
    "llm": ("base",),
    "max_steps": ("steps",),
    "model": ("base", "voice", "codec"),
    "model_name": ("base",),
    "model_name_or_path": ("base",),
    "num_epochs": ("epochs", "steps"),
    "output": ("out",),
    "output_dir": ("out",),
    "path": ("audio",),
    "precision": ("dtype",),
    "reference": ("prompt",),
    "save_dir": ("out",),
    "sentence": ("text",),
    "speaker": ("prompt",),
    "start": ("offset",),
    "tokens": ("train",),
    "transcript": ("text",),
    "valid": ("dev",),
    "validation": ("dev",),
    "warmup_steps": ("warmup",),
    "wav": ("audio",),
}
"""Names of keys and flags in other projects: the corresponding names here, most probable first."""


CHECKS_FAILED = 3
"""Exit status of a program that is done, but a result failed a check or an input was skipped."""


class ReportedElsewhere(ValueError):
    """A user error that another process of the launch prints."""


def reason_of(error: Exception) -> str:
    """Returns an exception's message as one line for users, without the name of its class."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return one_line(error) or "its content is not as expected"


def one_line(value: object) -> str:
    """Returns a value, which may be a file's, as text of one line for a message."""
    return " ".join(str(value).split())


def run_program(program: Callable[[], None]) -> None:
    """Runs `program`; returns if it succeeds, else exits with a status listed above.

    The text of a `KeyboardInterrupt`, also of a subclass, is printed instead of "interrupted". A
    subclass may have another `status`.
    """
    try:
        try:
            program()
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # A second one ends the process at once.
        # All ranks are interrupted: one line is enough.
        status = getattr(interrupt, "status", 130)
        _finish(status, (f"{interrupt}" or "interrupted") if _is_first_rank() else "")
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_reader_gone():
            _close_output()
            sys.exit(141)
        if os.environ.get("PARLANCE_TRACEBACK") == "1":
            raise
        reason = reason_of(error)
        reason = reason if len(reason) <= MAX_MESSAGE else f"{reason[:MAX_MESSAGE]}..."
        _finish(2, "" if isinstance(error, ReportedElsewhere) else f"error: {reason}")
    except Exception:
        if not _is_first_rank():
            time.sleep(RANK_DELAY)
        raise


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppresses transformers' warnings and loading reports inside the block, and its progress bars
    from then on."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def catch_interrupts() -> None:
    """Makes an uncaught interrupt, such as one during imports, end with one line and status 130."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
            return
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    sys.excepthook = hook


def _finish(status: int, line: str) -> NoReturn:
    if not _is_first_rank() and line:
        time.sleep(RANK_DELAY)
    if line:
        print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def _is_first_rank() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _is_reader_gone() -> bool:
    """Whether standard output or standard error is a pipe whose reader has closed it."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _close_output() -> None:
    """Redirects both outputs to the null device: at exit the interpreter flushes them once more."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)


def software() -> str:
    """Returns the name and version of this software, as the metadata of generated files has it."""
    try:
        return f"Parlance {version('parlance')}"
    except PackageNotFoundError:  # Used from its folder, without installation.
        return "Parlance"


def counted(number: int, noun: str) -> str:
    """A number with its noun: '1 line', '2 lines'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean A or B?' with up to three of the `known` names, or an empty text.

    Names are keys with dots (`optim.lr`) or flags (`--max-attempts`). A name resembles another by
    its letters, by an equal last part, or by a synonym of the last part (`model`: `base`).
    """
    spelled = {_normalized(each): each for each in known}
    given = _normalized(name)
    stem, _, last = given.rpartition(".")
    scores: dict[str, float] = {}
    for candidate, original in spelled.items():
        other_stem, _, other_last = candidate.rpartition(".")
        ratio = difflib.SequenceMatcher(None, given, candidate).ratio()
        last_ratio = difflib.SequenceMatcher(None, last, other_last).ratio()
        near = difflib.SequenceMatcher(None, stem, other_stem).ratio() if stem else 0.5
        if other_last == last:
            score = 2 + near
        elif other_last in SYNONYMS.get(last, ()) and near >= 0.5:
            # Later synonyms are less probable.
            score = 2 + near - 0.3 * SYNONYMS[last].index(other_last)
        elif last_ratio >= 0.6 and near >= 0.5:
            score = 0.5 * (last_ratio + near)
        elif ratio >= 0.85:
            score = 0.9 * ratio
        else:
            continue
        scores[original] = score
    best = sorted(scores, key=lambda each: (-scores[each], each))
    best = [each for each in best if scores[each] > scores[best[0]] - 0.1][:3]
    return f"; did you mean {' or '.join(best)}?" if best else ""


def _normalized(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with errors of one line, which suggest the most similar flag."""

    has_commands = False
    """Whether the program has subcommands."""

    def add_subparsers(self, **options: Any) -> Any:
        """Adds subcommands, as argparse does; their flags are checked by their own parsers."""
        self.has_commands = True
        return super().add_subparsers(**options)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parses arguments as argparse does; an unknown flag is reported before any other error."""
        words = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        for word in words:
            flag = word.partition("=")[0]
            if self.has_commands or word == "--":  # A command's flags are its own parser's.
                break
            is_flag = flag.startswith("--") and " " not in flag  # As argparse decides.
            if is_flag and not any(each.startswith(flag) for each in known):
                self.error(f"{flag}: no such option{did_you_mean(flag, known)}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints one line to standard error and exits with status 2."""
        self.exit(2, f"error: {message} (`{self.prog} --help` lists what there is)\n")
