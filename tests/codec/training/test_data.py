"""Cuts to crops: pure functions of seed and number, and bad recordings cost only themselves."""

import gzip
import json
import re

import numpy as np
import pytest
import soundfile
import torch
from conftest import voiced
from lhotse import AudioSource, CutSet, Recording

import codec.training.data
from codec.training.data import CropDataset, crop_batches, load_cut, read_cuts


@pytest.fixture
def cuts(write_wav, tmp_path) -> CutSet:
    made = []
    for index, seconds in enumerate((1.0, 0.2, 2.0)):
        file = write_wav(tmp_path / "wavs" / f"{index}.wav", seconds, seed=index)
        made.append(Recording.from_file(file, recording_id=f"rec {index}").to_cut())
    return CutSet.from_cuts(made)


def dataset(cuts: CutSet, seed: int = 0) -> CropDataset:
    return CropDataset(list(cuts), sample_rate=16_000, seconds=0.5, seed=seed)


def test_crops_are_a_function_of_seed_and_number(cuts) -> None:
    again, other = dataset(cuts), dataset(cuts, seed=1)
    crops = [dataset(cuts)[index] for index in range(30)]
    for index in (29, 3, 17):
        assert torch.equal(again[index].wave, crops[index].wave)
    assert not all(torch.equal(other[index].wave, crops[index].wave) for index in range(6))
    assert all(crop.wave.shape == (1, 1, 8000) for crop in crops)
    # Runs of older versions resume with the same crops.
    assert [crop.ids[0][-1] for crop in crops[3:6]] == ["2", "0", "1"]
    assert [crop.starts[0] for crop in crops[3:6]] == pytest.approx([0.0490, 0.4991, 0], abs=1e-4)


def test_an_epoch_holds_every_recording_once_and_pads_short_ones(cuts) -> None:
    for epoch in range(5):
        crops = [dataset(cuts)[3 * epoch + position] for position in range(3)]
        padded = [bool((crop.wave[0, 0, 3200:] == 0).all()) for crop in crops]
        assert sum(padded) == 1
        short = crops[padded.index(True)]
        assert short.wave[0, 0, :3200].abs().max() > 0.05
        assert [int(crop.lengths) for crop in crops] == [3200 if each else 8000 for each in padded]


def test_a_crop_says_where_it_comes_from(cuts) -> None:
    named = {cut.id: cut for cut in cuts}
    (batch,) = crop_batches(dataset(cuts), batch_size=6, first=0, last=1, rank=0, world=1)
    assert sorted(batch.ids) == sorted(2 * list(named))
    assert batch.codes is None
    for wave, length, cut, start in zip(*batch[:4], strict=True):
        again = load_cut(named[cut], 16_000, start=start, duration=0.5, allow_silence=True)
        np.testing.assert_array_equal(wave[0, : int(length)].numpy(), again[:8000])


def test_a_crop_brings_the_codes_of_its_own_frames(cuts) -> None:
    codes = {cut.id: np.arange(int(np.ceil(cut.duration * 100))) for cut in cuts}
    crops = CropDataset(
        cuts, sample_rate=16_000, seconds=0.5, seed=0, codes=codes, hop_length=160
    )  # fmt: skip
    named = {cut.id: cut for cut in cuts}
    (batch,) = crop_batches(crops, batch_size=6, first=0, last=1, rank=0, world=1)
    assert batch.codes is not None
    starts = []
    for wave, length, cut, start, row in zip(*batch, strict=True):
        first = int(row[0])
        assert start == pytest.approx(first * 0.01)
        whole = np.minimum(np.arange(first, first + 50), len(codes[cut]) - 1)
        np.testing.assert_array_equal(row.numpy(), whole)
        again = load_cut(named[cut], 16_000, start=start, duration=0.5, allow_silence=True)
        np.testing.assert_array_equal(wave[0, : int(length)].numpy(), again[:8000])
        starts.append(first)
    assert max(starts) > 0


def test_ranks_share_the_batch_and_a_later_start_goes_on(cuts) -> None:
    def waves(**where) -> list[torch.Tensor]:
        return [batch.wave for batch in crop_batches(dataset(cuts), **where)]

    def batches(**where) -> list[torch.Tensor]:
        return waves(batch_size=2, last=4, **where)

    one = waves(batch_size=4, first=0, last=4, rank=0, world=1)
    two = [batches(first=0, rank=rank, world=2) for rank in (0, 1)]
    for step in range(4):
        assert torch.equal(torch.cat([two[0][step], two[1][step]]), one[step])
    later = batches(first=2, rank=1, world=2)
    assert len(later) == 2
    loader = crop_batches(dataset(cuts), batch_size=2, first=1, last=4, rank=0, world=1)
    assert len(loader) == 3
    assert torch.equal(later[0], two[1][2])


