"""Programs on one or several ranks, without the seconds that a new interpreter takes to load.

The environment of ranks is taken from accelerate. `accelerate launch` itself runs in
tests/recipes/lib/test_launcher.py, and with DeepSpeed in tests/recipes/test_train_codec.py. Forks
end without the interpreter's own end, share its hash seed, and have no launcher above them.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

TESTS = Path(__file__).resolve().parent


def free_port() -> int:
    """A port for ranks to meet at: tests run at the same time, and all would take the default."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch_environments(config: str, ranks: int) -> list[dict[str, str]]:
    """The variables that `accelerate launch --config_file recipes/accelerate/CONFIG.yaml` sets."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    file = TESTS.parent / "recipes" / "accelerate" / f"{config}.yaml"
    port = free_port()
    options = ["--config_file", file, "--num_processes", ranks, "--main_process_port", port]
    arguments = launch_command_parser().parse_args([*map(str, options), "program.py"])
    taken: dict[str, str] = {}
    own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (
        patch.dict(os.environ, own),
        patch("torch.distributed.run.run", lambda _: taken.update(os.environ)),
    ):
        launch_command(arguments)
    assert taken
    common = {
        key: each
        for key, each in taken.items()
        if key.startswith("ACCELERATE_") or os.environ.get(key) != each
    }
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


class ForkServer:
    """A process that has loaded the libraries and forks."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        """
        Args:
            more: modules to load besides those of fork_server.py.
        """
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = f"{TESTS.parent}{os.pathsep}{TESTS}"
        self._server = subprocess.Popen(
            [sys.executable, str(TESTS / "launched" / "fork_server.py"), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **request: Any) -> Any:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(f"{json.dumps(request)}\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, f"the fork server ended with status {self._server.wait(10)}"
        return json.loads(answer)

    def close(self) -> None:
        try:
            self._server.communicate(timeout=60)
        finally:
            self._server.kill()


class ForkedRun:
    """The ranks of one program, which write to the same two files."""

    def __init__(
        self,
        server: ForkServer,
        argv: Sequence[str],
        environments: Sequence[dict[str, str]],
        folder: Path,
    ) -> None:
        self._server, self._argv = server, list(argv)
        self._files = [folder / "stdout", folder / "stderr"]
        stdout, stderr = map(str, self._files)
        self.pids: list[int] = [
            server.ask(argv=self._argv, environment=each, stdout=stdout, stderr=stderr)
            for each in environments
        ]
        self._status: dict[int, int] = {}
        self._failed_at: float | None = None

    @property
    def stderr(self) -> Path:
        """The file of standard error."""
        return self._files[1]

    def status_of_rank(self, rank: int) -> int | None:
        """Exit status of one rank, None while it runs: without what `poll` does to the others."""
        pid = self.pids[rank]
        if pid not in self._status and (status := self._server.ask(pid=pid)) is not None:
            self._status[pid] = status
        return self._status.get(pid)

    def poll(self) -> int | None:
        """Exit status of the program: of its first rank that failed; None while it runs.

        As a launcher does, it ends the other ranks soon after one fails.
        """
        for pid in self.pids:
            if pid not in self._status:
                status = self._server.ask(pid=pid)
                if status is not None:
                    self._status[pid] = status
        failed = [status for status in self._status.values() if status]
        if failed and self._failed_at is None:
            self._failed_at = time.monotonic()
        if self._failed_at is not None and time.monotonic() > self._failed_at + 1:
            self.kill()
        if len(self._status) < len(self.pids):
            return None
        return failed[0] if failed else 0

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Sends SIGINT, or another signal, to the first rank."""
        os.kill(self.pids[0], number)

    def kill(self) -> None:
        """Kills all ranks and what they started with -9, and waits until they are gone."""
        alive = [psutil.Process(pid) for pid in self.pids if pid not in self._status]
        children = [child for each in alive for child in each.children(recursive=True)]
        for each in (*alive, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        deadline = time.monotonic() + 60
        while len(self._status) < len(self.pids):
            assert time.monotonic() < deadline
            for pid in set(self.pids) - self._status.keys():
                status = self._server.ask(pid=pid)
                if status is not None:
                    self._status[pid] = status
            time.sleep(0.01)
        assert not psutil.wait_procs(children, timeout=60)[1]

    def kill_when(self, condition: Callable[[], bool], timeout: float = 200) -> None:
        """Kills all ranks as soon as the condition holds. AssertionError if they ended before."""
        self.run_until(condition, timeout)
        assert self.poll() is None, "ended before it was killed"
        self.kill()

    def run_until(self, condition: Callable[[], bool], timeout: float = 200) -> None:
        """Returns as soon as the condition holds. TimeoutError, after killing all ranks."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None, f"ended too early: {self._files[1].read_text()[-3000:]}"
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(self._files[1].read_text()[-3000:])
            time.sleep(0.005)

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Waits for the end. TimeoutError, after killing all ranks."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(self._files[1].read_text()[-3000:])
            time.sleep(0.02)
        stdout, stderr = (path.read_text() for path in self._files)
        return subprocess.CompletedProcess(self._argv, status, stdout, stderr)
