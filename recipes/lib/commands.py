"""Runs command lines in sequence; each is printed before it runs."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]


class Command(NamedTuple):
    """A command line and what it is for."""

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


def run(command: Command, number: int, total: int) -> str:
    """Runs a command as number `number` of `total`; prints and returns its standard output.

    Raises:
        ValueError: the command's exit status is not 0.
    """
    print(f"\n[{number}/{total}] {command.what}\n    {shown(command.arguments)}", flush=True)
    began = time.monotonic()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command.arguments, stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise ValueError(
            f"the step '{command.what}' failed; fix the error above, then run this program again"
        )
    print(f"    done in {time.monotonic() - began:.0f} s", flush=True)
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
