"""recipes/scoring/judges.py: file names of utterances and systems; skipped utterances."""

from pathlib import Path

import pytest

from codec.io import WriteError
from codec.json_lines import read_json_lines
from eval.benchmark import ScoredUtterance
from recipes.scoring.judges import Task, safe_name, score_all


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


def test_utterances_that_cannot_be_scored_are_listed(tmp_path: Path) -> None:
    def fails() -> ScoredUtterance:
        raise ValueError("a.wav is silent")

    def scores() -> ScoredUtterance:
        return ScoredUtterance(id="b", values={"stoi": 0.5})

    with pytest.raises(ValueError, match=r"of ours could be scored: a\.wav is silent$"):
        score_all(tmp_path, [Task("a", fails)], "key", "ours")
    (kept,) = score_all(tmp_path, [Task("a", fails), Task("b", scores)], "key", "ours")
    assert kept.values == {"stoi": 0.5}
    (line,) = read_json_lines(tmp_path / "skipped-ours.jsonl")
    assert line.value == {"id": "a", "reason": "a.wav is silent"}


def test_a_full_disk_ends_the_scoring_and_costs_no_utterance(tmp_path: Path) -> None:
    def write() -> None:
        raise WriteError("a.wav: cannot be written (No space left on device)")

    with pytest.raises(WriteError, match=r"a\.wav"):
        score_all(tmp_path, [Task("a", write)], "key", "label")  # type: ignore[arg-type]
    assert not (tmp_path / "skipped-label.jsonl").exists()
