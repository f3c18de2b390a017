"""Runs command lines in sequence; each is printed before it runs."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from codec.program import ASKED_PROCESSES, CHECKS_FAILED

HERE = Path(__file__).resolve().parents[1]


LAUNCHED = re.compile(
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|(MASTER|TORCHELASTIC|ACCELERATE)_.*"
    rf"|{ASKED_PROCESSES}"
)
"""Environment variables that a launcher sets for its ranks."""


class Command(NamedTuple):
    """A command line and its purpose."""

    what: str
    arguments: list[str]


def launch(accelerate: str, processes: int, recipe: str, *arguments: str) -> list[str]:
    """Returns the `accelerate launch` arguments of a recipe.

    Args:
        accelerate: name of a file in recipes/accelerate, without .yaml.
        processes: number of processes; the CPU cores are divided among them.
        recipe: file in recipes/.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    return [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(HERE / "accelerate" / f"{accelerate}.yaml"),
        "--num_processes", str(processes), "--num_cpu_threads_per_process", str(threads),
        str(HERE / recipe), *arguments,
    ]  # fmt: skip


def run(command: Command, number: int, total: int, *, quiet: bool = False) -> str:
    """Runs a command as number `number` of `total`; returns its standard output.

    Args:
        quiet: for a command inside a program that prints its own result: standard output stays
            empty, and the command's line goes to standard error.

    Raises:
        ValueError: the command failed. Status 3 of `slm` is none: its output states the failure.
    """
    place = sys.stderr if quiet else sys.stdout
    line = f"\n[{number}/{total}] {command.what}\n    {shown(command.arguments)}"
    print(line, file=place, flush=True)
    began = time.monotonic()
    # A program that a launcher runs may run commands: they are no ranks of the launch.
    environment = {key: value for key, value in os.environ.items() if not LAUNCHED.fullmatch(key)}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command.arguments, stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    if not quiet:
        print(done.stdout, end="", flush=True)
    if done.returncode not in (0, CHECKS_FAILED):
        raise ValueError(
            f"the step '{command.what}' failed; fix the error above, then run this program again"
        )
    print(f"    done in {time.monotonic() - began:.0f} s", file=place, flush=True)
    return done.stdout


def shown(arguments: list[str]) -> str:
    """Returns the command as a user types it in the repository's root."""
    words = ["python" if word == sys.executable else word for word in arguments]
    text = shlex.join(word.replace(f"{HERE.parent}/", "") for word in words)
    return (
        text.replace("python -m accelerate.commands.launch", "accelerate launch")
        .replace("python -m slm", "slm")
        .replace("python -m codec", "codec")
    )
