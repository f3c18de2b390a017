import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from codec.tokens import CodecStamp, TokenRow, write_shard
from eval.benchmark import read_rows
from eval.tokens import Corpus
from recipes import probe as program

STAMP = CodecStamp(
    id="out/tiny",
    digest="0123456789abcdef",
    sample_rate=16_000,
    frame_rate=50.0,
    num_codebooks=2,
    codebook_sizes=(8, 8),
)


def shard(path: Path, ids: Sequence[str], digest: str = STAMP.digest) -> str:
    generator = np.random.default_rng(len(ids))
    rows = []
    for name in ids:
        letters = generator.integers(0, 3, 5)
        first = np.repeat(np.stack([1 + letters, 0 * letters], 1).reshape(-1), 2)
        codes = np.stack([first, generator.integers(0, 8, first.size)]).astype(np.uint16)
        text = "".join("abc"[letter] for letter in letters)
        rows.append(TokenRow(name, text, name.partition("-")[0], "en", codes.shape[1] / 50, codes))
    stamp = CodecStamp(**{key: getattr(STAMP, key) for key in STAMP.__slots__} | {"digest": digest})
    write_shard(path, rows, stamp)
    return str(path)


@pytest.fixture
def lists(tmp_path: Path) -> list[str]:
    train = shard(tmp_path / "train.parquet", [f"t-{number}" for number in range(12)])
    dev = shard(tmp_path / "dev.parquet", ["anna-1", "anna-2", "bert-1"])
    return ["--train", train, "--dev", dev, "--epochs", "2", "--hidden", "8"]


def test_each_list_and_group_has_a_line_and_rows_with_provenance(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    other = shard(tmp_path / "b.parquet", ["x-1"])
    argv = [*lists, "--group", "a=anna", "--group", "b=.*-1$", "--seed", "3", "--out", str(out)]
    program.main(argv)
    program.main([*lists, "--dev", f"other={other}", "--limit", "5", "--out", str(out)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["list"], line["n"]) for line in lines] == [
        ("dev", 3),
        ("dev/a", 2),
        ("dev/b", 2),
        ("dev", 3),
        ("other", 1),
    ]
    assert [line["trained_on"] for line in lines] == [12] * 3 + [5] * 2
    assert {line["model"] for line in lines} == {STAMP.digest}
    assert [line["seed"] for line in lines] == [3] * 3 + [0] * 2
    assert lines[0]["config"] == lines[2]["config"] != lines[3]["config"]
    assert {"torch", "jiwer"} <= lines[0]["libraries"].keys()
    rows = read_rows(out)
    whole = [row for row in rows if row.utterance is None and row.metric == "probe_cer"]
    assert [row.list for row in whole] == [line["list"] for line in lines]
    assert [round(row.value, 4) for row in whole] == [line["cer"] for line in lines]
    assert {row.model for row in rows} == {STAMP.digest}
    assert all("torch" in row.library for row in rows)
    assert {row.utterance for row in rows if row.list == "dev/a"} == {None, "anna-1", "anna-2"}
    losses = [row.value for row in rows if row.metric == "probe_loss"]
    assert [round(value, 4) for value in losses] == [line["loss"] for line in lines]


def test_the_asked_codebooks_are_read(
    lists: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, ...]] = []
    real = program.train_probe

    def spying(train: Corpus, **options: object) -> object:
        seen.append(np.asarray(train.codes[0]).shape[:1] + tuple(options["codebook_sizes"]))
        return real(train, **options)

    monkeypatch.setattr(program, "train_probe", spying)
    program.main(lists)
    program.main([*lists, "--codebooks", "2"])
    program.main([*lists, "--codebooks", "0"])
    assert seen == [(1, 8), (2, 8, 8), (2, 8, 8)]
    assert json.loads(capsys.readouterr().out.splitlines()[0])["system"] == "tiny codebooks 1-1"


def test_mistakes_are_named(lists: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the codec has 2"):
        program.main([*lists, "--codebooks", "3"])
    with pytest.raises(ValueError, match="no speaker or id"):
        program.main([*lists, "--group", "c=carl"])
    with pytest.raises(ValueError, match="write NAME=PATTERN"):
        program.main([*lists, "--group", "carl"])
    with pytest.raises(ValueError, match="no regular expression"):
        program.main([*lists, "--group", "c=("])
    with pytest.raises(ValueError, match="t-0 is in --train as well"):
        program.main([*lists, "--dev", lists[1]])
    foreign = shard(tmp_path / "foreign.parquet", ["f-1"], digest="f" * 16)
    with pytest.raises(ValueError, match="made by codec"):
        program.main([*lists, "--dev", foreign])
