"""Start and end of every recipe: exit status, last lines, `--profile`."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from codec import program
from codec.training.workarounds import end_rank, is_lost_rank, keep_freed_memory
from recipes.lib.config import load_config

__all__ = ["finished", "load_config", "run_recipe", "split_profile"]


def run_recipe(main: Callable[[list[str]], None]) -> None:
    """Runs a recipe's `main(argv)` with logs on standard error; ends as codec/program.py states."""
    if not torch.cuda.is_available():
        keep_freed_memory()
    alone = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if alone else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    for name in ("accelerate", "faster_whisper"):  # Ten lines a checkpoint, one a recording.
        logging.getLogger(name).setLevel(logging.WARNING)
    program.run_program(lambda: _with_other_ranks(main))
    end_rank()


def _with_other_ranks(main: Callable[[list[str]], None]) -> None:
    """Runs `main(argv)`; one line states if another process of the launch has ended."""
    try:
        main(sys.argv[1:])
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise OSError(
            "another process of this launch has ended; see its message, and start the same command "
            "again: it continues from what is saved"
        ) from error


def finished(what: str, path: str | Path, next_command: str) -> None:
    """Prints the last lines of a recipe to standard error, on the main process: what was made,
    where it is, and the command to run next. Standard output has results only.

    Args:
        what: e.g. "codec of 8 codebooks at 25 Hz, trained for 2000 steps".
        next_command: a command line for the repository's root.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        lines = f"Finished: {what}\n    in {path}\nNext: {next_command}"
        print(lines, file=sys.stderr, flush=True)


def split_profile(argv: Sequence[str]) -> tuple[int, list[str]]:
    """Returns the N of `--profile N` (0 if it is missing), and the other arguments.

    Raises:
        ValueError: N is no positive number.
    """
    rest = list(argv)
    value: str | None = None
    for index, argument in enumerate(rest):
        if argument == "--profile":
            value = rest[index + 1] if index + 1 < len(rest) else ""
            del rest[index : index + 2]
            break
        if argument.startswith("--profile="):
            value = rest.pop(index).partition("=")[2]
            break
    if value is None:
        return 0, rest
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"--profile needs a number of steps from 1 up, got {value or 'nothing'}")
    return int(value), rest


PROFILE_HELP = (
    "--profile N records N training steps with torch.profiler: profile/trace.json and "
    "profile/operators.txt in the run folder."
)