def test_a_bad_recording_costs_itself(cuts, tmp_path, caplog) -> None:
    bad = tmp_path / "wavs" / "2.wav"
    bad.write_bytes(bad.read_bytes()[:1000])
    data = dataset(cuts)
    for index in range(12):
        assert data[index].wave.abs().max() > 0.05
    assert [name.startswith("rec 2") for name in data.bad] == [True]
    assert "2.wav" in next(iter(data.bad.values()))
    assert caplog.text.count("2.wav") == 1


def test_the_next_recording_of_the_epoch_replaces_a_bad_one(cuts) -> None:
    data, ids = dataset(cuts), [cut.id for cut in cuts]
    data.bad = {ids[0]: "truncated"}
    for epoch in range(4):
        order = [dataset(cuts)[3 * epoch + position].ids[0] for position in range(3)]
        found = [data[3 * epoch + position].ids[0] for position in range(3)]
        place = order.index(ids[0])
        order[place] = order[(place + 1) % 3]
        assert found == order


def test_crops_may_fall_into_pauses(tmp_path) -> None:
    soundfile.write(tmp_path / "pause.wav", np.zeros(16_000), 16_000)
    data = dataset(CutSet.from_cuts([Recording.from_file(tmp_path / "pause.wav").to_cut()]))
    assert not data[0].wave.any()
    assert not data.bad


def test_any_failure_to_read_costs_the_recording_and_is_shared(cuts, tmp_path, monkeypatch) -> None:
    """A file without permission, or whatever lhotse raises for an archive."""
    read = codec.training.data.read_audio

    def locked(path, *args, **kwargs):
        if str(path).endswith("1.wav"):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(codec.training.data, "read_audio", locked)
    with pytest.raises(ValueError, match=r"cannot be read .*Permission denied"):
        load_cut(list(cuts)[1], 16_000)
    data = CropDataset(
        list(cuts), sample_rate=16_000, seconds=0.5, seed=0, bad_file=tmp_path / "skipped.jsonl"
    )
    for index in range(6):
        assert data[index].wave.abs().max() > 0.05
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 1
    assert "1.wav" in lines[0]["why"]


def test_nothing_readable_is_an_error(cuts, tmp_path) -> None:
    for file in (tmp_path / "wavs").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the recordings"):
        dataset(cuts)[0]


def test_load_cut_reads_the_stretch_it_names(cuts) -> None:
    whole = load_cut(list(cuts)[2], 16_000)
    assert len(whole) == 32_000
    part = load_cut(list(cuts)[2].truncate(offset=0.5, duration=1.0), 16_000, start=0.25)
    np.testing.assert_array_equal(part, whole[12_000:24_000])


def test_the_end_of_a_truncated_file_is_no_crop(cuts, tmp_path) -> None:
    """The header states two seconds, and the file has 1.6."""
    file = tmp_path / "wavs" / "2.wav"
    file.write_bytes(file.read_bytes()[: 44 + 2 * 25_600])
    cut = list(cuts)[2]
    later = cut.truncate(offset=0.25)
    for end in ({"cut": cut}, {"cut": cut, "start": 0.5}, {"cut": later, "start": 0.5}):
        with pytest.raises(ValueError, match="truncated"):
            load_cut(sample_rate=16_000, **end)


def test_cuts_that_need_lhotse(tmp_path) -> None:
    """Transforms, two files and archives; channels are averaged, clipped and resampled."""
    wave = np.stack([voiced(1.0, seed=seed) for seed in (0, 1)])
    for channel in (0, 1):
        soundfile.write(tmp_path / f"{channel}.wav", wave[channel], 16_000, subtype="FLOAT")
    cut = Recording.from_file(tmp_path / "0.wav").to_cut()
    np.testing.assert_allclose(load_cut(cut.perturb_volume(0.5), 16_000), 0.5 * wave[0], atol=1e-6)
    sources = [
        AudioSource(type="file", channels=[each], source=str(tmp_path / f"{each}.wav"))
        for each in (0, 1)
    ]
    both = Recording("both", sources, 16_000, 16_000, 1.0, channel_ids=[0, 1]).to_cut()
    np.testing.assert_allclose(load_cut(both, 16_000), wave.mean(0), atol=1e-6)
    np.testing.assert_allclose(
        load_cut(both, 16_000, start=0.25, duration=0.5), wave.mean(0)[4000:12_000], atol=1e-6
    )
    assert load_cut(both, 8000).shape == (8000,)
    loud = load_cut(cut.perturb_volume(5.0), 16_000)
    assert (loud.min(), loud.max()) == (-1.0, 1.0)
    np.testing.assert_allclose(loud, np.clip(5 * wave[0], -1, 1), atol=1e-5)


