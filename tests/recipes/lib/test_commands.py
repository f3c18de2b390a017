"""Commands one after the other."""

import sys

import pytest

from recipes.lib.commands import HERE, Command, launch, run, shown


def test_a_command_is_printed_as_a_user_types_it(capsys: pytest.CaptureFixture) -> None:
    command = Command("synthesize", [sys.executable, "-c", "print('a b')"])
    assert run(command, 1, 2) == "a b\n"
    printed = capsys.readouterr().out
    assert "[1/2] synthesize" in printed
    assert "python -c 'print('\"'\"'a b'\"'\"')'" in printed
    assert shown([sys.executable, "-m", "slm", "tts"]) == "slm tts"
    assert shown([sys.executable, "-m", "codec", "info"]) == "codec info"
    printed = shown(launch("cpu", 1, "tts.py", f"out={HERE}/x"))
    assert printed.startswith("accelerate launch --config_file recipes/accelerate/cpu.yaml")
    assert "recipes/tts.py" in printed


def test_a_failed_command_raises() -> None:
    with pytest.raises(ValueError, match="the step 'fail' failed"):
        run(Command("fail", [sys.executable, "-c", "raise SystemExit(2)"]), 1, 1)
    # What `slm` generated failed its checks; its output states that.
    printed = run(Command("check", [sys.executable, "-c", "print(7); raise SystemExit(3)"]), 1, 1)
    assert printed == "7\n"
