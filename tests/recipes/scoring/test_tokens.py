"""recipes/scoring/tokens.py: the probe on token shards, and everything on waves of a tiny codec."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CountingJudge

from codec import load_codec
from codec.json_lines import read_json_lines
from codec.tokens import CodecStamp, TokenRow, TokenShard, write_shard
from eval.benchmark import Row
from eval.metrics import HIGHER_IS_BETTER, MEASURES
from eval.text_probe import ProbeConfig
from recipes import prepare_data
from recipes.benchmark import main
from recipes.scoring import tokens as program
from recipes.scoring.rows import CLIPS, ORIGINAL, read_rows

STAMP = CodecStamp(
    id="out/tiny",
    digest="0123456789abcdef",
    sample_rate=16_000,
    frame_rate=50.0,
    num_codebooks=2,
    codebook_sizes=(8, 8),
)


def shard(
    path: Path, ids: Sequence[str], texts: Mapping[str, str] | None = None, **stamped: object
) -> str:
    """Codes that encode their texts, unless `texts` has another text for an id."""
    generator = np.random.default_rng(len(ids))
    rows = []
    for name in ids:
        letters = generator.integers(0, 3, 5)
        first = np.repeat(np.stack([1 + letters, 0 * letters], 1).reshape(-1), 2)
        codes = np.stack([first, generator.integers(0, 8, first.size)]).astype(np.uint16)
        text = (texts or {}).get(name, "".join("abc"[letter] for letter in letters))
        rows.append(TokenRow(name, text, name.partition("-")[0], "en", codes.shape[1] / 50, codes))
    write_shard(path, rows, replace(STAMP, **stamped))
    return str(path)


@pytest.fixture
def lists(tmp_path: Path) -> list[str]:
    train = shard(tmp_path / "train.parquet", [f"t-{number}" for number in range(12)])
    dev = shard(tmp_path / "dev.parquet", ["anna-1", "anna-2", "bert-1"])
    return ["--train", train, "--dev", dev, "--epochs", "1", "--hidden", "4"]


def run(out: Path, *arguments: object) -> list[Row]:
    main(["tokens", "--out", str(out), *map(str, arguments)])
    return read_rows(out / "rows.jsonl")


def of_lists(rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    return {(row.system, row.list, row.metric): row for row in rows if row.utterance is None}


def test_shards_have_rows_of_text_alignment_with_provenance(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shard(tmp_path / "b.parquet", ["anna-8", "anna-9"])
    rows = run(tmp_path / "out", *lists, "--dev", f"other={other}", "--by", "speaker", "--seed", 3)
    whole = of_lists(rows)
    sizes = {"dev": 3, "dev/speaker=anna": 2, "dev/speaker=bert": 1, "other": 2}
    for system, count in (("tiny-1", 1), ("tiny-2", 2)):
        for name, n in sizes.items():
            assert whole[system, name, "probe_cer"].n == n
            assert whole[system, name, "mi_vclub"].n == n
        assert whole[system, "dev", "codebooks"].value == count
        assert whole[system, "dev", "bitrate"].value == 50 * 3 * count
        assert whole[system, "dev", "mi_info_nce_limit"].value == pytest.approx(np.log(3))
        assert whole[system, "dev", "mi_info_nce"].value <= np.log(3)
        assert whole[system, "dev", "probe_loss"].value > 0
        assert whole[system, "dev", "mi_vclub_error"].value > 0
    assert {row.part for row in rows} == {"tokens"}
    assert {row.model for row in rows} == {STAMP.digest}
    assert {row.seed for row in rows} == {3}
    assert all("torch" in row.library for row in rows if row.metric.startswith(("probe_", "mi_")))
    assert "jiwer" in whole["tiny-1", "dev", "probe_cer"].library
    utterances = {row.utterance for row in rows if row.list == "dev"}
    assert utterances == {None, "anna-1", "anna-2", "bert-1"}
    printed = capsys.readouterr().out
    assert "| system | list | n | probe_cer | probe_wer | mi_vclub |" in printed
    assert "| tiny-2 | dev/speaker=bert |" in printed


def test_nothing_is_computed_twice(
    lists: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps = tmp_path / "out", []
    for name in ("train_probe", "_probe_scores", "_snmi_scores"):
        real = getattr(program, name)

        def counting(*arguments: object, name: str = name, real=real, **options: object) -> object:
            steps.append(name)
            if len(steps) == 5:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        monkeypatch.setattr(program, name, counting)
    with pytest.raises(KeyboardInterrupt):
        run(out, *lists)
    assert steps == [
        "train_probe", "_probe_scores", "_snmi_scores", "train_probe", "_probe_scores"
    ]  # fmt: skip
    rows = run(out, *lists)
    assert steps[5:] == ["_probe_scores", "_snmi_scores"]
    assert run(out, *lists) == rows
    assert len(steps) == 7
    # Another list needs the probe's weights, not another training.
    other = shard(tmp_path / "b.parquet", ["x-1", "x-2"])
    more = run(out, *lists, "--dev", other)
    assert steps[7:] == ["_probe_scores", "_snmi_scores"] * 2
    alone = run(tmp_path / "alone", *lists[:2], "--dev", other, *lists[4:])
    ours = {key: row.value for key, row in of_lists(more).items() if key[1] == "b"}
    assert ours == {key: row.value for key, row in of_lists(alone).items()}


def test_the_probe_has_the_settings_frame_rate_and_vectors_of_the_command(
    tmp_path: Path, tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = load_codec(tiny_codec_folder)
    stamp = {name: getattr(codec.stamp, name) for name in ("digest", "num_codebooks")}
    stamp |= {"codebook_sizes": codec.codebook_sizes, "frame_rate": 25.0}
    paths = []
    for name in ("train", "dev"):
        path = tmp_path / f"{name}.parquet"
        codes = np.arange(30, dtype=np.uint16).reshape(3, 10)
        rows = [TokenRow(f"{name}-{number}", "abc", "", "en", 0.4, codes) for number in range(3)]
        write_shard(path, rows, replace(STAMP, **stamp))
        paths += [f"--{name}", str(path)]
    seen = []

    def spying(corpus: object, **options: object) -> object:
        seen.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(program, "train_probe", spying)
    vectors = ["--embeddings", "codec", "--codec", f"mine={tiny_codec_folder}"]
    for number, more in enumerate(([], ["--setting", "paper", "--seed", "4"], vectors)):
        with pytest.raises(ValueError, match="enough"):
            run(tmp_path / str(number), *paths, *more)
    assert [options["frame_rate"] for options in seen] == [25.0] * 3
    assert [options["codebook_sizes"] for options in seen] == [(32,)] * 3
    assert seen[0]["config"] == program.SETTINGS["small"]
    assert seen[1]["config"] == ProbeConfig(seed=4)
    assert (seen[1]["config"].hidden, seen[1]["config"].num_layers) == (1024, 2)
    assert seen[0]["tables"] is None
    [table] = seen[2]["tables"]
    entries = codec.entries()
    assert entries is not None
    assert torch.equal(table, entries[0])
    with pytest.raises(ValueError, match="--embeddings codec: name the codec of the token shards"):
        run(tmp_path / "none", *paths, "--embeddings", "codec")


def test_utterances_without_transcripts_are_left_out(lists: list[str], tmp_path: Path) -> None:
    ids = [f"t-{number}" for number in range(12)]
    train = shard(tmp_path / "some.parquet", ids, {"t-3": "", "t-5": " ", "t-6": "4"})
    dev = shard(tmp_path / "d.parquet", ["d-1", "d-2", "d-3"], {"d-1": "", "d-2": "12"})
    rows = of_lists(run(tmp_path / "out", "--train", train, "--dev", dev, *lists[4:]))
    # One text is empty; another has digits, no labels: it counts as an error, without a loss.
    assert rows["tiny-1", "d", "probe_cer"].n == 2
    assert ("tiny-1", "d", "mi_vclub") not in rows
    none = shard(tmp_path / "none.parquet", ["n-1"], {"n-1": ""})
    with pytest.raises(ValueError, match="has no transcripts"):
        run(tmp_path / "out", "--train", none, "--dev", dev, *lists[4:])
    with pytest.raises(ValueError, match="has no transcripts"):
        run(tmp_path / "out", *lists, "--dev", none)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--train-limit", "-3"], "--train-limit must be at least 1, got -3"),
        (["--negatives", "0"], "--negatives must be at least 1, got 0"),
        (["--seed", "-1"], "--seed=-1: expected a whole number from 0 to"),
        (["--device", "cuba"], "device 'cuba' cannot be used here"),
        (["--by", "age"], "--by age: no item of dev has this column"),
        (["--limit", "2", "--sample", "2"], "--limit and --sample: give one of them"),
        (["--dev", "dev={train}"], "two lists have the name dev; write NAME=LIST"),
        (["--dev", "again={train}"], "t-0 is in --train as well \\(12 such\\)"),
        (["--dev", "{foreign}"], "made by codec"),
        (["--dev", "cuts.jsonl.gz"], "lists of cuts, or token shards, not both"),
        (["--codec", "a=x", "--codec", "a=y"], "--codec: two have the name a"),
        (["--codec", "a=x", "--codec", "b=y"], "token shards are of one codec"),
        (["--speaker", "x"], "--speaker: similarity is scored together with --judge"),
    ],
)
def test_invalid_arguments_are_refused(
    lists: list[str], tmp_path: Path, given: list[str], message: str
) -> None:
    foreign = shard(tmp_path / "foreign.parquet", ["f-1"], digest="f" * 16)
    given = [part.format(train=lists[1], foreign=foreign) for part in given]
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", *lists, *given)


def test_lists_of_cuts_are_encoded_resynthesized_and_changed(
    tmp_path: Path, tiny_codec_folder: Path, write_wav, judge: CountingJudge
) -> None:
    judge.transcript, cuts = "alpha", {}
    for part in ("train", "dev"):
        entries = []
        for number in range(4):
            name = f"{part}{number}"
            write_wav(tmp_path / f"{name}.wav", 1 + 0.1 * number, seed=number)
            text = ("Alpha.", "bravo")[number % 2]
            entries.append({"audio": f"{name}.wav", "text": text, "speaker": f"s{number}"})
        path = tmp_path / f"{part}.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        prepare_data.main(["list", str(path), "--out", str(tmp_path / part)])
        cuts[part] = tmp_path / part / "all.jsonl.gz"
    out = tmp_path / "out"
    command = ["--codec", tiny_codec_folder, "--codec", f"again={tiny_codec_folder}"]
    command += ["--train", cuts["train"], "--dev", f"dev={cuts['dev']}", "--epochs", 1]
    command += ["--hidden", 4, "--judge", "judge"]
    rows = run(out, *command)
    whole = of_lists(rows)
    codec = load_codec(tiny_codec_folder)
    [folder] = (out / "tokens").glob("tiny-*")
    [dev] = folder.glob("dev-*")
    stored = TokenShard.open(dev, expect=codec.stamp)
    assert sorted(stored.ids) == ["dev0", "dev1", "dev2", "dev3"]
    # The judge's transcript is right for two of four; the originals are judged once.
    assert whole["original", "dev", "wer"].value == 0.5
    assert judge.calls == 4 + 2 * 2 * 4
    for system in ("tiny-1", "tiny-3", "again-1", "again-3"):
        assert whole[system, "dev", "wer"].value == 0.5
        assert whole[system, "dev", "snmi"].n == 4
        assert 0 <= whole[system, "dev", "snmi"].value <= 1
        assert len(list((out / "waves" / system / "dev").iterdir())) == 4
    assert ("tiny-3", "dev", "snmi_acoustic") in whole
    assert ("tiny-1", "dev", "snmi_acoustic") not in whole
    for change in program.CHANGES:
        books = [
            whole["tiny-1" if book == 1 else f"tiny codebook {book}", "dev", f"kept_{change}"]
            for book in (1, 2, 3)
        ]
        values = [row.value for row in books]
        assert whole["tiny-3", "dev", f"kept_{change}"].value == pytest.approx(np.mean(values))
        assert all(0 <= value <= 1 for value in values)
    assert 0 < whole["tiny-1", "dev", "kept_noise"].value < 1
    clips = [line.value for line in read_json_lines(out / CLIPS)]
    assert len(clips) == 4 + 2 * 2 * 4
    assert {clip["reference_audio"] for clip in clips if clip["system"] == "tiny-3"} == {
        clip["audio"] for clip in clips if clip["system"] == ORIGINAL
    }
    assert all((out / clip["audio"]).is_file() for clip in clips)
    assert run(out, *command) == rows
    assert judge.calls == 4 + 2 * 2 * 4


def test_reports_and_comparisons_know_the_printed_measures() -> None:
    assert set(program.TOKEN_COLUMNS) <= MEASURES.keys()
    better = [f"kept_{change}" for change in program.CHANGES] + ["mi_vclub", "mi_info_nce", "snmi"]
    assert [HIGHER_IS_BETTER[metric] for metric in better] == [True] * len(better)
    assert not HIGHER_IS_BETTER["probe_cer"]


def test_changes_of_a_recording_are_those_named() -> None:
    times = np.arange(16_000) / 16_000
    wave = (0.5 * np.sin(2 * np.pi * 1000 * times)).astype(np.float32)
    changed = program.changed_recordings(wave, 16_000, seed=1)
    assert tuple(changed) == program.CHANGES
    noise = changed["noise"] - wave
    assert 10 * np.log10(np.mean(wave**2) / np.mean(noise**2)) == pytest.approx(20, abs=0.2)
    again = program.changed_recordings(wave, 16_000, seed=1)["noise"]
    assert np.array_equal(again, changed["noise"])
    assert not np.array_equal(program.changed_recordings(wave, 16_000, seed=2)["noise"], again)
    assert np.abs(changed["gain"]).max() == pytest.approx(0.5 * 10 ** (-6 / 20), rel=1e-4)
    assert np.array_equal(changed["shift"], wave[80:])
    inner = slice(500, -500)
    np.testing.assert_allclose(changed["resampling"][inner], wave[inner], atol=0.01)
    high = (0.5 * np.sin(2 * np.pi * 6000 * times)).astype(np.float32)
    lost = program.changed_recordings(high, 16_000, seed=1)["resampling"]
    assert np.abs(lost[inner]).max() < 0.01
    assert program.changed_recordings(wave * 2, 16_000, seed=1)["noise"].max() == 1
