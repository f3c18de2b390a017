import dataclasses
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codec import tokens
from codec.tokens import (
    FORMAT_VERSION,
    CodecStamp,
    DamagedShard,
    TokenRow,
    TokenShard,
    read_notes,
    write_shard,
)

STAMP = CodecStamp(
    id="models/tiny",
    digest="0123456789abcdef",
    sample_rate=16_000,
    frame_rate=12.5,
    num_codebooks=2,
    codebook_sizes=(8, 65_536),
)


def row(name: str, frames: int = 5, seed: int = 0) -> TokenRow:
    generator = np.random.default_rng(seed)
    books = [generator.integers(0, size, frames) for size in STAMP.codebook_sizes]
    codes = np.stack(books).astype(np.uint16)
    return TokenRow(name, f"text of {name}", "anna", "en", frames / 12.5, codes)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shard(tmp_path / "a.parquet", [row("a", 4, 1), row("b", 7, 2)], STAMP, {"made": "today"})
    return tmp_path / "a.parquet"


def altered(path: Path, **metadata: str) -> Path:
    """The shard `path`, rewritten with other metadata."""
    table = pq.read_table(path)
    old = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    pq.write_table(table.replace_schema_metadata({**old, **metadata}), path)
    return path


def test_rows_come_back_as_written(shard: Path) -> None:
    opened = TokenShard.open(shard, expect=STAMP)
    assert opened.stamp == STAMP
    assert opened.ids == ["a", "b"]
    assert opened.num_frames.tolist() == [4, 7]
    for index, wrote in enumerate([row("a", 4, 1), row("b", 7, 2)]):
        read = opened[index]
        assert read[:5] == wrote[:5]
        assert read.codes.dtype == np.uint16
        np.testing.assert_array_equal(read.codes, wrote.codes)
    assert read_notes(shard) == {"made": "today"}
    assert opened[-1].id == "b"
    with pytest.raises(IndexError):
        opened[2]


def test_any_parquet_reader_sees_the_columns_of_the_contract(shard: Path) -> None:
    table = pq.read_table(shard)
    names = ["id", "text", "speaker", "language", "duration", "num_frames", "codes"]
    assert table.schema.names == names
    assert table.schema.field("codes").type.value_type == pa.uint16()
    assert table["codes"][1].as_py() == row("b", 7, 2).codes.reshape(-1).tolist()  # Row-major.
    assert table["num_frames"].to_pylist() == [4, 7]
    metadata = table.schema.metadata
    assert metadata[b"format_version"] == b"1"
    assert metadata[b"codec_codebook_sizes"] == b"[8, 65536]"


def test_a_folder_is_one_shard_across_row_groups(tmp_path: Path) -> None:
    rows = [row(f"{number:03d}", 1 + number % 9, number) for number in range(300)]
    write_shard(tmp_path / "1.parquet", rows[:200], STAMP)
    write_shard(tmp_path / "2.parquet", rows[200:], STAMP)
    opened = TokenShard.open(tmp_path)
    assert len(opened) == 300
    for index in np.random.default_rng(0).permutation(300):
        np.testing.assert_array_equal(opened[int(index)].codes, rows[index].codes)


def test_several_paths_are_one_shard(shard: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "more" / "1.parquet", [row("c", 3, 3)], STAMP)
    opened = TokenShard.open([shard, tmp_path / "more"], expect=STAMP)
    assert opened.ids == ["a", "b", "c"]
    np.testing.assert_array_equal(opened[2].codes, row("c", 3, 3).codes)
    with pytest.raises(ValueError, match="the id 'a' occurs twice"):
        TokenShard.open([shard, shard])


