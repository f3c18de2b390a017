"""Exit status and errors of `accelerate launch`."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerate.utils
import pytest
from accelerate.commands import launch
from conftest import ROOT
from forking import free_port

from recipes.lib.launcher import _check_machines, adapt, fault_of, install, status_of

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
    body = "raise ValueError('asked for ' + os.environ['PARLANCE_NUM_PROCESSES'])"
    process = start(tmp_path, body, *options)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (2, "", f"error: asked for {processes}\n")


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


def options_of(config: str, *more: str) -> argparse.Namespace:
    """Options of a launch on the second one of two machines, as accelerate completes them."""
    options = [
        *("--config_file", str(ROOT / "recipes" / "accelerate" / f"{config}.yaml")),
        *("--num_machines", "2", "--machine_rank", "1", "--num_processes", "4"),
        *("--main_process_ip", "10.0.0.1", "--main_process_port", "29500", *more),
    ]
    given = launch.launch_command_parser().parse_args([*options, "program.py"])
    return launch._validate_launch_command(given)[0]


@pytest.mark.parametrize("config", ["ddp", "zero1", "zero2", "zero3"])
def test_each_machine_starts_its_processes(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(config)
    assert fault_of(options) == ""
    started: list[argparse.Namespace] = []
    monkeypatch.setattr("torch.distributed.run.run", started.append)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    is_zero = config != "ddp"
    options.deepspeed_fields_from_accelerate_config = ""
    (launch.deepspeed_launcher if is_zero else launch.multi_gpu_launcher)(options)
    (found,) = started
    assert (found.nnodes, found.node_rank, found.nproc_per_node) == ("2", 1, "2")
    assert found.rdzv_endpoint == "10.0.0.1:29500"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_processes", "3"], "--num_processes 3 counts those of all machines, and is no mul"),
        (["--main_process_ip", ""], "several machines need --main_process_ip"),
        (["--main_process_port", "0"], "several machines need --main_process_port, the same free"),
        (["--deepspeed_multinode_launcher", "pdsh"], "--deepspeed_multinode_launcher standard"),
    ],
)
def test_launches_that_would_lack_machines_are_refused(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = options_of("zero2", *more)
    prepared: list[argparse.Namespace] = []
    names = ("simple_launcher", "multi_gpu", "deepspeed")
    for name in (f"prepare_{name}_cmd_env".replace("gpu_cmd", "gpu") for name in names):
        monkeypatch.setattr(accelerate.utils, name, prepared.append)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)
    _check_machines()
    with pytest.raises(SystemExit) as end:
        accelerate.utils.prepare_deepspeed_cmd_env(options)
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not prepared
    assert not [*tmp_path.iterdir()]
    options.num_machines = 1
    accelerate.utils.prepare_deepspeed_cmd_env(options)
    assert prepared == [options]
    assert os.environ["PARLANCE_NUM_PROCESSES"] == str(options.num_processes)


def test_an_error_of_the_launcher_itself_keeps_its_traceback() -> None:
    assert status_of(subprocess.CalledProcessError(-2, "recipe")) == 130
    assert status_of(subprocess.CalledProcessError(-15, "recipe")) == 143
    assert status_of(ValueError("of the launcher")) is None
