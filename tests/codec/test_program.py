import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from codec.program import ArgumentParser, ReportedElsewhere, did_you_mean, reason_of, run_program

PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("codec", "slm", "recipes")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
    and "synthetic_config(" not in path.read_text()
    # `make setup` runs this one, which has no options.
    and path.name != "launcher.py"
)
LIGHT = """
from codec.program import run_program
class Stopped(KeyboardInterrupt): ...
class Ended(KeyboardInterrupt): status = 143
"""


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )


# Exit status


@pytest.mark.parametrize(
    ("raised", "status", "printed"),
    [
        ("ValueError('a=1: no such key')", 2, "error: a=1: no such key\n"),
        ("OSError('disk full')", 2, "error: disk full\n"),
        ("ValueError('x' * 5000)", 2, f"error: {'x' * 4000}...\n"),
        ("ValueError('of another\\n library\\n')", 2, "error: of another library\n"),
        ("KeyboardInterrupt", 130, "interrupted\n"),
        ("Stopped('stopped at step 3')", 130, "stopped at step 3\n"),
        ("Ended('stopped at step 3')", 143, "stopped at step 3\n"),
        ("BrokenPipeError('of a worker')", 2, "error: of a worker\n"),
        ("SystemExit(3)", 3, ""),
    ],
)  # fmt: skip
def test_a_program_ends_with_its_status_and_one_line(
    raised: str, status: int, printed: str
) -> None:
    done = python(LIGHT + f"def program(): raise {raised}\nrun_program(program)")
    assert (done.returncode, done.stdout, done.stderr) == (status, "", printed)


def test_an_internal_error_shows_its_traceback() -> None:
    done = python(LIGHT + "run_program(lambda: {}['key'])")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    mistake = LIGHT + "run_program(lambda: int('x'))"
    done = python(mistake, PARLANCE_TRACEBACK="1")
    assert "Traceback" in done.stderr


def test_a_user_error_of_a_launch_is_printed_by_its_first_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    def status(error: Exception) -> int:
        def program() -> None:
            raise error

        with pytest.raises(SystemExit) as stopped:
            run_program(program)
        return stopped.value.code

    assert status(ReportedElsewhere("of the main process")) == 2
    assert capsys.readouterr().err == ""
    assert not waited
    # The launcher ends the other ranks meanwhile; an error of this rank alone is printed.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert status(ValueError("of this rank")) == 2
    assert waited == [5.0]
    assert capsys.readouterr().err == "error: of this rank\n"


# Closed output


@pytest.fixture(scope="session")
def helped() -> dict[str, tuple[int, str]]:
    """Status and errors of every program's --help with a closed standard output."""
    script = ROOT / "tests" / "launched" / "help_of_programs.py"
    command = [sys.executable, str(script), *PROGRAMS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_into_a_closed_pipe_prints_no_error(
    program: str, helped: dict[str, tuple[int, str]]
) -> None:
    assert tuple(helped[program]) == (141, "")


def test_a_reader_that_stops_early_gets_no_error() -> None:
    line = f"'{sys.executable}' -m codec info models/small/codec | head -n 1"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


# Interrupts


@pytest.mark.parametrize("program", ["-m slm asr --voice v rec.wav", "recipes/tts.py"])
def test_an_interrupt_prints_one_line(program: str, tmp_path: Path) -> None:
    """While a command runs (slm imports torch only then), and while a recipe's imports do."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "torch.py").write_text(f"open({str(fifo)!r}).read()")
    process = subprocess.Popen(
        [sys.executable, *program.split()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        # A shell's background jobs, and what they start, ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process, open(fifo, "w"):  # Waits until the program opens it too.
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")


# Suggestions


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("optim.learning_rate", ["optim.lr"]),
        ("optim.lrr", ["optim.lr"]),
        ("learning_rate", ["nar_optim.lr", "optim.lr"]),
        ("lr", ["nar_optim.lr", "optim.lr"]),
        ("ar.model", ["ar.base"]),
        ("ar.lora.ranks", ["ar.lora.rank"]),
        ("output", ["out"]),
        ("--output", ["out"]),
        ("ouput", ["out"]),
        ("output_dir", ["out"]),
        ("optim.batch_size", []),
        ("zzz", []),
    ],
)
def test_a_wrong_name_suggests_the_right_one(name: str, suggested: list[str]) -> None:
    known = ["out", "train", "ar.base", "ar.lora.rank", "optim.lr", "optim.steps", "nar_optim.lr"]
    text = f"; did you mean {' or '.join(suggested)}?" if suggested else ""
    assert did_you_mean(name, known) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tts --output x", "--output: no such option; did you mean --out? (`slm tts --help`"),
        ("tts --promt-text=x", "--promt-text: no such option; did you mean --prompt-text?"),
        ("tts", "the following arguments are required: --out"),
        ("ttss --out x", "argument COMMAND: invalid choice: 'ttss'"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser(prog="slm")
    tts = parser.add_subparsers(metavar="COMMAND").add_parser("tts")
    tts.add_argument("--out", required=True)
    tts.add_argument("--prompt-text")
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(arguments.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1


def test_abbreviated_flags_still_parse() -> None:
    parser = ArgumentParser()
    parser.add_argument("--prompt-text")
    assert parser.parse_args(["--prompt", "-- no flag"]).prompt_text == "-- no flag"


def test_reasons_have_one_line_and_no_class_name() -> None:
    assert reason_of(KeyError("id")) == "it lacks 'id'"
    assert reason_of(ValueError("two\n  lines")) == "two lines"
    assert reason_of(EOFError()) == "its content is not as expected"
