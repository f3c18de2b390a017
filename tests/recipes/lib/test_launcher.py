"""Exit status and errors of `accelerate launch`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from forking import free_port

from recipes.lib.launcher import adapt, install, status_of

LAUNCH = """
import runpy, site, sys
from pathlib import Path
import recipes.lib.launcher as launcher
folder, *arguments = sys.argv[1:]
launcher.RECIPES = Path(folder)
sys.argv = ["accelerate-launch", *arguments]
sys.orig_argv = [sys.executable, "accelerate", "launch", *arguments]
site.addsitedir(folder)
runpy.run_module("accelerate.commands.launch", run_name="__main__")
"""
PROGRAM = """
import os, time
from codec.program import run_program

def program():
    {body}

run_program(program)
"""


def start(folder: Path, body: str, *options: str) -> "subprocess.Popen[str]":
    """Launches a program as a shell does in an environment that `make setup` has made."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(body=body))
    install(folder)
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(folder), *options, str(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,  # Without a terminal.
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_user_error_under_a_launcher_is_one_line(tmp_path: Path, processes: int) -> None:
    options = ["--num_processes", str(processes)]
    if processes > 1:
        config = ROOT / "recipes" / "accelerate" / "ddp.yaml"
        options += ["--config_file", str(config), "--main_process_port", str(free_port())]
    process = start(tmp_path, "raise ValueError('a: no such key')", *options)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (2, "", "error: a: no such key\n")


def test_the_launcher_waits_for_an_interrupted_program(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    body = f"""
    try:
        open({str(fifo)!r}).read()
    except KeyboardInterrupt:
        time.sleep(1)  # A checkpoint.
        raise KeyboardInterrupt("stopped at step 3") from None"""
    process = start(tmp_path, body)
    with open(fifo, "w"):
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "stopped at step 3\n")


def test_a_launcher_passes_sigterm_on_and_waits_for_all_ranks(tmp_path: Path) -> None:
    """What a scheduler sends; torchrun's own handler would end the ranks after 30 seconds."""
    fifos = [tmp_path / f"fifo{rank}" for rank in range(2)]
    for fifo in fifos:
        os.mkfifo(fifo)
    body = f"""
    import signal
    class Stopped(KeyboardInterrupt): status = 143
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    file = open({str(tmp_path / "fifo")!r} + os.environ["RANK"])
    file.read()
    assert asked
    time.sleep(0.5)  # A checkpoint.
    raise Stopped("stopped at step 3")"""
    config = ROOT / "recipes" / "accelerate" / "ddp.yaml"
    options = ["--config_file", str(config), "--main_process_port", str(free_port())]
    process = start(tmp_path, body, "--num_processes", "2", *options)
    with open(fifos[0], "w"), open(fifos[1], "w"):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # The signal reaches the ranks before their input ends.
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (143, "", "stopped at step 3\n")


def test_only_launches_of_recipes_are_adapted() -> None:
    hook = sys.excepthook
    adapt(["python", "accelerate", "launch", "train.py", str(ROOT / "recipes" / "tts.py")])
    adapt(["python", "accelerate", "env"])
    assert sys.excepthook is hook


def test_a_process_that_is_killed_is_named(tmp_path: Path) -> None:
    process = start(tmp_path, "os.kill(os.getpid(), 9)", "--num_processes", "1")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (137, "")
    assert errors.startswith("error: a process of this launch was ended by SIGKILL")
    assert errors.count("\n") == 1


def test_an_error_of_the_launcher_itself_keeps_its_traceback() -> None:
    assert status_of(subprocess.CalledProcessError(-2, "recipe")) == 130
    assert status_of(subprocess.CalledProcessError(-15, "recipe")) == 143
    assert status_of(ValueError("of the launcher")) is None
