import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, plain
from forking import ForkedRun
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut

from codec import load_codec, read_audio
from codec.audio import stream_audio
from codec.io import FileLock
from codec.tokenize import export_tokens, part_names, parts_of, summarize
from codec.tokens import DamagedShard, TokenShard
from codec.training.data import load_cut
from codec.training.run import shared_numbers
from recipes import export_tokens as export_recipe

SECONDS = [0.5, 1.7, 0.9, 1.2, 0.7, 1.9, 0.8, 1.1]
THREE, FOUR, ONE = 3.0 / 3600, 4.0 / 3600, 1e-6
"""Hours of a part, by the number of cuts that most parts then have."""


@pytest.fixture
def cuts(tmp_path: Path, write_wav: Callable[..., Path]) -> list[MonoCut]:
    """Eight cuts of different lengths; number 2 is empty, number 5 cut in half."""
    cuts = []
    for number, seconds in enumerate(SECONDS):
        path = write_wav(tmp_path / "audio" / f"rec {number}.flac", seconds, seed=number)
        recording = Recording.from_file(path, recording_id=f"cut-{number}")
        words = SupervisionSegment(
            f"s{number}", recording.id, 0.0, seconds, text=f"text {number}", speaker="anna"
        )
        cuts.append(
            MonoCut(f"cut-{number}", 0.0, seconds, 0, recording=recording, supervisions=[words])
        )
    broken = [tmp_path / "audio" / f"rec {number}.flac" for number in (2, 5)]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(broken[1].read_bytes()[: broken[1].stat().st_size // 2])
    return cuts


def contents(folder: Path) -> dict[str, tuple]:
    shard = TokenShard.open(folder)
    return {row.id: (row.text, row.speaker, row.duration, row.codes.tobytes()) for row in shard}


def test_ranks_write_every_readable_cut_once_in_order(
    cuts: list[MonoCut], tiny_codec_folder: Path, tmp_path: Path
) -> None:
    codec = load_codec(tiny_codec_folder)
    for numbers in ([1, 3], [0, 2, 4]):
        export_tokens(cuts, codec, tmp_path / "out", numbers=numbers, part_hours=THREE)
    summary = summarize(tmp_path / "out", len(parts_of(cuts, THREE)))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == part_names(3)
    readable = [f"cut-{number}" for number in (0, 1, 3, 4, 6, 7)]
    shard = TokenShard.open(tmp_path / "out", expect=codec.stamp)
    assert shard.ids == readable
    assert shard.texts == [f"text {name[-1]}" for name in readable]
    assert shard.speakers == ["anna"] * 6
    assert [skipped.id for skipped in summary.skipped] == ["cut-2", "cut-5"]
    assert "rec 2.flac" in summary.skipped[0].reason
    listed = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in listed] == ["cut-2", "cut-5"]
    assert summary.num_utterances == 6


def test_parts_have_a_duration_and_keep_the_order(cuts: list[MonoCut]) -> None:
    assert parts_of(cuts, THREE) == [range(3), range(3, 6), range(6, 8)]
    assert parts_of(cuts, FOUR) == [range(4), range(4, 8)]
    # A cut longer than a part: the next one begins in a later part.
    assert parts_of(cuts, ONE) == [range(index, index + 1) for index in range(8)]
    assert parts_of(cuts) == [range(8)]
    hours = [SimpleNamespace(duration=each) for each in (1800.0, 9000.0, 1.0, 3600.0, 0.1)]
    assert parts_of(hours) == [range(2), range(2, 4), range(4, 5)]


def test_each_part_goes_to_the_rank_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    slow, fast = (plain(shared_numbers)(SimpleNamespace(num_processes=2)) for _ in range(2))
    taken = [next(slow), *(next(fast) for _ in range(5)), next(slow), next(fast)]
    assert taken == [0, 1, 2, 3, 4, 5, 6, 7]
    alone = plain(shared_numbers)(SimpleNamespace(num_processes=1))
    assert [next(alone), next(alone)] == [0, 1]


def test_batches_give_the_codes_of_single_recordings(
    cuts: list[MonoCut], tiny_codec_folder: Path, tmp_path: Path
) -> None:
    codec = load_codec(tiny_codec_folder)
    export_tokens(cuts, codec, tmp_path / "out", batch_seconds=6.0)
    for row in TokenShard.open(tmp_path / "out"):
        wave = read_audio(tmp_path / "audio" / f"rec {row.id[-1]}.flac", codec.sample_rate)
        alone = codec.encode_stream([wave])
        assert row.duration == len(wave) / codec.sample_rate
        assert row.codes.shape == alone.shape
        # Padding may turn the last float and with it a near tie; never more.
        assert np.mean(row.codes != alone) < 0.02


def test_a_batch_never_exceeds_its_seconds(cuts: list[MonoCut]) -> None:
    from codec.tokenize import batches_of

    batches = list(batches_of(cuts, 3.9))
    assert sorted(cut.id for batch in batches for cut in batch) == [cut.id for cut in cuts]
    assert all(len(batch) * max(cut.duration for cut in batch) <= 3.9 for batch in batches)
    assert [len(batch) for batch in batches_of(cuts, 0.1)] == [1] * len(cuts)


def test_whole_parts_are_kept_and_damaged_ones_written_again(
    cuts: list[MonoCut], tiny_codec_folder: Path, tmp_path: Path
) -> None:
    codec = load_codec(tiny_codec_folder)
    export_tokens(cuts, codec, tmp_path, part_hours=THREE)
    before = contents(tmp_path)
    first, second, third = sorted(tmp_path.glob("*.parquet"))
    rotten = bytearray(second.read_bytes())
    start = pq.ParquetFile(second).metadata.row_group(0).column(6).data_page_offset
    rotten[start + 40] ^= 1  # Among the codes.
    second.write_bytes(rotten)
    with pytest.raises(DamagedShard):
        list(TokenShard.open(second))
    export_tokens(cuts, codec, tmp_path, part_hours=THREE)
    assert contents(tmp_path) == before
    kept = first.stat().st_mtime_ns
    second.unlink()
    third.write_bytes(third.read_bytes()[:100])
    (tmp_path / f".{second.name}.1-2.tmp").write_bytes(b"left by a killed run")
    reported: list[int] = []
    export_tokens(cuts, codec, tmp_path, part_hours=THREE, on_part=reported.append)
    assert contents(tmp_path) == before
    assert first.stat().st_mtime_ns == kept
    assert reported == [3, 6, 8]
    assert not list(tmp_path.glob(".*.tmp"))


def test_skipped_recordings_are_tried_again_when_asked(
    cuts: list[MonoCut],
    tiny_codec_folder: Path,
    tmp_path: Path,
    write_wav: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    settings = [
        f"cuts={tmp_path / 'cuts.jsonl.gz'}",
        f"codec={tiny_codec_folder}",
        f"out={tmp_path / 'out'}",
        f"part_hours={THREE}",
    ]

    def closing_line(*more: str) -> dict:
        export_recipe.main([*settings, *more])
        return json.loads(capsys.readouterr().out)

    assert "retry_skipped=true" in closing_line()["note"]
    first, *_, last = sorted((tmp_path / "out").glob("*.parquet"))
    kept = last.stat().st_mtime_ns
    write_wav(tmp_path / "audio" / "rec 2.flac", SECONDS[2])
    assert closing_line()["skipped"] == 2
    retried = closing_line("retry_skipped=true")
    assert (retried["utterances"], retried["skipped"]) == (7, 1)
    assert TokenShard.open(first).ids == ["cut-0", "cut-1", "cut-2"]
    assert last.stat().st_mtime_ns == kept  # Nothing was skipped in it.


def test_two_exports_never_share_a_folder(
    cuts: list[MonoCut], tiny_codec_folder: Path, tmp_path: Path
) -> None:
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    settings = [
        f"cuts={tmp_path / 'cuts.jsonl.gz'}",
        f"codec={tiny_codec_folder}",
        f"out={tmp_path / 'out'}",
    ]
    held = FileLock(tmp_path / "out")
    temporary = tmp_path / "out" / f".{part_names(1)[0]}.1-2.tmp"
    temporary.write_bytes(b"the other's")
    with pytest.raises(ValueError, match="out: another process is running in this folder"):
        export_recipe.main(settings)
    assert temporary.exists()
    held.close()
    export_recipe.main(settings)
    export_recipe.main(settings)  # The lock was given back.


def test_a_long_recording_is_never_held_whole(
    tiny_codec_folder: Path,
    tmp_path: Path,
    write_wav: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuts = []
    for name, seconds in (("long", 100.0), ("short", 1.0)):
        path = write_wav(tmp_path / f"{name}.flac", seconds, 22_050)
        cuts.append(Recording.from_file(path, recording_id=name).to_cut().with_id(name))
    (tmp_path / "cut.flac").write_bytes((tmp_path / "long.flac").read_bytes()[:200_000])
    broken = Recording.from_file(tmp_path / "long.flac", recording_id="cut")
    broken.sources[0].source = str(tmp_path / "cut.flac")
    cuts.append(broken.to_cut().with_id("cut"))
    codec = load_codec(tiny_codec_folder)
    expected = codec.encode_stream([read_audio(tmp_path / "long.flac", codec.sample_rate)])
    coded, loaded = [], []
    encode_piece = codec._encode_chunk

    def spy_on_pieces(wave: torch.Tensor, *arguments: Any) -> Any:
        coded.append(wave.shape[-1])
        return encode_piece(wave, *arguments)

    def spy_on_files(path: str, rate: int) -> Iterator[np.ndarray]:
        for block in stream_audio(path, rate):
            loaded.append(len(block))
            yield block

    monkeypatch.setattr(codec, "_encode_chunk", spy_on_pieces)
    monkeypatch.setattr("codec.tokenize.stream_audio", spy_on_files)
    monkeypatch.setattr(
        "codec.tokenize.load_cut",
        lambda cut, rate: loaded.append(round(cut.duration * rate)) or load_cut(cut, rate),
    )
    export_tokens(cuts, codec, tmp_path / "out", batch_seconds=60.0)
    assert max(*loaded, *coded) < 40 * codec.sample_rate
    assert sum(loaded) > 100 * codec.sample_rate
    long, short = TokenShard.open(tmp_path / "out")
    assert (long.id, long.duration, short.id) == ("long", 100.0, "short")
    assert np.mean(long.codes != expected) < 0.001
    [skipped] = summarize(tmp_path / "out", 1).skipped
    assert skipped.id == "cut"
    assert "cut.flac" in skipped.reason


def test_other_codecs_lists_and_part_sizes_are_refused(
    cuts: list[MonoCut], tiny_codec_folder: Path, tmp_path: Path
) -> None:
    codec = load_codec(tiny_codec_folder)
    export_tokens(cuts, codec, tmp_path, part_hours=FOUR)
    with pytest.raises(ValueError, match="is no part of this export"):
        export_tokens(cuts, codec, tmp_path, part_hours=THREE)
    with pytest.raises(ValueError, match="another list of cuts"):
        export_tokens([cuts[1], cuts[0], *cuts[2:]], codec, tmp_path, part_hours=FOUR)
    next(codec.parameters()).data.add_(1)
    with pytest.raises(ValueError, match="made by codec"):
        export_tokens(cuts, codec, tmp_path, part_hours=FOUR)
    with pytest.raises(ValueError, match="'cut-0' occurs twice"):
        export_tokens([cuts[0], cuts[0]], codec, tmp_path / "twice")


def test_nothing_readable_is_an_error(
    cuts: list[MonoCut], tiny_codec_folder: Path, tmp_path: Path
) -> None:
    export_tokens([cuts[2], cuts[5]], load_codec(tiny_codec_folder), tmp_path / "out")
    with pytest.raises(ValueError, match="none of the 2 recordings could be read"):
        summarize(tmp_path / "out", 1)
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 2


def recipe(*settings: str) -> list[str]:
    script = ROOT / "recipes" / "export_tokens.py"
    return [str(script), *settings]


def test_killed_at_any_moment_the_export_ends_as_if_it_never_was(
    cuts: list[MonoCut], tiny_codec_folder: Path, tmp_path: Path, start: Callable[..., ForkedRun]
) -> None:
    codec = load_codec(tiny_codec_folder)
    export_tokens(cuts, codec, tmp_path / "whole", part_hours=ONE)
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    out = tmp_path / "killed"
    command = recipe(
        f"cuts={tmp_path / 'cuts.jsonl.gz'}",
        f"codec={tiny_codec_folder}",
        f"out={out}",
        f"part_hours={ONE}",
    )
    # Killed as soon as there are four files in the folder, temporary ones and the lock included.
    start(None, *command).kill_when(lambda: out.exists() and len(list(out.iterdir())) >= 4)
    for path in out.glob("*.parquet"):
        TokenShard.open(path)  # Complete, whatever the moment.
    done = start(None, *command).wait()
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["utterances"], result["skipped"]) == (6, 2)
    assert "rec 5.flac" in done.stderr
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.glob(".*.tmp"))


def test_two_launched_ranks_share_the_parts(
    cuts: list[MonoCut], tiny_codec_folder: Path, tmp_path: Path, launch: Callable
) -> None:
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    script, *settings = recipe(
        f"cuts={tmp_path / 'cuts.jsonl.gz'}",
        f"codec={tiny_codec_folder}",
        f"out={tmp_path / 'two'}",
        f"part_hours={THREE}",
    )
    done = launch("ddp", script, *settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["utterances"] == 6
    export_tokens(cuts, load_codec(tiny_codec_folder), tmp_path / "one", part_hours=THREE)
    for name in part_names(3):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
