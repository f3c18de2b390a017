"""Faults in mid-run: a full disk, a rank that dies, corpus files that vanish, damaged checkpoints,
SIGTERM. A line says what is wrong, and what was good stays: the same command ends as a run without
a fault.

Disks are full for real: a small tmpfs in a mount namespace of the program, filled at a chosen file
operation (tests/launched/disturbed.py).
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from forking import ForkedRun, free_port
from tiny_runs import Program, differences, end_state, log_row, programs
from tiny_slm import quiet
from tiny_teachers import save_speech_teacher

pytestmark = [*quiet(), pytest.mark.timeout(1200)]
DISTURBED = ROOT / "tests" / "launched" / "disturbed.py"
TRAININGS = ("codec", "semantic", "AR", "NAR")
SEED, NUM_FLIPS, NUM_SIGTERMS = 11, 4, 6
FULL = "No space left on device"
LONG = ("optim.steps=60", "optim.save_every=100", "optim.eval_every=100")
"""Metrics of more than a page of the disk before the first checkpoint."""
STEP_4 = ("os.mkdir", ".step-00000004.tmp", 1)

Begin = Callable[..., ForkedRun]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path
) -> dict[str, Program]:  # fmt: skip
    import soundfile
    from conftest import voiced

    def write(path: Path, seconds: float, rate: int = 16_000, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, voiced(seconds, rate, seed), rate)
        return path

    root = tmp_path_factory.mktemp("inputs")
    found = programs(root, tiny_codec_folder, write)
    teacher = save_speech_teacher(root / "hubert", "hubert")
    found["cache"] = Program(
        "cache", "recipes/cache_teachers.py",
        (
            f"cuts=[{root / 'cuts.jsonl.gz'}]", f"speech_model={teacher}", "text_model=null",
            "transcriber=null",
        ),
    )  # fmt: skip
    lines = [{"audio": str(path), "text": "a"} for path in sorted((root / "audio").glob("*.wav"))]
    (root / "recordings.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found["cuts"] = Program(
        "cuts", "recipes/prepare_data.py", ("list", str(root / "recordings.jsonl")), "--out {}"
    )
    return found


@pytest.fixture(scope="module")
def states() -> dict[Any, Any]:
    return {}


@pytest.fixture
def begin(start: Callable[..., ForkedRun]) -> Begin:
    """`begin(program, out, *arguments, config=None, **spec)`; without a spec it is undisturbed."""

    def run(
        program: Program, out: Path, *more: str, config: str | None = None, **spec: Any
    ) -> ForkedRun:
        made = {"folder": str(out), "judge": program.judge, **spec}
        return start(config, DISTURBED, json.dumps(made), *program.command(out), *more)

    return run


@pytest.fixture
def whole(
    begin: Begin, states: dict[Any, Any], tmp_path: Path
) -> Callable[..., dict[str, Any]]:  # fmt: skip
    """The end state of an undisturbed run."""

    def state(program: Program, *more: str, config: str | None = None) -> dict[str, Any]:
        key = (program.name, more, config)
        if key not in states:
            out = tmp_path / "whole"
            done = begin(program, out, *more, config=config).wait()
            assert done.returncode in program.statuses, done.stderr[-3000:]
            states[key] = end_state(out)
        return states[key]

    return state


def error_line(printed: str, most: int = 1) -> str:
    """The last line of what is printed, of which at most this number are errors."""
    assert "Traceback" not in printed, printed[-3000:]
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert 1 <= len(lines) <= most, printed[-3000:]
    assert printed.splitlines()[-1] == lines[-1], printed[-3000:]
    return lines[-1]


# Full disks

KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, str, int], str]] = {
    "checkpoint: weights": ("codec", (), STEP_4, "step-00000004"),
    "checkpoint of adapters": ("AR", (), STEP_4, "step-00000004"),
    "checkpoint: its seal": ("semantic", (), ("open", "whole.json", 2), "step-00000004"),
    "run.json": ("AR", (), ("open", ".run.json", 1), "run.json"),
    "metrics": ("AR", LONG, ("open", "metrics.jsonl", 2), r"metrics\.jsonl|tensorboard"),
    "voice folder": ("AR", (), ("os.mkdir", ".ar.partial", 1), "voice/ar"),
    "codec folder": ("codec", (), ("os.mkdir", ".codec.partial", 1), "/codec"),
    "token shard": ("export", (), ("os.rename", "tokens-00001-of", 1), "tokens-00002-of"),
    "scores of utterances": ("benchmark", (), ("open", "original-", 1), "utterances/original-"),
    "rows.jsonl": ("benchmark", (), ("open", "rows.jsonl", 1), "rows.jsonl"),
    "wave of benchmark": ("benchmark", (), ("os.mkdir", "waves/tiny", 2), "cut-0.wav"),
    "wave of slm tts --list": ("slm tts --list", (), ("os.rename", "t1.wav", 1), "t2.wav"),
    "teacher cache": ("cache", (), ("os.mkdir", "disk", 3), "features-000-00000"),
    "prepared cuts": ("cuts", (), ("os.mkdir", ".partial", 1), "disk"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_named_and_costs_nothing(
    kind: str, made: dict[str, Program], begin: Begin, whole: Callable[..., Any], tmp_path: Path
) -> None:
    name, more, at, named = KINDS[kind]
    program, disk = made[name], tmp_path / "disk"
    expected = whole(program, *more)
    done = begin(program, disk, *more, disk=str(disk), at=at).wait()
    if "unshare" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("no mount namespaces here")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(Path(f"{disk}-report.json").read_text())
    status, printed = report["first"]
    line = error_line(printed)
    assert status == 2
    assert FULL in line
    assert re.search(named, line)
    full, end = Path(f"{disk}-full"), Path(f"{disk}-end")
    left = [str(path.relative_to(full)) for path in full.rglob(".*") if path.name != ".lock"]
    assert not left
    kept = {
        file: value
        for file, value in end_state(full, disk).items()
        if file in expected and not file.endswith((".jsonl", "cache.json"))  # These grow.
    }
    changed = [file for file, value in kept.items() if expected[file] != value]
    found = differences(expected, end_state(end, disk))
    log_row("faults.md", f"full disk: {kind}", f"status {status}", line[:140], found or "equal")
    assert not changed
    assert report["second"][0] in program.statuses, report["second"][1][-3000:]
    assert not found


# Ranks that die


@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        *(("AR", "none"), ("codec", "none"), ("export", "none")),
        *(("AR", "accelerate"), ("export", "accelerate")),
    ],
)
def test_a_rank_that_dies_ends_the_others_with_a_line(
    name: str, launcher: str, made: dict[str, Program], begin: Begin, whole: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    program, out = made[name], tmp_path / "run"
    expected = whole(program, config="ddp")
    is_reached = reached(name, out)
    if launcher == "none":  # As on another machine, whose launcher knows nothing of this one's.
        run = begin(program, out, config="ddp")
        run.run_until(is_reached)
        os.kill(run.pids[1], signal.SIGKILL)
        died = time.monotonic()
        status = wait_for_rank(run, 0, 60)
        printed = run.wait().stderr
    else:
        process = launch(program.command(out), tmp_path / "stderr")
        kill_rank(process, 1, is_reached)
        died = time.monotonic()
        status = process.wait(timeout=60)
        printed = (tmp_path / "stderr").read_text()
    seconds = time.monotonic() - died
    # The rank that is left and the launcher have a line each.
    line = error_line(printed, most=1 if launcher == "none" else 2)
    assert status
    last = begin(program, out, config="ddp").wait()
    assert last.returncode == 0, last.stderr[-3000:]
    found = differences(expected, end_state(out))
    label = f"rank 1 of 2 killed, {name}, launcher: {launcher}"
    log_row("faults.md", label, f"status {status} after {seconds:.0f} s", line, found or "equal")
    assert not found


def reached(name: str, out: Path) -> Callable[[], bool]:
    """Whether a run is in the middle."""
    if name == "export":
        return lambda: any(out.glob("tokens-*.parquet"))
    folder = out / "ar" if name == "AR" else out
    return (folder / "checkpoints" / "step-00000002").exists


def wait_for_rank(run: ForkedRun, rank: int, timeout: float) -> int:
    """Exit status of a rank, which gets no help of a launcher."""
    deadline = time.monotonic() + timeout
    while (status := run.status_of_rank(rank)) is None:
        assert time.monotonic() < deadline, f"hangs: {run.stderr.read_text()[-3000:]}"
        time.sleep(0.05)
    return status


def launch(command: list[str], stderr: Path) -> "subprocess.Popen[str]":
    """A launch by accelerate, as in an environment that `make setup` has made."""
    accelerate = Path(sys.executable).with_name("accelerate")
    config = ROOT / "recipes" / "accelerate" / "ddp.yaml"
    options = ["--config_file", config, "--num_processes", 2, "--main_process_port", free_port()]
    with open(stderr, "w") as file:
        return subprocess.Popen(
            [str(each) for each in (accelerate, "launch", *options, *command)],
            stdout=subprocess.DEVNULL, stderr=file, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip


def kill_rank(
    process: "subprocess.Popen[str]", rank: int, condition: Callable[[], bool]
) -> None:  # fmt: skip
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "ended before a rank was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            child.kill()


# Files that vanish


@pytest.mark.parametrize("name", ["codec", "semantic"])
@pytest.mark.parametrize("share", ["one", "all"])
def test_recordings_that_vanish(
    name: str, share: str, made: dict[str, Program], begin: Begin, whole: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    program, out = made[name], tmp_path / "run"
    expected = whole(program)
    (listed,) = (word for word in program.arguments if word.startswith("train="))
    audio = Path(listed.removeprefix("train=")).parent / "audio"
    gone = audio / "3.wav" if share == "one" else audio
    at = ("os.mkdir", ".step-00000002.tmp", 1)
    done = begin(program, out, at=at, remove=str(gone)).wait()
    Path(f"{gone}-removed").rename(gone)
    if share == "one":
        assert done.returncode == 0, done.stderr[-3000:]
        assert "1 recordings could not be read" in done.stderr
        assert "3.wav" in (out / "skipped.jsonl").read_text()
        line = next(line for line in done.stderr.splitlines() if "could not be read" in line)
        log_row("faults.md", f"a recording vanishes, {name}", "status 0", line, "listed")
        return
    line = error_line(done.stderr)
    assert done.returncode == 2
    assert "none of the recordings" in line
    last = begin(program, out).wait()
    assert last.returncode == 0, last.stderr[-3000:]
    (out / "skipped.jsonl").unlink()
    found = differences(expected, end_state(out))
    log_row("faults.md", f"all recordings vanish, {name}", "status 2", line, found or "equal")
    assert not found


def test_token_shards_that_vanish(
    made: dict[str, Program], begin: Begin, whole: Callable[..., Any], tmp_path: Path
) -> None:
    """Files that are open stay readable; a process that opens them later names the file."""
    program, out = made["AR"], tmp_path / "run"
    expected = whole(program)
    (listed,) = (word for word in program.arguments if word.startswith("train="))
    shard = listed.removeprefix("train=")
    done = begin(program, out, at=STEP_4, remove=shard).wait()
    if done.returncode:
        line = error_line(done.stderr)
        assert shard in line
    again = begin(program, tmp_path / "again").wait()
    line = error_line(again.stderr)
    assert again.returncode == 2
    assert shard in line
    Path(f"{shard}-removed").rename(shard)
    last = begin(program, out).wait()
    assert last.returncode == 0, last.stderr[-3000:]
    found = differences(expected, end_state(out))
    label = f"a token shard vanishes, AR (status {done.returncode}), and at a new start"
    log_row("faults.md", label, "status 2", line, found or "equal")
    assert not found


# Damaged checkpoints


@pytest.mark.parametrize("name", TRAININGS)
def test_damaged_checkpoints(
    name: str, made: dict[str, Program], begin: Begin, whole: Callable[..., Any], tmp_path: Path
) -> None:
    program, out = made[name], tmp_path / "run"
    expected, generator = whole(program), random.Random(f"{name} {SEED}")
    assert begin(program, tmp_path / "good").wait().returncode == 0
    stage = {"AR": "ar", "NAR": "nar"}.get(name, "")

    def damage(checkpoint: Path, cut: bool) -> None:
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        path = generator.choice([each for each in files if each.stat().st_size > 1])
        content = bytearray(path.read_bytes())
        place = generator.randrange(len(content))
        content[place] ^= 1 << generator.randrange(8)
        path.write_bytes(content[: len(content) // 2] if cut else content)

    wrong = []
    for number in range(NUM_FLIPS + 1):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "good", out)
        before, newest = sorted((out / stage / "checkpoints").glob("step-*"))
        damage(newest, cut=number == 0)
        done = begin(program, out).wait()
        stated = f"{newest}: " in done.stderr and "the newest complete checkpoint is used" in (
            done.stderr
        )
        resumed = f"resuming from {before}" in done.stderr
        found = differences(expected, end_state(out))
        if done.returncode or not stated or not resumed or found:
            wrong.append((number, done.returncode, stated, resumed, found, done.stderr[-800:]))
    damage(before, cut=False)
    damage(newest, cut=True)
    done = begin(program, out).wait()
    line = error_line(done.stderr)
    assert done.returncode == 2
    assert "no checkpoint is complete" in line
    assert before.exists()
    assert newest.exists()
    log_row(
        "faults.md", f"newest checkpoint: 1 cut in half, {NUM_FLIPS} with a flipped bit, {name}",
        "status 0", f"{NUM_FLIPS + 1 - len(wrong)} stated, resumed from the one before", "equal",
    )  # fmt: skip
    log_row("faults.md", f"both checkpoints damaged, {name}", "status 2", line[:160], "both stay")
    assert not wrong


# SIGTERM


@pytest.mark.parametrize("name", TRAININGS)
def test_sigterm_at_random_moments(
    name: str, made: dict[str, Program], begin: Begin, whole: Callable[..., Any], tmp_path: Path
) -> None:
    """A training saves a checkpoint and ends with 143; what is before and after ends at once."""
    program, generator = made[name], random.Random(f"{name} {SEED}")
    expected = whole(program)
    begun = time.monotonic()
    assert begin(program, tmp_path / "timed").wait().returncode == 0
    seconds, statuses, wrong = time.monotonic() - begun, [], []
    for number in range(NUM_SIGTERMS):
        out = tmp_path / f"run-{number}"
        run, moment = begin(program, out), time.monotonic() + generator.uniform(0.1, 1.0) * seconds
        # Every other one is in the loop, which is short: after the first line of its metrics.
        in_loop = number % 2 == 1
        while run.poll() is None and (in_loop or time.monotonic() < moment):
            if in_loop and any(out.rglob(f"{'nar/' if name == 'NAR' else ''}metrics.jsonl")):
                break
            time.sleep(0.002)
        if run.poll() is None:
            run.interrupt(signal.SIGTERM)
        done = run.wait()
        statuses.append(done.returncode)
        saved = "the same command continues" in done.stderr
        if done.returncode not in (0, 143, -15) or saved != (done.returncode == 143):
            wrong.append((number, done.returncode, done.stderr[-800:]))
        last = begin(program, out).wait()
        if last.returncode or (found := differences(expected, end_state(out))):
            wrong.append((number, last.returncode, found, last.stderr[-800:]))
    counts = {each: statuses.count(each) for each in sorted(set(statuses))}
    log_row(
        "faults.md", f"SIGTERM at {NUM_SIGTERMS} moments, {name}", f"statuses {counts}",
        "143: a checkpoint is saved; -15: not in the training loop", "equal" if not wrong else "!",
    )  # fmt: skip
    assert not wrong
    assert 143 in statuses
