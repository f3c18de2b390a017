"""recipes/tools/plot_curves.py: what a run folder's metrics become."""

import json
from pathlib import Path

import numpy as np
import pytest

from recipes.tools.plot_curves import Curve, main, read_stage, smoothed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def write_run(folder: Path, *, hours: float | None = 0.5, torn: bool = False) -> Path:
    """A run with four train lines and two dev lines of two tasks, and a NAR."""
    for stage, groups in (("ar", ("tts", "asr")), ("nar", ("codebook_2",))):
        (folder / stage).mkdir(parents=True)
        lines = []
        for step in (10, 20, 30, 40):
            losses = {f"train/{group}_loss": 5 - step / 10 for group in groups}
            lines.append({"step": step, "train/loss": 1.0, **losses})
            if step % 20 == 0:
                lines.append({"step": step, **{f"dev/{group}_loss": 6.0 for group in groups}})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / stage / "metrics.jsonl").write_text(text + ('{"step": 50, "tr' if torn else ""))
        if hours is not None:
            (folder / stage / "seen.json").write_text(json.dumps({"hours_per_step": hours}))
    return folder


def test_several_runs_in_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = write_run(tmp_path / "first", torn=True)
    second = write_run(tmp_path / "second", hours=None)
    out = tmp_path / "pictures" / "curves.png"
    main([f"runs=[{first},{second}]", "names=[one,two]", f"out={out}", "smooth=2"])
    assert out.read_bytes().startswith(b"\x89PNG")
    last = json.loads(capsys.readouterr().out)["last"]
    assert last["one"] == last["two"]
    assert last["one"]["train/tts"] == 1.0
    assert last["one"]["dev/codebook_2"] == 6.0


def test_some_columns_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    run, titles = write_run(tmp_path / "run"), []
    monkeypatch.setattr(Axes, "set_title", lambda _, title, **__: titles.append(title))
    main([f"runs=[{run}]", f"out={tmp_path}/a.png", "panels=[codebook_2,asr]"])
    assert titles == ["ar: asr", "nar: codebook_2"]
    with pytest.raises(ValueError, match="no tt; they have tts, asr, codebook_2"):
        main([f"runs=[{run}]", f"out={tmp_path}/a.png", "panels=[tt]"])


def test_a_stage_has_a_curve_for_each_task(tmp_path: Path) -> None:
    stage = read_stage(write_run(tmp_path / "run") / "ar")
    assert set(stage.train) == set(stage.dev) == {"tts", "asr"}
    assert stage.train["tts"].steps.tolist() == [10, 20, 30, 40]
    assert stage.train["tts"].losses.tolist() == [4, 3, 2, 1]
    assert stage.dev["asr"].steps.tolist() == [20, 40]
    assert stage.hours_per_step == 0.5


def test_smoothing_keeps_a_constant_and_the_number_of_points() -> None:
    curve = Curve(np.arange(5), np.full(5, 2.0))
    assert smoothed(curve, 3).losses == pytest.approx([2.0] * 5)
    assert smoothed(Curve(np.arange(2), np.array([1.0, 3.0])), 9).losses.shape == (2,)


def test_what_people_get_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing: no ar/metrics\.jsonl"):
        main([f"runs=[{tmp_path}/nothing]"])
    with pytest.raises(ValueError, match="2 runs, but 1 names"):
        main(["runs=[a,b]", "names=[c]"])
    with pytest.raises(ValueError, match="given twice"):
        main(["runs=[a,a]"])
