"""Two machines of one process each, which are two launchers on this machine, end as one machine
with two processes: the same files, checkpoints and metrics."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from forking import free_port
from tiny_runs import Program, differences, end_state, log_row, programs
from tiny_slm import quiet

pytestmark = [*quiet(), pytest.mark.timeout(1200)]
ACCELERATE = Path(sys.executable).with_name("accelerate")
FAKE_SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> dict[str, Program]:
    import soundfile
    from conftest import voiced

    def write(path: Path, seconds: float, rate: int = 16_000, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, voiced(seconds, rate, seed), rate)
        return path

    return programs(tmp_path_factory.mktemp("inputs"), tiny_codec_folder, write)


def run(commands: list[list[object]], folder: Path, **variables: str) -> list[str]:
    """Runs commands at the same time, in `folder`; what each prints to standard error."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",  # The order of peft's sets.
        **variables,
    }  # fmt: skip
    files = [folder / f"printed-{number}" for number in range(len(commands))]
    processes = []
    for command, file in zip(commands, files, strict=True):
        with open(file, "w") as errors:
            processes.append(
                subprocess.Popen(
                    [str(word) for word in command], cwd=folder, env=environment,
                    stdout=subprocess.DEVNULL, stderr=errors,
                )
            )  # fmt: skip
    statuses = [process.wait() for process in processes]
    printed = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    assert statuses == [0] * len(commands), "\n".join(printed)[-5000:]
    return printed


def launch(config: str, *options: object) -> list[object]:
    file = ROOT / "recipes" / "accelerate" / f"{config}.yaml"
    return [ACCELERATE, "launch", "--config_file", file, "--num_processes", 2, *options]


@pytest.mark.parametrize(
    ("name", "config"),
    [("codec", "ddp"), ("AR", "ddp"), ("AR", "zero2"), ("AR", "zero3"), ("export", "ddp")],
)
def test_two_machines_end_as_one_with_two_processes(
    name: str, config: str, made: dict[str, Program], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run([[*launch(config), *made[name].command(one)]], tmp_path)
    machines = ("--num_machines", 2, "--main_process_ip", "127.0.0.1")
    port = free_port()
    printed = run(
        [
            [
                *launch(config, *machines, "--machine_rank", rank, "--main_process_port", port),
                *made[name].command(two),
            ]
            for rank in range(2)
        ],
        tmp_path,
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one", "two"]  # No .deepspeed_env.
    assert "Traceback" not in "".join(printed)
    found = differences(end_state(one), end_state(two))
    log_row("machines.md", name, config, found or "equal")
    assert not found


def test_the_slurm_script_starts_a_launcher_on_each_machine(
    made: dict[str, Program], tmp_path: Path
) -> None:
    """With srun and scontrol of a cluster whose two machines are this one."""
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "srun").write_text(FAKE_SRUN)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.2\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv").symlink_to(ACCELERATE.parents[1])
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    run([[*launch("ddp"), *made["export"].command(one)]], tmp_path)
    job: dict[str, Any] = {
        "JOB_ID": os.getpid(), "JOB_NODELIST": "node[1-2]", "NNODES": 2, "GPUS_ON_NODE": 1,
        "CPUS_ON_NODE": 2,
    }  # fmt: skip
    script = [ROOT / "recipes" / "accelerate" / "slurm.sh", "ddp", *made["export"].command(two)]
    run(
        [script], tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}",
        **{f"SLURM_{key}": str(value) for key, value in job.items()},
    )  # fmt: skip
    found = differences(end_state(one), end_state(two))
    log_row("machines.md", "export", "ddp, slurm.sh", found or "equal")
    assert not found
