"""Reads hostile variants of valid files, and reports what an untrusted file must not cause.

    python tests/fuzz.py TARGET[,TARGET...] SECONDS SEED FOLDER

In a process of its own, with limited memory, each reader of the product gets files that hypothesis
has changed (tests/fuzz_inputs.py). It must return, or raise an error that programs report in one
line (ValueError, OSError). Reported are other errors, long times, much memory, pickles, processes,
connections, and files outside of the output folder. FOLDER gets TARGET.json, and the files of each
finding. SECONDS are of processor time; `all` names all targets.
"""

import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fuzz_inputs  # noqa: E402
from fuzz_inputs import CANARY  # noqa: E402

SECONDS = 20
"""Of processor time, for one input."""
MEBIBYTES = 600
"""Of memory in use, for one input, beyond that of the libraries and the valid files."""
ADDRESS_SPACE = 6 * 2**30
"""That one input may ask for."""
BATCH = 10
"""Inputs of one run of hypothesis."""


class TooLong(BaseException):
    """An input takes more than SECONDS."""


@dataclass
class Oracle:
    """Calls readers, and collects what they must not do."""

    folder: Path
    draw: fuzz_inputs.Draw | None = None
    problems: list[str] = field(default_factory=list)
    changed: list[str] | None = None
    """Names of the files that differ from the valid ones; None: none does, and all are read."""
    refused: int = 0
    is_watching: bool = False

    def attempt(self, read: Callable[..., Any], *arguments: Any, named: bool = True) -> Any:
        """The result of a reader, or None for an error.

        Args:
            named: the message must have the name of a file.
        """
        try:
            return read(*arguments)
        except (ValueError, OSError) as error:
            self.refused += 1
            text = str(error)
            if "\n" in text.strip() or not text:
                self.problems.append(f"no single line: {text[:200]!r} {_place(error)}")
            if named and str(self.folder) not in text:
                self.problems.append(f"names no file: {text[:200]!r} {_place(error)}")
            link: BaseException | None = error
            while link is not None:
                if isinstance(link, MemoryError) or "allocate" in str(link.args):
                    self.problems.append(f"memory: {link!r:.200} {_place(error)}")
                link = link.__cause__ or link.__context__
        except TooLong:
            raise
        except BaseException as error:
            self.problems.append(f"{type(error).__name__}: {error!s:.300} {_place(error)}")
        return None

    def differs(self, *names: str) -> bool:
        """Whether a file, or one of a folder, is to be read."""
        return self.changed is None or any(
            each.startswith(name) for each in self.changed for name in names
        )

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """A hook of the interpreter."""
        if not self.is_watching:
            return
        if event == "subprocess.Popen" and arguments[0] == "git":  # The revision of the checkout.
            return
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # Below an open folder.
            return
        if event in FORBIDDEN:
            self.problems.append(f"{event} {arguments!r:.200}")
        paths = list(arguments[: WRITING.get(event, 0)])
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITE_FLAGS:
            paths.append(arguments[0])
        for path in paths:
            if not isinstance(path, str | bytes | os.PathLike) or ".hypothesis" in str(path):
                continue
            folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
            place = os.path.join(os.path.realpath(folder), name)
            allowed = (self.folder / "out", self.folder / "in")
            if not any(Path(place).is_relative_to(each) for each in allowed) and not any(
                place.startswith(each) for each in ("/dev", "/proc")
            ):
                self.problems.append(f"writes outside: {event} {os.fsdecode(path)[:200]}")


FORBIDDEN = (
    *("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"),
    *("socket.connect", "socket.getaddrinfo", "os.chown", "os.mkfifo"),
)
WRITING = {
    **{"os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1},
    **{"os.symlink": 2, "os.link": 2, "os.chmod": 1, "shutil.rmtree": 1},
}
"""Events that change names, and their number of paths."""
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _place(error: BaseException) -> str:
    """The innermost line of the product in a traceback, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [each for each in frames if str(ROOT) in each.filename and ".venv" not in each.filename]
    ours = [each for each in ours if "tests/" not in each.filename] or frames[-1:]
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in (ours[-1], frames[-1])]
    return f"[{' '.join(places)}]"


@contextmanager
def limited_time() -> Iterator[None]:
    """Raises TooLong inside after SECONDS of processor time."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _memory() -> tuple[int, int]:
    """MiB in use now and at most since `_reset_peak`."""
    status = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines["VmRSS"].split()[0]) >> 10, int(lines["VmHWM"].split()[0]) >> 10


