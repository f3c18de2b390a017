"""Commands one after the other."""

import sys

import pytest

from recipes.lib.commands import HERE, Step, launch, run, shown


def test_a_command_is_shown_as_one_would_type_it(capsys: pytest.CaptureFixture) -> None:
    step = Step("say it", [sys.executable, "-c", "print('a b')"])
    assert run(step, 1, 2) == "a b\n"
    told = capsys.readouterr().out
    assert "[1/2] say it" in told
    assert "python -c 'print('\"'\"'a b'\"'\"')'" in told
    assert shown([sys.executable, "-m", "slm", "tts"]) == "slm tts"
    assert shown([sys.executable, "-m", "codec", "info"]) == "codec info"
    told = shown(launch("cpu", 1, "tts.py", f"out={HERE}/x"))
    assert told.startswith("accelerate launch --config_file recipes/accelerate/cpu.yaml")
    assert "recipes/tts.py" in told


def test_a_step_that_fails_stops_the_others() -> None:
    with pytest.raises(ValueError, match="the step 'fail' failed"):
        run(Step("fail", [sys.executable, "-c", "raise SystemExit(3)"]), 1, 1)
