"""recipes/scoring/judges.py: file names of utterances and systems."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_teachers import save_ctc

from recipes.scoring.judges import load_judges, safe_name


@pytest.mark.parametrize(
    "name", ["../../esc", "/etc/passwd", ".hidden", "a/b", "a\\b", "", "x" * 300]
)
def test_safe_name_never_escapes_the_folder(name: str, tmp_path: Path) -> None:
    safe = safe_name(name)
    assert (tmp_path / f"{safe}.wav").resolve().parent == tmp_path.resolve()
    assert 0 < len(safe) <= 120
    assert safe[0] != "."
    assert "/" not in safe
    assert "\\" not in safe


def test_safe_names_do_not_collide() -> None:
    names = ["a/b", "a-b", "a b", "a\\b", "a:b", ".a", "a", "../a", "a/", "x" * 200, "x" * 201]
    assert len({safe_name(name) for name in names}) == len(names)
    assert safe_name("84-121123-0001_a.b") == "84-121123-0001_a.b"


@pytest.mark.filterwarnings("default")
def test_any_judge_is_loaded_and_named(tmp_path: Path) -> None:
    folder = save_ctc(tmp_path / "ctc")
    judges = load_judges(folder, None, num_threads=1, language="de")
    assert judges.judge_name.startswith("ctc@")
    assert (judges.embed, judges.speaker_name) == (None, "")
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, 16000).astype(np.float32)
    assert judges.transcribe(wave, 16000)
    assert load_judges(None, None).transcribe is None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 2**14}))
    with pytest.raises(ValueError, match=r"ctc: its configuration asks for \d+ values"):
        load_judges(folder, None)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000"):
        load_judges(folder, None)