def _reset_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def run(target: "Any", seconds: float, start: int, report: Path) -> dict[str, Any]:
    """Reads changed files for some time; returns the row of the table."""
    sandbox = report / f".{target.name}" / "a"
    shutil.rmtree(sandbox.parent, ignore_errors=True)
    inside, out = sandbox / "in", sandbox / "out"
    for folder in (inside, out, sandbox / "outside", sandbox.parent / "modules"):
        folder.mkdir(parents=True)
    (sandbox / "outside" / "kept").write_text("kept")
    module = f"import os\nos.mkdir({str(sandbox / CANARY)!r})\n"
    (sandbox.parent / "modules" / "canary_module.py").write_text(module)
    sys.path.append(str(sandbox.parent / "modules"))
    sys.dont_write_bytecode = True
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.chdir(sandbox)
    target.make(inside)
    valid = {
        str(path.relative_to(inside)): path.read_bytes()
        for path in sorted(inside.rglob("*"))
        if path.is_file()
    }
    names = [name for name in valid if target.changes(name)]
    oracle = Oracle(sandbox)
    target.read(oracle, inside, out)
    assert not oracle.problems, f"valid files: {oracle.problems}"
    assert not oracle.refused or target.is_refused, "valid files are refused"
    sys.addaudithook(oracle.audit)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit + ADDRESS_SPACE, limit + ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    findings: dict[str, int] = {}
    begun, count, slowest, largest = time.process_time(), 0, 0.0, 0

    def one(data: st.DataObject) -> None:
        try:
            check(data)
        finally:  # Also where hypothesis ends an input.
            _restore(inside, valid)

    def check(data: st.DataObject) -> None:
        nonlocal count, slowest, largest
        changed = fuzz_inputs.changed_files(data.draw, inside, names)
        for folder in (out,):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        (out / "link").symlink_to(sandbox / "outside")
        (out / "link.wav").symlink_to(sandbox / "outside" / "new")
        before = _listing(sandbox)
        _reset_peak()
        used, started = _memory()[0], time.process_time()
        oracle.problems, oracle.changed = [], changed
        oracle.is_watching, oracle.draw = True, data.draw
        try:
            with limited_time():
                target.read(oracle, inside, out)
        except TooLong:
            oracle.problems.append("takes too long")
        finally:
            oracle.is_watching = False
        took, grown = time.process_time() - started, _memory()[1] - used
        slowest, largest, count = max(slowest, took), max(largest, grown), count + 1
        if took > SECONDS:
            oracle.problems.append("takes too long")
        if grown > MEBIBYTES:
            oracle.problems.append("takes too much memory")
        if new := _listing(sandbox) - before:
            oracle.problems.append(f"files outside: {sorted(new)[:3]}")
        for problem in oracle.problems:
            key = problem[problem.find("[") :] if problem.endswith("]") else problem[:40]
            findings[key] = findings.get(key, 0) + 1
            if findings[key] == 1:
                place = report / f"{target.name}-{len(findings)}"
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(inside, place)
                note = f"{problem}\nchanged: {changed}\n"
                (place / "finding.txt").write_text(note, errors="backslashreplace")
                sys.stderr.write(f"{target.name}: {problem} {changed}\n")

    batch = 0
    while time.process_time() - begun < seconds:
        batch += 1
        options = settings(
            max_examples=BATCH, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet,
        )  # fmt: skip
        seed(start * 1_000_003 + batch)(options(given(st.data())(one)))()
    row = {
        "target": target.name,
        "inputs": count,
        "refused": oracle.refused,
        "seconds": round(time.process_time() - begun, 1),
        "slowest_seconds": round(slowest, 2),
        "largest_mebibytes": largest,
        "findings": findings,
    }
    (report / f"{target.name}.json").write_text(json.dumps(row, indent=1) + "\n")
    shutil.rmtree(sandbox.parent, ignore_errors=True)
    return row


def _listing(sandbox: Path) -> set[str]:
    """Names outside of the folders that may change."""
    found = {"/outside"} if os.path.exists("/outside") else set()
    for folder, folders, files in os.walk(sandbox.parent):
        if Path(folder) == sandbox:
            folders[:] = [name for name in folders if name not in ("in", "out")]
        found.update(os.path.join(folder, name) for name in (*folders, *files))
    return found


def _restore(folder: Path, valid: dict[str, bytes]) -> None:
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    for name in there - valid.keys():
        (folder / name).unlink()
    for name, content in valid.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def main(names: list[str], seconds: float, start: int, report: Path) -> None:
    """Runs targets, each in a fork of this process, and writes a row of each."""
    import peft.tuners.lora  # noqa: F401
    import transformers.models.llama  # noqa: F401
    from fuzz_targets import TARGETS

    import slm.voice  # noqa: F401

    report.mkdir(parents=True, exist_ok=True)
    for name in names or TARGETS:
        file = report / f"{name}.json"
        file.unlink(missing_ok=True)
        if (child := os.fork()) == 0:
            status = 1
            try:
                run(TARGETS[name], seconds, start, report)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        if status:
            row = {"target": name, "findings": {f"the process ended with {status}": 1}}
            file.write_text(json.dumps(row) + "\n")
        sys.stdout.write(f"{json.dumps(json.loads(file.read_text()))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    chosen, seconds, start, report = sys.argv[1:]
    main([each for each in chosen.split(",") if each != "all"], float(seconds), int(start),
         Path(report).resolve())  # fmt: skip
