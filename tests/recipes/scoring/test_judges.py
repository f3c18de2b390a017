"""recipes/scoring/judges.py: file names of utterances and systems."""

from pathlib import Path

import pytest

from recipes.scoring.judges import safe_name


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