def test_lists_of_cuts(cuts, tmp_path) -> None:
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    assert len(read_cuts(tmp_path / "cuts.jsonl.gz")) == 3
    cuts.subset(first=1).to_file(tmp_path / "one.jsonl.gz")
    assert len(read_cuts(tmp_path / "one.jsonl.gz")) == 1
    with pytest.raises(ValueError, match="no such list"):
        read_cuts(tmp_path / "missing.jsonl.gz")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="the list of cuts is empty"):
        read_cuts(tmp_path / "empty.jsonl")
    with gzip.open(tmp_path / "broken.jsonl.gz", "wt") as file:
        file.write("{not json\n")
    whole = (tmp_path / "cuts.jsonl.gz").read_bytes()
    (tmp_path / "half.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for name in ("broken.jsonl.gz", "half.jsonl.gz"):
        with pytest.raises(ValueError, match=f"{name}: a corrupted list of cuts"):
            read_cuts(tmp_path / name)


@pytest.mark.parametrize("key", ["start", "duration", "offset"])
@pytest.mark.parametrize("value", ['"a"', "1e999", "[]"])
def test_lists_with_times_that_are_no_numbers(cuts, tmp_path, key: str, value: str) -> None:
    first, _, last = cuts
    made = last.mix(first).with_id("mixed")
    line = json.dumps(made.to_dict() | {"tracks": [t.to_dict() for t in made.tracks]})
    (tmp_path / "cuts.jsonl").write_text(re.sub(f'"{key}": [0-9.]+', f'"{key}": {value}', line))
    with pytest.raises(ValueError, match=r"cuts\.jsonl: (a corrupted|'mixed' has a start or dur)"):
        read_cuts(tmp_path / "cuts.jsonl")


@pytest.mark.parametrize("kind", ["command", "url"])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_lists_run_no_commands_and_download_nothing(
    cuts, tmp_path, kind: str, is_mixed: bool
) -> None:
    first, _, last = cuts
    command = f"touch {tmp_path / 'ran'}; cat {first.recording.sources[0].source}"
    first.recording.sources[0].type, first.recording.sources[0].source = kind, command
    made = last.mix(first) if is_mixed else first
    CutSet.from_cuts([last.with_id("fine"), made]).to_file(tmp_path / "cuts.jsonl")
    with pytest.raises(ValueError, match=f"is a {kind}, which is not run or downloaded"):
        read_cuts(tmp_path / "cuts.jsonl")
    assert not (tmp_path / "ran").exists()


def test_no_file_name_of_a_mixture_goes_to_a_shell(cuts, tmp_path) -> None:
    first, _, last = cuts
    first.recording.sources[0].source = f"$(touch {tmp_path / 'ran'}).sph"
    with pytest.raises(ValueError, match=r"cannot be read \(Error opening .*ran\)\.sph"):
        load_cut(last.mix(first), 16_000)
    assert not (tmp_path / "ran").exists()


def test_the_length_of_a_padded_cut_is_limited(cuts) -> None:
    padded = cuts[0].pad(duration=1e6)
    with pytest.raises(ValueError, match=r"archive of 1e\+06 s; at most 3600 s are read at once"):
        load_cut(padded, 16_000)
    assert load_cut(padded, 16_000, duration=0.5).shape == (8000,)


@pytest.mark.parametrize("part", [0, 1])
def test_the_sample_rates_of_a_mixture_are_limited(cuts, part: int) -> None:
    padded = cuts[0].pad(duration=cuts[0].duration + 1)
    track = padded.tracks[part].cut
    (track if part else track.recording).sampling_rate = 2**63
    with pytest.raises(ValueError, match=f"{padded.id}: {2**63} Hz; 4000 to 384000 Hz are read"):
        load_cut(padded, 16_000)


def test_a_mixture_that_lhotse_cannot_read_is_one_line(cuts, tmp_path) -> None:
    first, _, last = cuts
    first.recording.sources = []
    with pytest.raises(ValueError, match=r"cannot be read \(") as caught:
        load_cut(last.mix(first).with_id("mixed"), 16_000)
    assert str(caught.value).startswith("mixed: ")
    assert "\n" not in str(caught.value)