@contextmanager
def descriptors(spare: int) -> Iterator[None]:
    """This number of files can be opened inside."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    probes = [os.open(os.devnull, os.O_RDONLY) for _ in range(spare + 1)]
    for probe in probes:
        os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(probes), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_there_may_be_more_files_than_a_process_can_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(f"{number:02d}", 1 + number % 9, number) for number in range(20)]
    for number, each in enumerate(rows):
        write_shard(tmp_path / f"{number:02d}.parquet", [each], STAMP)
    monkeypatch.setattr(tokens, "NUM_READERS", 3)
    shard = TokenShard.open(tmp_path)
    with descriptors(spare=4):
        for index in np.random.default_rng(0).permutation([*range(20), *range(20)]):
            np.testing.assert_array_equal(shard[int(index)].codes, rows[index].codes)


def test_too_many_open_files_are_no_damage(shard: Path) -> None:
    opened, content = TokenShard.open(shard), shard.read_bytes()
    for read in (lambda: opened[0], lambda: TokenShard.open(shard), lambda: read_notes(shard)):
        with descriptors(spare=0), pytest.raises(OSError, match="ulimit -n") as caught:
            read()
        assert "corrupted" not in str(caught.value)
        assert not isinstance(caught.value, DamagedShard)
    assert shard.read_bytes() == content
    np.testing.assert_array_equal(opened[0].codes, row("a", 4, 1).codes)


def test_an_empty_part_opens(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [], STAMP)
    assert len(TokenShard.open(tmp_path)) == 0


def test_processes_may_share_an_opened_shard(shard: Path) -> None:
    opened = TokenShard.open(shard)
    expected = [opened[0].codes, opened[1].codes]
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        got = pool.map(opened.__getitem__, [0, 1])
    for read, codes in zip(got, expected, strict=True):
        np.testing.assert_array_equal(read.codes, codes)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("x")._replace(codes=np.zeros((3, 5), np.uint16)), "x: codes have shape"),
        (row("x")._replace(codes=np.zeros((2, 0), np.uint16)), "x: no frames"),
        (row("x")._replace(codes=np.full((2, 5), 8)), "x: codebook 1 has 8 entries"),
        (row("x")._replace(codes=np.full((2, 5), -1)), "x: codebook 1 has 8 entries"),
        (row("a"), "the id 'a' occurs twice"),
    ],
)
def test_impossible_rows_are_refused_and_leave_the_old_file(
    shard: Path, bad: TokenRow, message: str
) -> None:
    before = shard.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_shard(shard, [row("a"), bad], STAMP)
    assert shard.read_bytes() == before
    assert [path.name for path in shard.parent.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_shard_cut_short_says_so(shard: Path, share: float) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DamagedShard, match=r"a\.parquet: corrupted token shard \(truncated"):
        TokenShard.open(shard)


def test_a_shard_damaged_in_the_middle_says_so(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[4:200] = bytes(196)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet"):
        TokenShard.open(shard)[0]


def test_a_single_damaged_byte_never_changes_codes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [row("a", 40, 1), row("b", 70, 2)]
    write_shard(path, rows, STAMP)
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    damaged = 0
    for position in range(4, footer, 3):
        wrong = bytearray(content)
        wrong[position] ^= 1 << position % 8
        path.write_bytes(wrong)
        try:
            read = list(TokenShard.open(path))
        except DamagedShard as error:
            damaged += str(path) in str(error)
            continue
        for got, wrote in zip(read, rows, strict=True):
            assert got[:5] == wrote[:5]
            np.testing.assert_array_equal(got.codes, wrote.codes)
    assert damaged > 0.8 * footer / 3


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("codes", [[8] * 8, [0] * 14], "'a' has codes beyond the codebooks"),
        ("num_frames", [5, 7], "'a' has 8 codes, but 5 frames of 2 codebooks"),
    ],
)
def test_codes_are_checked_without_checksums_too(
    shard: Path, column: str, values: list, message: str
) -> None:
    table = pq.read_table(shard)
    index = table.schema.get_field_index(column)
    field = table.schema.field(column)
    pq.write_table(table.set_column(index, field, pa.array(values, field.type)), shard)
    with pytest.raises(DamagedShard, match=rf"a\.parquet: {message}"):
        TokenShard.open(shard)[0]


def test_another_codec_is_named(shard: Path) -> None:
    other = dataclasses.replace(STAMP, id="models/other", digest="f" * 16)
    with pytest.raises(ValueError, match=r"made by codec models/tiny .* but codec models/other"):
        TokenShard.open(shard, expect=other)
    # The same weights in another place are the same codec.
    TokenShard.open(shard, expect=dataclasses.replace(STAMP, id="elsewhere"))


def test_mixed_codecs_in_a_folder_are_refused(shard: Path) -> None:
    other = dataclasses.replace(STAMP, id="models/other", digest="f" * 16)
    write_shard(shard.with_name("b.parquet"), [row("c")], other)
    with pytest.raises(ValueError, match=r"b\.parquet: made by codec models/other"):
        TokenShard.open(shard.parent)


def test_one_id_in_two_files_is_refused(shard: Path) -> None:
    write_shard(shard.with_name("b.parquet"), [row("b")], STAMP)
    with pytest.raises(ValueError, match="the id 'b' occurs twice"):
        TokenShard.open(shard.parent)


def test_a_later_format_asks_for_an_update(shard: Path) -> None:
    altered(shard, format_version=str(FORMAT_VERSION + 1))
    with pytest.raises(ValueError, match=r"token format 2.*update parlance"):
        TokenShard.open(shard)


@pytest.mark.parametrize("what", ["missing", "empty folder", "text file", "foreign parquet"])
def test_what_is_no_shard_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "tokens.parquet"
    if what == "empty folder":
        path = tmp_path
    elif what == "text file":
        path.write_text("id,text\n")
    elif what == "foreign parquet":
        pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(ValueError, match=str(path)):
        TokenShard.open(path)


FULL_DISK = """
import resource, signal, sys
import numpy as np
from codec.tokens import CodecStamp, TokenRow, write_shard
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
stamp = CodecStamp(id="", digest="", sample_rate=1, frame_rate=1.0, num_codebooks=1,
                   codebook_sizes=(65536,))
