"""Names of files that utterances and systems give."""

from pathlib import Path

import pytest

from recipes.scoring import judges as scoring


@pytest.mark.parametrize(
    "name", ["../../esc", "/etc/passwd", ".hidden", "a/b", "a\\b", "", "x" * 300]
)
def test_an_id_never_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    safe = scoring.safe_name(name)
    assert (tmp_path / f"{safe}.wav").resolve().parent == tmp_path.resolve()
    assert 0 < len(safe) <= 120
    assert safe[0] != "."
    assert "/" not in safe
    assert "\\" not in safe


def test_names_of_files_do_not_collide() -> None:
    names = ["a/b", "a-b", "a b", "a\\b", "a:b", ".a", "a", "../a", "a/", "x" * 200, "x" * 201]
    assert len({scoring.safe_name(name) for name in names}) == len(names)
    assert scoring.safe_name("84-121123-0001_a.b") == "84-121123-0001_a.b"
