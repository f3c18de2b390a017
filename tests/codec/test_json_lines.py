import gzip
import json
import resource
from pathlib import Path

import pytest

from codec.io import WriteError
from codec.json_lines import (
    MAX_LINE_BYTES,
    append_json_lines,
    decode_utf8,
    read_appended,
    read_json_lines,
    scan_json_lines,
    to_json_line,
    write_json_lines,
)

ODD = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\r\nh \U0001f600"
"""Characters at which str.splitlines ends lines, and others."""


def values(path: Path) -> list[object]:
    return [line.value for line in read_json_lines(path)]


@pytest.mark.parametrize("name", ["l.jsonl", "l.jsonl.gz"])
def test_records_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    records = [{"text": ODD}, {"n": [1, 0.1, None, True]}, [], "x"]
    write_json_lines(tmp_path / name, records)
    assert values(tmp_path / name) == records
    before = (tmp_path / name).read_bytes()
    write_json_lines(tmp_path / name, records)
    assert (tmp_path / name).read_bytes() == before


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"t": "a\u2028b\u2029c\u0085d"}\r\n\n \t\n{"t": 2}', encoding="utf-8")
    assert [(line.number, line.value) for line in read_json_lines(path)] == [
        (1, {"t": "a\u2028b\u2029c\u0085d"}),
        (4, {"t": 2}),
    ]
    # What is written can also be read by programs that end lines at these.
    assert len(to_json_line({"t": ODD}).splitlines()) == 1


def test_a_byte_order_mark_costs_no_line(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"t": 1}\n\xef\xbb\xbf{"t": 2}\n')
    assert values(path) == [{"t": 1}, {"t": 2}]


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", r"l\.jsonl: is UTF-16, not UTF-8; convert it to UTF-8: iconv -f UTF-16 -t"),
        ("utf-32", r"l\.jsonl: is UTF-32, not UTF-8"),
        ("utf-16-le", r"l\.jsonl: is no text in UTF-8 \(a zero byte in line 1\); .* UTF-16LE"),
        ("latin-1", r"l\.jsonl: is not UTF-8 \(byte 0xe4 in line 2\); .*iconv -f LATIN1 -t UTF-8"),
    ],
)
def test_another_encoding_is_an_error_with_its_remedy(
    tmp_path: Path, encoding: str, message: str
) -> None:
    path = tmp_path / "l.jsonl"
    path.write_bytes('{"t": "b"}\n{"t": "\u00e4"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=message):
        list(scan_json_lines(path))
    with pytest.raises(ValueError, match=message):
        decode_utf8(path.read_bytes(), path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "no JSON"),
        ('{"t": NaN}', "NaN is no number of JSON"),
        ('{"t": -Infinity}', "-Infinity is no number of JSON"),
        ('{"t": 1e999}', "1e999 is too large"),
        ('{"t": "\\ud800"}', r"half of a surrogate pair \(\\ud800\)"),
        ("[" * 100_000, "nested too deeply"),
        ('{"t": 1', "no JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text(f"1\n\n{text}\n4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"l\.jsonl, line 3: .*{message}"):
        list(read_json_lines(path))
    assert [line.number for line in scan_json_lines(path) if line.error is None] == [1, 4]


def test_files_that_are_missing_damaged_or_no_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no\.jsonl: no such file"):
        list(read_json_lines(tmp_path / "no.jsonl"))
    content = gzip.compress(b'{"t": "' + bytes(range(65, 91)) * 9 + b'"}\n')
    for number, damaged in enumerate((content[:-9], b"plain", content[:20] + b"\0" * 30)):
        path = tmp_path / f"{number}.jsonl.gz"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{number}\.jsonl\.gz: damaged"):
            list(read_json_lines(path))
    assert MAX_LINE_BYTES == 64 * 2**20
    monkeypatch.setattr("codec.json_lines.MAX_LINE_BYTES", 2**20)
    longest = "x" * (2**20 - 3)
    (tmp_path / "l.jsonl").write_text(f'"{longest}"\n2\n', encoding="utf-8")
    assert values(tmp_path / "l.jsonl") == [longest, 2]
    (tmp_path / "l.jsonl").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(ValueError, match="line 1: longer than 1 MiB"):
        list(read_json_lines(tmp_path / "l.jsonl"))


def test_values_without_a_form_in_json() -> None:
    record = {"loss": float("nan"), "deep": [float("inf"), (1.0, float("-inf"))], "t": "\udcff"}
    line = to_json_line(record)
    assert line.encode()
    assert json.loads(line) == {"loss": None, "deep": [None, [1.0, None]], "t": "\udcff"}
    assert to_json_line(["\u00e4", float("nan")]) == '["\u00e4", null]'
    assert to_json_line(["\u00e4", 1.5]) == '["\u00e4", 1.5]'


@pytest.mark.parametrize("torn", [b'{"a": ', b'"' + b"\xc3", b"x" * 200_000])
def test_an_incomplete_last_line_is_removed(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "new" / "below" / "l.jsonl"
    assert read_appended(path) == []
    append_json_lines(path, [{"a": ODD}, {"a": 2}])
    before = path.read_bytes()
    with open(path, "ab") as file:
        file.write(torn)
    for strict in (True, False):
        lines = read_appended(path, strict=strict)
        assert [line.value for line in lines] == [{"a": ODD}, {"a": 2}]
    append_json_lines(path, [{"a": 3}], sync=False)
    assert path.read_bytes() == before + b'{"a": 3}\n'


def test_lines_are_not_appended_behind_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "out.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"out\.jsonl: a symbolic link that leads out"):
        append_json_lines(tmp_path / "a" / "out.jsonl", [1])
    assert not (tmp_path / "elsewhere").exists()


def test_lines_have_a_limited_depth(tmp_path: Path) -> None:
    for depth, error in ((100, None), (102, "nested too deeply"), (100_000, "nested too deeply")):
        (tmp_path / "a.jsonl").write_text("[" * depth + "]" * depth)
        (line,) = scan_json_lines(tmp_path / "a.jsonl")
        assert (error or "") in (line.error or "")
        assert (line.error is None) == (error is None)


def test_nothing_but_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    for torn, kept in ((b'{"a', b""), (b'\n{"a', b"\n"), (b"", b"")):
        path.write_bytes(torn)
        assert read_appended(path) == []
        append_json_lines(path, [3])
        assert path.read_bytes() == kept + b"3\n"


def test_lines_are_on_the_disk_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    append_json_lines(tmp_path / "l.jsonl", [1], sync=False)
    assert not synced
    append_json_lines(tmp_path / "l.jsonl", [2])
    assert len(synced) == 1


def test_lines_of_a_log_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text("1\nno json\n3\n", encoding="utf-8")
    assert [line.value for line in read_appended(path, strict=False)] == [1, 3]
    for options in ({}, {"strict": True}):
        with pytest.raises(ValueError, match=r"l\.jsonl, line 2: no JSON"):
            read_appended(path, **options)


def test_a_full_disk_is_named_and_the_next_line_replaces_half_of_one(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    append_json_lines(path, [{"n": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, before[1]))
    try:
        with pytest.raises(WriteError, match=r"l\.jsonl: cannot be written \(File too large"):
            append_json_lines(path, [{"n": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text().startswith('{"n": 1}\n')
    append_json_lines(path, [{"n": 3}])
    assert values(path) == [{"n": 1}, {"n": 3}]
