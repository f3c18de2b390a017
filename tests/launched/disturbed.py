"""Runs a program that is disturbed at a chosen file operation; tests/soak launches it.

usage: disturbed.py SPEC SCRIPT ARGUMENT...    SPEC: the fields of a Spec as JSON

File operations are Python's audit events of `EVENTS`, raised before the operation. Writers in C++
and Rust (torch, safetensors, Arrow, libsndfile) raise none, but what is around them does.
"""

import ctypes
import json
import os
import re
import runpy
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS = {
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"),
    "shutil.rmtree",
}
CLONE_NEWNS, MS_PRIVATE, MS_REC, MS_REMOUNT = 0x20000, 1 << 18, 1 << 14, 32
FILLER = ".filler"


@dataclass(frozen=True, kw_only=True)
class Spec:
    folder: str
    """Operations on paths that contain this are counted, and those relative to a descriptor."""
    kill_at: int = 0
    """Kills itself with -9 before the operation of this number, from 1; 0: never."""
    report: str = ""
    """File that gets the operations at the end, a list of texts: kind and name, without numbers."""
    judge: bool = False
    """Replaces the ASR that scores by one that always transcribes the same."""
    disk: str = ""
    """Mounts a disk of `megabytes` here, which other processes do not see, runs the program there,
    and once more after room was made; it is copied to DISK-full and DISK-end, the two statuses and
    outputs are in DISK-report.json."""
    megabytes: int = 64
    at: tuple[str, str, int] = ("", "", 0)
    """The disk is filled, or `remove` removed, before the n-th event of this name whose path
    contains this text."""
    remove: str = ""
    """A file or folder, which moves to REMOVE-removed."""


class Disk:
    """A disk of its own size in a mount namespace of this process."""

    def __init__(self, folder: str, megabytes: int) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        libc = ctypes.CDLL(None, use_errno=True)

        def call(name: str, *arguments: Any) -> None:
            if getattr(libc, name)(*arguments):
                number = ctypes.get_errno()
                raise OSError(number, f"{name}: {os.strerror(number)}")

        call("unshare", CLONE_NEWNS)
        call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        call("mount", b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={megabytes}m".encode())

    def fill(self) -> None:
        with open(self.folder / FILLER, "wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                while True:
                    try:
                        file.write(bytes(size))
                    except OSError:
                        break

    def make_room(self) -> None:
        (self.folder / FILLER).unlink(missing_ok=True)

    def copy_to(self, folder: str) -> None:
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(FILLER))


class Hook:
    """Counts operations and disturbs them."""

    def __init__(self, spec: Spec, disk: Disk | None) -> None:
        self.spec, self.disk = spec, disk
        self.operations: list[str] = []
        self.hits, self.is_active = 0, True

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_active or event not in EVENTS or not self._is_counted(event, arguments):
            return
        self.is_active = False
        name = re.sub(r"[0-9a-f]*[0-9]+[0-9a-f]*", "#", Path(str(arguments[0])).name)
        self.operations.append(f"{event} {name}")
        if len(self.operations) == self.spec.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        name, part, number = self.spec.at
        if event == name and part in " ".join(map(str, arguments)):
            self.hits += 1
            if self.hits == number and self.disk is not None:
                self.disk.fill()
            elif self.hits == number:
                Path(self.spec.remove).rename(f"{self.spec.remove}-removed")
        self.is_active = True

    def _is_counted(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if arguments[2] else 0
            return bool(writes) and self.spec.folder in str(arguments[0])
        descriptors = [each for each in arguments[1:] if isinstance(each, int) and each >= 0]
        at_descriptor = event in ("os.remove", "os.rmdir") and bool(descriptors)
        return at_descriptor or self.spec.folder in str(arguments)


def run(argv: list[str]) -> int:
    """Exit status of a program."""
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def run_forked(argv: list[str], hook: Hook | None, printed: Path) -> tuple[int, str]:
    """Exit status and standard error of a program in a process of its own."""
    pid = os.fork()
    if not pid:
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if hook is not None:
            sys.addaudithook(hook)
        status = run(argv)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), printed.read_text()


def use_fake_judge() -> None:
    from recipes.scoring import judges

    class FakeJudge:
        name = "judge@0 none"

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def transcribe(self, _wave: Any, _rate: int) -> str:
            return "hello world"

    judges.load_judge = FakeJudge  # type: ignore[assignment]


def main(argv: list[str]) -> int:
    spec = Spec(**json.loads(argv[0]))
    if spec.judge:
        use_fake_judge()
    if spec.disk:
        printed = Path(f"{spec.disk}-printed")
        disk = Disk(spec.disk, spec.megabytes)
        first = run_forked(argv[1:], Hook(spec, disk), printed)
        disk.copy_to(f"{spec.disk}-full")
        disk.make_room()
        second = run_forked(argv[1:], None, printed)
        disk.copy_to(f"{spec.disk}-end")
        report = {"first": first, "second": second}
        Path(f"{spec.disk}-report.json").write_text(json.dumps(report))
        return 0
    hook = Hook(spec, None)
    sys.addaudithook(hook)
    status = run(argv[1:])
    hook.is_active = False
    if spec.report:
        Path(spec.report).write_text(json.dumps(hook.operations))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
