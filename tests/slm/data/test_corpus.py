"""corpus.py: what is used of shards and of plain texts, and what is said about the rest."""

import gzip
import logging
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tiny_slm import STAMP, make_rows

from codec.tokens import TokenShard, write_shard
from slm.data.corpus import Ragged, pieces_of, read_texts, usable, within


def shard(path: Path) -> TokenShard:
    rows = make_rows(6)
    rows[1] = rows[1]._replace(text=" ... ")
    rows[4] = rows[4]._replace(text="A RED HEN")
    write_shard(path, rows, STAMP)
    opened = TokenShard.open(path)
    opened.num_frames[2] = 0  # Our writer refuses it; another program's may not.
    return opened


def test_what_says_nothing_or_has_no_frames_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        corpus = usable(shard(tmp_path / "a.parquet"))
    assert corpus.items.tolist() == [0, 3, 4, 5]
    assert corpus.texts[1] == corpus.shard.texts[3]
    assert corpus.texts[2] == "a red hen"
    assert np.array_equal(corpus.codes(1), corpus.shard[3].codes)
    assert corpus.num_frames[1] == corpus.codes(1).shape[1]
    assert "skipped 1 item without words: item-1" in caplog.text
    assert "skipped 1 item without frames: item-2" in caplog.text
    assert usable(corpus.shard, limit=2).items.tolist() == [0, 3]
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"limit must be at least 1, got {limit}"):
            usable(corpus.shard, limit)


def test_what_is_too_long_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = usable(shard(tmp_path / "a.parquet"))
    with caplog.at_level(logging.WARNING):
        kept = within(corpus, np.array([5, 9, 10, 11]), 10)
    assert kept.items.tolist() == [0, 3, 4]
    assert "skipped 1 item longer than 10 positions: item-5" in caplog.text
    with pytest.raises(ValueError, match="no item has at most 4 positions"):
        within(corpus, np.array([5, 9, 10, 11]), 4)


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    rows = [row._replace(text="?") for row in make_rows(2)]
    write_shard(tmp_path / "a.parquet", rows, STAMP)
    with pytest.raises(ValueError, match=r"a\.parquet: no item has words and frames"):
        usable(TokenShard.open(tmp_path / "a.parquet"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\ntwo\n\n\n ...\n\nthree\n"),
        ("a.txt", "\ufeffone\r\ntwo\r\n \t\r\nthree"),  # As some editors leave it.
        ("a.jsonl", '\ufeff{"text": "one\\ntwo"}\n{"text": "three"}'),
        ("a.jsonl", '{"text": "one\\ntwo"}\n\n{"text": "--"}\n{"text": "three", "id": 3}\n'),
    ],
)
def test_documents_of_texts(tmp_path: Path, name: str, content: str, suffix: str) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(gzip.compress(content.encode()) if suffix else content.encode())
    assert read_texts(path) == ["one\ntwo", "three"]


def test_texts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv: no such \.txt or \.jsonl"):
        read_texts(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"a\.txt: no such"):
        read_texts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("...\n\n")
    with pytest.raises(ValueError, match=r"a\.txt: no text in it"):
        read_texts(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"words": "two"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no JSON object with a text"):
        read_texts(tmp_path / "a.jsonl")
    for text in ("null", "5", '["one"]'):
        (tmp_path / "a.jsonl").write_text(f'{{"text": {text}}}\n')
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no JSON object with a text"):
            read_texts(tmp_path / "a.jsonl")
    whole = gzip.compress("".join(map(str, range(3000))).encode())
    for damaged in (
        whole[:40],
        whole[:100] + bytes(40) + whole[140:],
        b"one",
        whole[:-8] + bytes(8),
    ):
        (tmp_path / "a.txt.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.txt\.gz: damaged"):
            read_texts(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("longest", [2, 3, 4, 100])
def test_pieces_are_the_documents_and_their_ends(longest: int) -> None:
    documents = [[1, 2, 3, 4, 5, 6], [7], [], [8, 9, 10, 11]]
    pieces = [piece.tolist() for piece in pieces_of(documents, 0, longest)]
    assert all(2 <= len(piece) <= longest for piece in pieces)
    if longest == 100:
        assert pieces == [[1, 2, 3, 4, 5, 6, 0], [7, 0], [8, 9, 10, 11, 0]]
    if longest > 2:  # A rest of one joins what a longer piece gives it.
        assert [*chain(*pieces)] == [1, 2, 3, 4, 5, 6, 0, 7, 0, 8, 9, 10, 11, 0]
    with pytest.raises(ValueError, match="at least 2"):
        list(pieces_of(documents, 0, 1))


def test_ragged_rows_come_back() -> None:
    rows = [[3, 1], [], [70_000], np.array([5, 6, 7])]
    ragged = Ragged(rows)
    assert len(ragged) == 4
    assert [ragged[i].tolist() for i in range(4)] == [[3, 1], [], [70_000], [5, 6, 7]]
    assert ragged.lengths.tolist() == [2, 0, 1, 3]
    assert len(Ragged([])) == 0
