"""Commands one after the other, each shown before it runs."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]


class Step(NamedTuple):
    """One command of the way and what it is for."""

    what: str
    arguments: list[str]


def launch(accelerate: str, processes: int, recipe: str, *arguments: str) -> list[str]:
    """A recipe under `accelerate launch` with one of the files of recipes/accelerate."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    return [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(HERE / "accelerate" / f"{accelerate}.yaml"),
        "--num_processes", str(processes), "--num_cpu_threads_per_process", str(threads),
        str(HERE / recipe), *arguments,
    ]  # fmt: skip


def run(step: Step, number: int, total: int) -> str:
    """Runs one command; what it prints on standard output is shown and returned."""
    print(f"\n[{number}/{total}] {step.what}\n    {shown(step.arguments)}", flush=True)
    began = time.monotonic()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        step.arguments, stdout=subprocess.PIPE, text=True, check=False, env=environment
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise ValueError(
            f"the step '{step.what}' failed; mend what it says above, then start again"
        )
    print(f"    done in {time.monotonic() - began:.0f} s", flush=True)
    return done.stdout


def shown(arguments: list[str]) -> str:
    """The command as one would type it in the repository."""
    words = ["python" if word == sys.executable else word for word in arguments]
    text = shlex.join(word.replace(f"{HERE.parent}/", "") for word in words)
    return (
        text.replace("python -m accelerate.commands.launch", "accelerate launch")
        .replace("python -m slm", "slm")
        .replace("python -m codec", "codec")
    )
