"""Thousands of requests to one voice, many threads on it, and two processes on one folder.

`make soak SOAK=tests/soak/test_long_runs.py`; the tables go to out/soak/long_runs.md. REQUESTS is
the number of requests to the tiny voice (10,000).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import voiced
from tiny_slm import save_voice

from codec.program import CHECKS_FAILED
from codec.tokens import TokenShard
from slm.models.ar import load_base

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "launched" / "many_requests.py"
SHIPPED = ROOT / "models" / "small"
REQUESTS = int(os.environ.get("REQUESTS", 10_000))
GROWTH_MIB = 16.0
"""Maximum growth of the resident memory after the warm-up, at any number of requests."""
THREADS = 24


@pytest.fixture(scope="module")
def table() -> Callable[[str], None]:
    """Adds lines to the table."""
    file = ROOT / "out" / "soak" / "long_runs.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")

    def add(text: str) -> None:
        with file.open("a") as opened:
            opened.write(f"{text}\n")

    return add


@pytest.fixture
def voice(tmp_path: Path, tiny_codec_folder: Path) -> Path:
    return save_voice(tmp_path, tiny_codec_folder)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    folder.mkdir()
    soundfile.write(folder / "speech.wav", voiced(0.5), 16_000)
    soundfile.write(folder / "long.wav", voiced(1.5), 16_000)
    (folder / "bad.wav").write_bytes(b"RIFF")
    return folder


def found(run: Any, timeout: float) -> dict[str, Any]:
    done = run.wait(timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check_flat(run: dict[str, Any], name: str, table: Callable[[str], None]) -> None:
    """Memory, descriptors and threads after the warm-up are those at the end."""
    points = run["points"]
    table(f"\n{name}: {run['seconds']:.0f} s\n\n| requests | RSS, MiB | descriptors | threads |")
    table("|---|---|---|---|")
    for one in points:
        table(
            f"| {one['requests']:,} | {one['mib']:.1f} | {one['descriptors']} | {one['threads']} |"
        )
    first, last = points[0], points[-1]
    assert last["mib"] <= first["mib"] + GROWTH_MIB
    assert last["descriptors"] <= first["descriptors"]
    assert last["threads"] <= first["threads"]


def test_threads_on_one_voice(
    voice: Path, recordings: Path, start: Callable, table: Callable[[str], None]
) -> None:
    run = found(start(None, PROGRAM, "threads", voice, recordings, 48, THREADS), timeout=3500)
    table(
        f"\n{THREADS} threads: {run['requests']:,} requests in {run['seconds']:.0f} s; one thread: "
        f"{run['requests'] // THREADS} in {run['alone']:.1f} s; {run['mib']:.1f} MiB at the end; "
        f"different or failed: {run['different'] or 'none'}"
    )
    assert run["different"] == []


def two(start: Callable, *command: Any) -> list[Any]:
    """Two processes of one command at the same time: what they printed."""
    runs = [start(None, *command) for _ in range(2)]
    return sorted((run.wait(600) for run in runs), key=lambda done: done.returncode)


def test_two_lists_into_one_folder(
    voice: Path, tmp_path: Path, start: Callable, table: Callable[[str], None]
) -> None:
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    names = [str(number) for number in range(20)]
    lines = [{"id": name, "text": "the cat sat on a mat", "prompt": "ann"} for name in names]
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["tts", "--voice", voice, "--list", listed, "--out", out, "--max-attempts", "1"]
    runs = two(start, ROOT / "slm" / "__main__.py", *command)
    statuses = [run.returncode for run in runs]
    table(f"\ntwo of `slm tts --list`: {statuses[0]} and {statuses[1]}")
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    is_failed = any(record["failure"] for record in records)
    assert statuses == sorted([2, CHECKS_FAILED if is_failed else 0])
    assert "another process is running in this folder" in runs[statuses.index(2)].stderr
    assert sorted(record["id"] for record in records) == sorted(names)
    assert sorted(path.stem for path in out.glob("*.wav")) == sorted(names)
    assert all(soundfile.info(path).frames > 0 for path in out.glob("*.wav"))


def test_two_encode_one_shard(
    tiny_codec_folder: Path, tmp_path: Path, start: Callable, table: Callable[[str], None]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(40):
        soundfile.write(folder / f"{number}.wav", voiced(1.0, seed=number), 16_000)
    out = tmp_path / "tokens.parquet"
    done, refused = two(
        start, ROOT / "codec" / "__main__.py", "encode", "--codec", tiny_codec_folder, folder,
        "--out", out,
    )  # fmt: skip
    table(f"\ntwo of `codec encode`: {done.returncode} and {refused.returncode}")
    assert (done.returncode, refused.returncode) == (0, 2)
    assert "exists already" in refused.stderr
    assert sorted(TokenShard.open(out).ids) == sorted(str(number) for number in range(40))
    assert {path.name for path in tmp_path.iterdir()} == {"in", "tokens.parquet"}


def test_two_exports_into_one_folder(
    voice: Path, tmp_path: Path, start: Callable, table: Callable[[str], None]
) -> None:
    out = tmp_path / "exported"
    done = two(start, ROOT / "slm" / "__main__.py", "export", "--voice", voice, out)
    statuses = [one.returncode for one in done]
    table(f"\ntwo of `slm export`: {statuses[0]} and {statuses[1]}")
    assert statuses in ([0, 0], [0, 2])  # The second may begin after the first one's end.
    if statuses[1]:
        assert "another process is writing this folder" in done[1].stderr
    assert load_base(out).lm.num_parameters() > 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_two_trainings_in_one_folder(
    tmp_path: Path, start: Callable, table: Callable[[str], None]
) -> None:
    out, loop = tmp_path / "run", ROOT / "tests" / "launched" / "tiny_loop.py"
    done, refused = two(start, loop, out, -1, 300)
    table(f"\ntwo trainings: {done.returncode} and {refused.returncode}")
    assert (done.returncode, refused.returncode) == (0, 2)
    assert "another process is running in this folder" in refused.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert steps[-1] == 300


def test_requests_leave_nothing_behind(
    voice: Path, recordings: Path, start: Callable, table: Callable[[str], None]
) -> None:
    mode = ["requests", voice, recordings, REQUESTS, REQUESTS // 10]
    run = found(start(None, PROGRAM, *mode), timeout=3500)
    assert sum(run["kinds"].values()) == REQUESTS
    assert len(run["kinds"]) == 24
    check_flat(run, f"tiny voice, {REQUESTS:,} requests of 24 kinds", table)


@pytest.mark.skipif(
    not (ROOT / "models" / "smollm2-135m-instruct").is_dir(), reason="needs `make models`"
)
def test_requests_to_the_shipped_voice(
    recordings: Path, start: Callable, table: Callable[[str], None]
) -> None:
    # The longest requests of some hundred are still to come after the first fifth.
    count = min(600, REQUESTS)
    run = found(start(None, PROGRAM, "requests", SHIPPED, recordings, count, count // 2), 3500)
    check_flat(run, f"models/small, {count} requests", table)
