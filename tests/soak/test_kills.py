"""kill -9 at random moments of every program that writes for long: once resumed to its end, it has
written what an undisturbed run writes, and nothing else.

Half of the moments are at a random time, half before a file operation: first a kind of operation is
drawn (rename of a temporary file, for instance), then one of them. A killed run is resumed, and
perhaps killed again, until it ends; then another one begins.
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from forking import ForkedRun
from tiny_runs import Program, differences, end_state, log_row, programs
from tiny_slm import quiet

pytestmark = quiet()
DISTURBED = ROOT / "tests" / "launched" / "disturbed.py"
MOMENTS, SEED = 20, 7
NAMES = ("codec", "semantic", "AR", "NAR", "export", "benchmark", "slm tts --list")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Program]:
    return {}


@pytest.fixture
def program(
    request: pytest.FixtureRequest, made: dict[str, Program], tiny_codec_folder: Path,
    write_wav: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory,
) -> Program:  # fmt: skip
    if not made:
        made.update(programs(tmp_path_factory.mktemp("inputs"), tiny_codec_folder, write_wav))
    return made[request.param]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("program", NAMES, indirect=True)
def test_killed_at_random_moments_it_ends_as_if_never_killed(
    program: Program, tmp_path: Path, start: Callable[..., ForkedRun]
) -> None:
    def begin(out: Path, kill_at: int = 0, report: str = "") -> ForkedRun:
        spec = {"folder": str(out), "kill_at": kill_at, "report": report, "judge": program.judge}
        return start(None, DISTURBED, json.dumps(spec), *program.command(out))

    begun = time.monotonic()
    whole, report = tmp_path / "whole", tmp_path / "report"
    done = begin(whole, report=str(report)).wait()
    assert done.returncode in program.statuses, done.stderr[-3000:]
    status, seconds = done.returncode, time.monotonic() - begun
    places: dict[str, list[int]] = {}
    for number, operation in enumerate(json.loads(report.read_text()), start=1):
        places.setdefault(operation, []).append(number)
    expected = end_state(whole)
    generator = random.Random(f"{program.name} {SEED}")
    kills, chains, wrong, most = 0, 0, [], 0
    while kills < MOMENTS:
        out, in_row = tmp_path / f"killed-{chains}", 0
        while True:
            by_operation = kills % 2 == 0
            if kills == MOMENTS:
                run = begin(out)
            elif by_operation:
                kind = generator.choice(sorted(places))
                run = begin(out, kill_at=generator.choice(places[kind]))
            else:
                run = begin(out)
                moment = time.monotonic() + generator.uniform(0.0, seconds)
                while run.poll() is None and time.monotonic() < moment:
                    time.sleep(0.002)
                if run.poll() is None:
                    run.kill()
            done = run.wait()
            if done.returncode != -9:
                break
            kills, in_row = kills + 1, in_row + 1
        most = max(most, in_row)
        chains += 1
        found = differences(expected, end_state(out))
        if done.returncode != status or found:
            wrong.append((in_row, done.returncode, found, done.stderr[-500:]))
    log_row(
        "kills.md", program.name, kills, f"{chains} ({most} kills in a row at most)",
        chains - len(wrong), f"{sum(map(len, places.values()))} operations of {len(places)} kinds",
        f"{time.monotonic() - begun:.0f} s",
    )  # fmt: skip
    assert not wrong, wrong
