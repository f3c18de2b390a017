"""`accelerate launch` of a recipe ends with the recipe's exit status and adds no traceback.

Accelerate and torchrun print the traceback of their own exception below what a failed process has
printed. After Ctrl-C or SIGTERM accelerate does not wait for a process that saves a checkpoint, and
torchrun waits for 30 seconds. On several machines some options start fewer processes than they
ask for, or none: these are refused. `make setup` therefore writes a .pth file into .venv
(`install`), by which the launcher, and no other program, loads this file when it starts.
"""

import logging
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

RECIPES = Path(__file__).resolve().parents[1]
PTH_FILE = "parlance_launcher.pth"
CODE = (
    'import sys; any("accelerate" in word for word in sys.orig_argv[:3]) and '
    r'exec("try:\n from recipes.lib.launcher import adapt\n adapt(sys.orig_argv)\n'
    r'except ImportError: pass")'
)
"""A .pth file is one line."""
KILLED = (
    *(signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL),
)
"""Signals by which a process ends without a message of its own."""


def install(folder: Path | None = None) -> Path:
    """Writes the .pth file into `folder` (default: this environment's site-packages)."""
    path = (folder or Path(sysconfig.get_path("purelib"))) / PTH_FILE
    path.write_text(f"{CODE}\n")
    return path


def adapt(words: list[str]) -> None:
    """Adapts this process, if `words` are an `accelerate launch` of a recipe."""
    programs = [Path(word).resolve() for word in words if word.endswith(".py")]
    if not any(RECIPES in program.parents for program in programs[:1]):
        return
    logging.disable(logging.ERROR)  # Its defaults, and the failure of a process.
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        status = status_of(error)
        if status is None:
            before(kind, error, trace)
            return
        if status - 128 in KILLED:
            name = signal.Signals(status - 128).name
            why = ", perhaps for lack of memory" if name == "SIGKILL" else ""
            print(
                f"error: a process of this launch was ended by {name}{why}; the same command "
                "continues from what is saved",
                file=sys.stderr,
            )
        sys.stdout.flush()
        os._exit(status)

    sys.excepthook = hook
    signal.signal(signal.SIGINT, _pass_on)
    signal.signal(signal.SIGTERM, _pass_on)
    _check_machines()
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # torchrun's default has those two, too.


def _check_machines() -> None:
    """Checks the options of a launch, once accelerate has read its file, and passes the number of
    processes on to them."""
    import accelerate.utils

    from codec.program import ASKED_PROCESSES

    def checked(prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def prepared(options: Any) -> Any:
            if fault := fault_of(options):
                print(f"error: {fault}", file=sys.stderr)
                sys.exit(2)
            os.environ[ASKED_PROCESSES] = str(max(1, options.num_processes))
            return prepare(options)

        return prepared

    for name in (
        "prepare_simple_launcher_cmd_env", "prepare_multi_gpu_env", "prepare_deepspeed_cmd_env"
    ):  # fmt: skip
        setattr(accelerate.utils, name, checked(getattr(accelerate.utils, name)))


def fault_of(options: Any) -> str:
    """Returns what is wrong with the options of a launch on several machines, "" if nothing is."""
    machines = options.num_machines or 1
    if machines == 1:
        return ""
    if options.num_processes % machines:
        return (
            f"--num_processes {options.num_processes} counts those of all machines, and is no "
            f"multiple of --num_machines {machines}"
        )
    if not options.main_process_ip:
        return "several machines need --main_process_ip, the address of machine 0, on each of them"
    if options.main_process_port == 0:
        return "several machines need --main_process_port, the same free port, on each of them"
    standard = options.deepspeed_multinode_launcher == "standard" or options.deepspeed_hostfile
    if options.use_deepspeed and not standard:
        return (
            "DeepSpeed on several machines needs --deepspeed_multinode_launcher standard, which "
            "recipes/accelerate/zero*.yaml set"
        )
    return ""


def status_of(error: BaseException) -> int | None:
    """Returns the exit status of the process that failed first, 128 + N if signal N ended it; None
    if the launcher itself failed."""
    status = 0
    failures: dict[int, Any] = getattr(error, "failures", {})  # torchrun's ChildFailedError.
    if failures:
        status = min(failures.values(), key=lambda failure: failure.timestamp).exitcode
    elif isinstance(error, subprocess.CalledProcessError):
        status = error.returncode
    return 128 - status if status < 0 else status or None


def _pass_on(number: int, frame: Any) -> None:
    """Keeps waiting for the process, which ends by itself. A terminal sends it Ctrl-C as well; a
    signal of another origin may reach the launcher alone and is passed on."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
        interactive = os.tcgetpgrp(terminal) == os.getpgrp()
        os.close(terminal)
    except OSError:
        interactive = False
    if number == signal.SIGTERM or not interactive:
        import psutil

        children = psutil.Process().children()
        for child in children:
            child.send_signal(number)
        if number == signal.SIGTERM and not children:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


if __name__ == "__main__":
    install()
