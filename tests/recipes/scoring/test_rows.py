from pathlib import Path

import pytest

from eval.benchmark import Provenance, rows_of, score_asr
from recipes.scoring.rows import append_rows, read_rows


def test_incomplete_last_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    first = rows_of("dev", [score_asr("a", "x", "x")], Provenance(system="s"))
    append_rows(path, first)
    with open(path, "a") as file:
        file.write('{"system": "half a li')
    assert read_rows(path) == first
    append_rows(path, first)
    assert read_rows(path) == first + first


def test_line_that_is_no_row_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"system": "s"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1"):
        read_rows(tmp_path / "rows.jsonl")
