"""Forks processes from one that has loaded the libraries; tests/forking.py sends it requests.

usage: fork_server.py [MODULE...]    reads a JSON request a line, and answers each with a line

PyTorch, transformers, lhotse and DeepSpeed take several seconds to load; a fork has them.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

MODULES = (
    *("recipes.cache_teachers", "recipes.train_codec", "recipes.train_semantic", "recipes.tts"),
    *("peft", "torch.utils.tensorboard", "transformers.models.auto.tokenization_auto"),
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("bert", "hubert", "llama", "wav2vec2", "whisper")
    ),
)


def serve() -> dict[str, Any]:
    """Answers requests; returns the request to run, in each process that it forks.

    {"argv": ...} starts a process: its id. {"pid": ...} polls one: its exit status, or null.
    """
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "argv" in request:
            answer = os.fork()
            if not answer:
                return request
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()
    os._exit(0)


def run(argv: list[str], environment: dict[str, str], stdout: str, stderr: str) -> int:
    """Runs a program as `python argv...` would; returns its exit status."""
    files = (os.devnull, stdout, stderr)
    for descriptor, path in enumerate(files):
        mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND if descriptor else os.O_RDONLY
        os.dup2(os.open(path, mode), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Shells ignore it in the background.
    os.environ |= environment
    # Forks would draw the same numbers, where nothing seeds NumPy's global generator.
    np.random.seed()  # noqa: NPY002
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    for module in (*MODULES, *sys.argv[1:]):
        importlib.import_module(module)
    with contextlib.suppress(ImportError):  # An extra.
        importlib.import_module("deepspeed")
    gc.freeze()
    status = run(**serve())
    # The interpreter's own end frees all that was loaded, which takes seconds.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
