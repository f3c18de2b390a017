import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from codec.tokens import CodecStamp, TokenRow, write_shard
from eval.text_probe import ProbeConfig, ProbeCorpus
from recipes import probe as program
from recipes.scoring.rows import read_rows

STAMP = CodecStamp(
    id="out/tiny",
    digest="0123456789abcdef",
    sample_rate=16_000,
    frame_rate=50.0,
    num_codebooks=2,
    codebook_sizes=(8, 8),
)


def shard(
    path: Path,
    ids: Sequence[str],
    texts: Mapping[str, str] | None = None,
    seed: int | None = None,
    **stamped: object,
) -> str:
    """Codes that encode their texts, unless `texts` has another text for an id."""
    generator = np.random.default_rng(len(ids) if seed is None else seed)
    rows = []
    for name in ids:
        letters = generator.integers(0, 3, 5)
        first = np.repeat(np.stack([1 + letters, 0 * letters], 1).reshape(-1), 2)
        codes = np.stack([first, generator.integers(0, 8, first.size)]).astype(np.uint16)
        text = "".join("abc"[letter] for letter in letters)
        text = (texts or {}).get(name, text)
        rows.append(TokenRow(name, text, name.partition("-")[0], "en", codes.shape[1] / 50, codes))
    write_shard(path, rows, replace(STAMP, **stamped))
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
    by_epoch = lines[0]["dev_cer_by_epoch"]
    assert len(by_epoch) == 2
    assert by_epoch[-1] == lines[0]["cer"]
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


def test_only_the_chosen_codebooks_are_used(
    lists: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, ...]] = []
    real = program.train_probe

    def spying(train: ProbeCorpus, **options: object) -> object:
        seen.append(np.asarray(train.codes[0]).shape[:1] + tuple(options["codebook_sizes"]))
        return real(train, **options)

    monkeypatch.setattr(program, "train_probe", spying)
    program.main(lists)
    program.main([*lists, "--codebooks", "2"])
    program.main([*lists, "--codebooks", "0"])
    assert seen == [(1, 8), (2, 8, 8), (2, 8, 8)]
    name = "out/tiny 0123456789abcdef codebooks 1-1"
    assert json.loads(capsys.readouterr().out.splitlines()[0])["system"] == name


