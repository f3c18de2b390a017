"""recipes/scoring/systems.py: commands of other systems."""

import sys
from pathlib import Path

import pytest

from recipes.scoring.systems import command_words, run_lines

LINES = [{"id": "a", "text": "one; touch $(x) two"}, {"id": "b/c", "text": "'"}]
TO_FILE = f"{sys.executable} -S -c 'import sys; open(sys.argv[2], chr(119)).write(sys.argv[1])'"
"""Writes its first argument to the file that the second one names."""


def test_fields_are_replaced_within_words_and_no_shell_reads_them(tmp_path: Path) -> None:
    words = command_words(f"{TO_FILE} say:{{text}}! {{out}}", ("text", "out"), ("text", "out"))
    made = run_lines(words, LINES, tmp_path / "runs")
    assert [Path(one["audio"]).read_text() for one in made] == [
        f"say:{line['text']}!" for line in LINES
    ]
    assert [one["failure"] for one in made] == [None, None]
    assert {Path(one["audio"]).parent for one in made} == {tmp_path / "runs"}


def test_what_is_made_is_kept_until_the_command_or_the_line_changes(tmp_path: Path) -> None:
    log, script = tmp_path / "log", tmp_path / "count.py"
    script.write_text(f"print(open({str(log)!r}, 'a').write('x'))")
    count = f"{sys.executable} -S {script}"

    def runs(command: str, lines: list[dict[str, str]], processes: int = 1) -> int:
        log.write_text("")
        made = run_lines(command_words(command, ("id",), ()), lines, tmp_path / "runs", processes)
        assert [one["id"] for one in made] == [line["id"] for line in lines]
        assert [one["hypothesis"] for one in made] == ["1"] * len(lines)
        return len(log.read_text())

    assert [runs(count, LINES), runs(count, LINES)] == [2, 0]
    changed = [LINES[0], {**LINES[1], "text": "other"}]
    assert [runs(count, changed, 2), runs(count, changed, 2)] == [1, 0]
    assert [runs(f"{count} {{id}}", LINES), runs(f"{count} {{id}}", LINES[:1])] == [2, 0]
    assert runs(f"{count} {{id}}", LINES) == 0  # A shorter list forgets nothing.


def test_failures_are_of_their_line(tmp_path: Path) -> None:
    script = "import sys; sys.exit(sys.argv[1])"
    made = run_lines(
        command_words(f"{sys.executable} -S -c '{script}' {{text}} {{out}}", ("text", "out"), ()),
        LINES[:1], tmp_path,
    )  # fmt: skip
    assert made[0]["audio"] is None
    assert made[0]["failure"] == f"status 1: {LINES[0]['text']}"
    made = run_lines(["true", "{out}"], LINES[:1], tmp_path)
    assert made[0]["failure"] == "no wave was written"


def test_failures_are_tried_again(tmp_path: Path) -> None:
    flag, script = tmp_path / "flag", "import sys; print(open(sys.argv[1]).read())"
    words = [sys.executable, "-S", "-c", script, str(flag)]
    assert run_lines(words, LINES[:1], tmp_path / "r")[0]["failure"] is not None
    flag.write_text("well")
    (made,) = run_lines(words, LINES[:1], tmp_path / "r")
    assert (made["hypothesis"], made["failure"]) == ("well", None)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("say {txt} {out}", r"\{txt\} is no field; the fields are \{text\}, \{out\}"),
        ("say {text}", r"the command has no \{out\}"),
        ("say 'x", "No closing quotation"),
        ("", "the command is empty"),
    ],
)
def test_bad_commands(command: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command_words(command, ("text", "out"), ("text", "out"))


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no program 'no-such-program'"):
        run_lines(["no-such-program", "{out}"], LINES, tmp_path)