noise = np.random.default_rng(0)
rows = (TokenRow(str(i), "", "", "", 1.0, noise.integers(0, 65536, (1, 999))) for i in range(100))
try:
    write_shard(sys.argv[1], rows, stamp)
except OSError as error:
    print("OSError", error)
"""


def test_a_full_disk_leaves_the_earlier_shard(shard: Path) -> None:
    before = shard.read_bytes()
    command = [sys.executable, "-c", FULL_DISK, str(shard)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("OSError"), done.stderr
    assert shard.read_bytes() == before
    assert [path.name for path in shard.parent.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(
    ("column", "kind", "values"),
    [
        ("codes", pa.list_(pa.int64()), [[2**16 + 1] * 8, [1] * 14]),
        ("codes", pa.list_(pa.int64()), [[-1] * 8, [1] * 14]),
        ("codes", pa.list_(pa.uint16()), [[None] * 8, [1] * 14]),
        ("codes", pa.list_(pa.uint16()), [None, [1] * 14]),
        ("codes", pa.string(), ["x", "y"]),
        ("id", pa.string(), [None, "b"]),
        ("num_frames", pa.string(), ["four", "7"]),
        ("duration", pa.float64(), [None, 1.0]),
    ],
)
def test_columns_of_other_types_are_refused(
    shard: Path, column: str, kind: pa.DataType, values: list
) -> None:
    table = pq.read_table(shard)
    index = table.schema.get_field_index(column)
    pq.write_table(table.set_column(index, column, pa.array(values, kind)), shard)
    with pytest.raises(DamagedShard, match=r"a\.parquet: corrupted token shard"):
        TokenShard.open(shard)[0]


def test_texts_that_are_not_utf_8_are_refused(shard: Path) -> None:
    table = pq.read_table(shard)
    texts = pa.array([b"\xff", b"b"], pa.binary()).view(pa.string())
    index = table.schema.get_field_index("text")
    pq.write_table(table.set_column(index, "text", texts), shard)
    with pytest.raises(DamagedShard, match=r"a\.parquet: corrupted token shard"):
        TokenShard.open(shard)


def test_names_of_columns_that_are_not_utf_8_are_refused(shard: Path) -> None:
    content = shard.read_bytes()
    assert content.count(b"speaker") > 1
    shard.write_bytes(content.replace(b"speaker", b"\xffpeaker"))
    with pytest.raises(DamagedShard, match=r"a\.parquet: corrupted token shard"):
        TokenShard.open(shard)


@pytest.mark.parametrize(
    "metadata",
    [
        {"format_version": "x"},
        {"codec_codebook_sizes": "null"},
        {"codec_codebook_sizes": '["8", 9]'},
        {"codec_codebook_sizes": "[8, 70000]"},
        {"codec_num_codebooks": "3"},
        {"codec_frame_rate": "NaN"},
        {"codec_digest": "5"},
        {"codec_id": "[" * 100_000},
    ],
)
def test_facts_that_no_codec_has_are_refused(shard: Path, metadata: dict[str, str]) -> None:
    with pytest.raises(DamagedShard, match=r"a\.parquet: corrupted token shard"):
        TokenShard.open(altered(shard, **metadata))


@pytest.mark.parametrize(
    "facts",
    [
        {"sample_rate": 0},
        {"frame_rate": 0.0},
        {"frame_rate": float("inf")},
        {"num_codebooks": 1},
        {"num_codebooks": 0, "codebook_sizes": ()},
        {"codebook_sizes": (8, 0)},
        {"codebook_sizes": (8, 65_537)},
    ],
)
def test_facts_are_checked_one_by_one(facts: dict) -> None:
    with pytest.raises(ValueError, match=r"not as expected|holds up to 65536"):
        dataclasses.replace(STAMP, **facts).check()
    dataclasses.replace(STAMP, sample_rate=1, frame_rate=0.5, codebook_sizes=(1, 65_536)).check()