def test_invalid_arguments_are_refused(lists: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the codec has 2"):
        program.main([*lists, "--codebooks", "3"])
    with pytest.raises(ValueError, match="no speaker or id"):
        program.main([*lists, "--group", "c=carl"])
    with pytest.raises(ValueError, match="write NAME=PATTERN"):
        program.main([*lists, "--group", "carl"])
    with pytest.raises(ValueError, match="not a regular expression"):
        program.main([*lists, "--group", "c=("])
    with pytest.raises(ValueError, match="t-0 is in --train as well"):
        program.main([*lists, "--dev", lists[1]])
    foreign = shard(tmp_path / "foreign.parquet", ["f-1"], digest="f" * 16)
    with pytest.raises(ValueError, match="made by codec"):
        program.main([*lists, "--dev", foreign])


def run(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[dict]:
    program.main([str(part) for part in argv])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_settings_digest_includes_the_data(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [f"t-{number}" for number in range(12)]
    other_train = shard(tmp_path / "other" / "train.parquet", ids, seed=7)
    other_dev = shard(tmp_path / "other" / "dev.parquet", ["anna-1", "anna-2", "bert-1"], seed=7)
    more = ["--epochs", "1", "--hidden", "4"]
    pairs = [(lists[1], lists[3]), (other_train, lists[3]), (lists[1], other_dev)]
    made = [run(["--train", train, "--dev", dev, *more], capsys) for train, dev in pairs]
    assert len({line["config"] for (line,) in made}) == 3
    [again] = run(["--train", lists[1], "--dev", lists[3], *more], capsys)
    assert again["config"] == made[0][0]["config"]


def test_the_frame_rate_is_the_codecs_and_a_setting_is_the_named_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, dev = (
        shard(tmp_path / f"{name}.parquet", [f"{name}-{number}" for number in range(3)],
              frame_rate=12.5)
        for name in ("train", "dev")
    )  # fmt: skip
    seen = []

    def spying(corpus: ProbeCorpus, **options: object) -> object:
        seen.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(program, "train_probe", spying)
    second = shard(tmp_path / "second.parquet", ["s-1"], frame_rate=12.5)
    for more in ([], ["--setting", "paper", "--seed", "4"]):
        with pytest.raises(ValueError, match="enough"):
            program.main(["--train", train, "--dev", dev, "--dev", second, *more])
    # The first list is the one that is scored after each epoch.
    assert [len(options["dev"].texts) for options in seen] == [3, 3]
    assert [options["frame_rate"] for options in seen] == [12.5, 12.5]
    assert seen[0]["config"] == program.SETTINGS["small"]
    assert seen[1]["config"] == ProbeConfig(seed=4)
    assert (seen[1]["config"].hidden, seen[1]["config"].num_layers) == (1024, 2)


def test_utterances_without_transcripts_are_left_out_and_counted(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [f"t-{number}" for number in range(12)]
    train = shard(tmp_path / "some.parquet", ids, {"t-3": "", "t-5": " ", "t-6": "4"})
    dev = shard(tmp_path / "d.parquet", ["d-1", "d-2", "d-3"], {"d-1": "", "d-2": "12"})
    out = tmp_path / "rows.jsonl"
    more = ["--epochs", "1", "--hidden", "4", "--out", out]
    [line] = run(["--train", train, "--dev", dev, *more], capsys)
    assert line["trained_on"] == 9
    assert line["left_out"] == {"no_text": 2, "unspelled": 1, "too_short": 0}
    assert (line["n"], line["no_text"], line["unscored"]) == (2, 1, 1)
    rows = {row.metric: row for row in read_rows(out) if row.utterance is None}
    assert (rows["probe_loss"].n, rows["probe_cer"].n) == (1, 2)
    none = shard(tmp_path / "none.parquet", ["n-1"], {"n-1": ""})
    with pytest.raises(ValueError, match=r"none\.parquet: has no transcripts"):
        program.main(["--train", none, "--dev", dev])
    with pytest.raises(ValueError, match=r"none\.parquet: has no transcripts"):
        program.main([*lists, "--dev", none])


def test_names_of_lists_are_unique(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(tmp_path / "b" / "dev.parquet", ["x-1"])
    there = str(tmp_path / "b" / "dev.parquet")
    with pytest.raises(ValueError, match="two lists have the name dev; write NAME=SHARD"):
        program.main([*lists, "--dev", there])
    with pytest.raises(ValueError, match="two lists have the name dev/a; write"):
        program.main([*lists, "--group", "a=anna", "--group", "a=bert"])
    odd = shard(tmp_path / "lr=3" / "dev.parquet", ["y-1"])
    argv = [*lists, "--dev", f"b={there}", "--dev", odd.replace("dev.parquet", "")]
    assert [line["list"] for line in run(argv, capsys)] == ["dev", "b", "lr=3"]
    named = run([*lists[:2], "--dev", f"odd={odd}", *lists[4:], "--group", "y=(?=y)y"], capsys)
    assert [line["list"] for line in named] == ["odd", "odd/y"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--hidden", "0"], "--hidden must be at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--limit", "-3"], "--limit must be at least 1, got -3"),
        (["--seed", "-1"], "--seed=-1: expected a whole number from 0 to"),
        (["--seed", "4294967296"], "--seed=4294967296: expected a whole number from 0 to"),
        (["--codebooks", "-1"], "--codebooks must be at least 0, got -1"),
        (["--device", "cuba"], "device 'cuba' cannot be used here"),
    ],
)
def test_impossible_numbers_and_places_are_refused(
    lists: list[str], given: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        program.main([*lists, *given])


def test_rows_cannot_go_into_a_folder(
    lists: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "train_probe", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        program.main([*lists, "--out", str(tmp_path)])
