"""Feature caches: writing, resuming, corrupted shards, and reading crops."""

import json
import logging
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lhotse.cut import MonoCut
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_teachers import EvenTranscriber
from torch import Tensor

from codec.distillation import feature_cache
from codec.distillation.feature_cache import FeatureCache, complete_cache, write_cache
from codec.distillation.teachers import SpeechTeacher
from codec.distillation.word_alignment import Word
from codec.training.data import load_cut

SECONDS = [0.9, 1.7, 0.6, 1.25, 0.4]


@torch.no_grad()
def alone(cut: MonoCut, speech: SpeechTeacher) -> Tensor:
    return speech(torch.from_numpy(load_cut(cut, 16_000))[None, None]).values[0]


def test_features_of_crops_are_those_of_whole_recordings(tmp_path, cuts, speech) -> None:
    summary = write_cache(tmp_path / "cache", cuts, speech=speech, batch_seconds=3)
    assert (summary.num_recordings, summary.skipped) == (5, [])
    assert summary.hours == pytest.approx(sum(SECONDS) / 3600, rel=1e-3)
    cache = FeatureCache.open(tmp_path / "cache")
    assert len(cache) == 5
    assert cache.facts["speech"]["name"] == str(tmp_path / "hubert")
    assert {key: cache.facts["speech"][key] for key in ("layer", "dimension", "frame_rate")} == {
        "layer": "mean", "dimension": 16, "frame_rate": 50.0,
    }  # fmt: skip
    assert cache.facts["text"] is None
    for cut in cuts:
        whole = alone(cut, speech)
        found = cache.speech(cut.id, 0, 60)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), whole, atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(cache.speech(cut.id, 0.1, 0.2), found[5:15])
    # A crop at the very end has what is left, and one frame at the least.
    total = len(cache.speech("cut/0", 0, 60))
    assert len(cache.speech("cut/0", 0.7, 0.2)) == total - 35
    assert len(cache.speech("cut/0", 0.9, 0.2)) == 1
    with pytest.raises(ValueError, match="no recording 'cut/9'"):
        cache.speech("cut/9", 0, 1)
    with pytest.raises(ValueError, match="has no transcriber"):
        cache.text("cut/0")


def test_words_keep_their_times_and_states(tmp_path, cuts, speech, text) -> None:
    write_cache(tmp_path / "cache", cuts, speech=speech, text=text, transcriber=EvenTranscriber())
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.facts["words"] == {"transcriber": "even", "recorded": True}
    found = cache.text("cut/1")
    assert [word.text for word in found.words] == ["on", "the", "mat"]
    assert found.words[1].start == pytest.approx(1.7 / 3)
    assert isinstance(found.words[0], Word)
    [expected] = text([["on", "the", "mat"]])
    torch.testing.assert_close(found.states.float(), expected.words, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found.sentence.float(), expected.sentence, atol=2e-3, rtol=2e-3)


def test_recognized_words_need_no_transcripts(tmp_path, cuts, text) -> None:
    cuts[0].supervisions = []
    write_cache(tmp_path / "cache", cuts, text=text, transcriber=EvenTranscriber(), recorded=False)
    cache = FeatureCache.open(tmp_path / "cache")
    assert [word.text for word in cache.text("cut/0").words] == ["the", "mat"]
    with pytest.raises(ValueError, match="has no speech teacher"):
        cache.speech("cut/0", 0, 1)
    # Words alone, without a text teacher.
    write_cache(tmp_path / "words", cuts, transcriber=EvenTranscriber(), recorded=False)
    words = FeatureCache.open(tmp_path / "words").text("cut/1")
    assert (len(words.words), words.states.shape, words.sentence.shape) == (2, (2, 0), (0,))


def test_unusable_recordings_are_skipped_and_listed(tmp_path, cuts, speech, text) -> None:
    Path(cuts[1].recording.sources[0].source).write_bytes(b"")
    cuts[2].supervisions = []
    cuts[3].supervisions[0].text = "impossible words"
    clock = EvenTranscriber()
    summary = write_cache(tmp_path / "cache", cuts, speech=speech, text=text, transcriber=clock)
    assert summary.num_recordings == 2
    lines = (tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()
    reasons = {one["id"]: one["reason"] for one in map(json.loads, lines)}
    assert reasons.keys() == {"cut/1", "cut/2", "cut/3"}
    assert "empty" in reasons["cut/1"]
    assert "no transcript" in reasons["cut/2"]
    assert "cannot be aligned" in reasons["cut/3"]
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.missing(cuts) == ["cut/1", "cut/2", "cut/3"]
    # They are tried again, and only they.
    cuts[3].supervisions[0].text = "the mat"
    clock.num_seen = 0
    summary = write_cache(tmp_path / "cache", cuts, speech=speech, text=text, transcriber=clock)
    assert (summary.num_recordings, clock.num_seen) == (3, 1)
    assert {one.id for one in summary.skipped} == {"cut/1", "cut/2"}


def test_nothing_usable_is_an_error(tmp_path, cuts, speech) -> None:
    for cut in cuts:
        Path(cut.recording.sources[0].source).write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the recordings could be used; the first: .*emp"):
        write_cache(tmp_path / "cache", cuts, speech=speech)


def test_a_killed_run_resumes(tmp_path, cuts, speech, monkeypatch) -> None:
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)
    whole = speech.forward
    seen: list[int] = []

    def fail_at_the_third(wave, lengths=None):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(wave))
        return whole(wave, lengths)

    speech.forward = fail_at_the_third
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cache", cuts, speech=speech, batch_seconds=0.1)
    with pytest.raises(ValueError, match=r"incomplete; run recipes/cache_teachers\.py again"):
        FeatureCache.open(tmp_path / "cache")
    shards = sorted(path.name for path in (tmp_path / "cache").glob("*.safetensors"))
    assert len(shards) == 2
    (tmp_path / "cache" / f".{shards[0]}.123-4.tmp").write_bytes(b"left behind")

    seen.clear()
    speech.forward = lambda wave, lengths=None: (seen.append(len(wave)), whole(wave, lengths))[1]
    summary = write_cache(tmp_path / "cache", cuts, speech=speech, batch_seconds=0.1)
    assert (summary.num_recordings, seen) == (5, [1, 1, 1])
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    cache = FeatureCache.open(tmp_path / "cache")
    torch.testing.assert_close(
        cache.speech("cut/1", 0, 9).float(), alone(cuts[1], speech), atol=5e-3, rtol=5e-3
    )


def test_ranks_share_the_recordings_and_one_completes(tmp_path, cuts, speech) -> None:
    for rank in (1, 0):
        write_cache(tmp_path / "cache", cuts, speech=speech, share=(rank, 2))
    with pytest.raises(ValueError, match="incomplete"):
        FeatureCache.open(tmp_path / "cache")
    assert complete_cache(tmp_path / "cache").num_recordings == 5
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.missing(cuts) == []
    modes = {file.stat().st_mode for file in (tmp_path / "cache").iterdir()}
    assert len(modes) == 1  # Whoever may read cache.json may read the shards.
    sizes = [len(safe_open(file, "pt").keys()) for file in (tmp_path / "cache").glob("*.safetens*")]
    assert sorted(sizes) == [2, 3]


def test_the_size_is_logged_and_checked_before_anything_is_computed(
    tmp_path, cuts, speech, text, caplog, monkeypatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    speech.forward = lambda *_: pytest.fail("computed before the disk was checked")
    with pytest.raises(ValueError, match="needs 0 MB, but 0 MB are free; make room"):
        write_cache(
            tmp_path / "cache", cuts, speech=speech, text=text, transcriber=EvenTranscriber()
        )
    # 50 Hz x 16 x 2 bytes x 3600 s = 5.76 MB, and 10,000 x (32 + 32) bytes.
    assert "5 recordings to write, 0.00 hours, 50 Hz x 16 x 2 bytes" in caplog.text
    assert "= 6 MB an hour" in caplog.text


def test_a_cache_of_other_teachers_is_refused(tmp_path, cuts, speech) -> None:
    write_cache(tmp_path / "cache", cuts, speech=speech)
    name = str(tmp_path / "hubert")
    assert len(FeatureCache.open(tmp_path / "cache", speech=(name, "mean"))) == 5
    with pytest.raises(
        ValueError, match=r"speech teacher is .*hubert, layer mean, not .*, layer 9"
    ):
        FeatureCache.open(tmp_path / "cache", speech=(name, "9"))
    with pytest.raises(ValueError, match=r"not .*wavlm, layer mean; name that one"):
        FeatureCache.open(tmp_path / "cache", speech=(str(tmp_path / "wavlm"), "mean"))
    with pytest.raises(ValueError, match="has no text teacher"):
        FeatureCache.open(tmp_path / "cache", text=("bert", "mean"))
    speech.layer = "last"
    with pytest.raises(ValueError, match=r"made with speech .* choose another folder"):
        write_cache(tmp_path / "cache", cuts, speech=speech)


def test_an_unknown_version_and_no_cache_are_refused(tmp_path, cuts, speech) -> None:
    with pytest.raises(ValueError, match="no feature cache; recipes"):
        FeatureCache.open(tmp_path)
    write_cache(tmp_path / "cache", cuts, speech=speech)
    facts = tmp_path / "cache" / "cache.json"
    whole = facts.read_text()
    facts.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        FeatureCache.open(tmp_path / "cache")
    facts.write_text(whole[:40])
    with pytest.raises(ValueError, match=r"cache\.json: corrupted file"):
        FeatureCache.open(tmp_path / "cache")


@pytest.mark.parametrize("left", [0, 5, 100, -10])
def test_missing_and_truncated_shards_are_reported_and_written_again(
    tmp_path, cuts, speech, left
) -> None:
    write_cache(tmp_path / "cache", cuts, speech=speech)
    [shard] = (tmp_path / "cache").glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:left])
    with pytest.raises(ValueError, match=r"features-.* is truncated .* run recipes"):
        FeatureCache.open(tmp_path / "cache")
    shard.unlink()
    with pytest.raises(ValueError, match=r"features-.* is missing; run recipes"):
        FeatureCache.open(tmp_path / "cache")
    shard.write_bytes(whole[:left])
    assert write_cache(tmp_path / "cache", cuts, speech=speech).num_recordings == 5
    assert len(FeatureCache.open(tmp_path / "cache")) == 5


def corrupt(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Changes one recording's features in a complete cache."""
    [shard] = folder.glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        tensors, notes = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["speech/cut/3"] = change(tensors["speech/cut/3"]).contiguous()
    save_file(tensors, shard, notes)
    note_size(folder, shard)


def note_size(folder: Path, shard: Path) -> None:
    facts = json.loads((folder / "cache.json").read_text())
    facts["shards"][shard.name] = shard.stat().st_size
    (folder / "cache.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values[None], r"speech/cut/3 has shape \[1, 62, 16\].*rank 2"),
        (lambda values: values[:, :8], r"speech/cut/3 has shape \[62, 8\].*last size of 16"),
        (lambda values: values.float(), r"speech/cut/3 has shape \[62, 16\] of F32"),
        (lambda values: values[:60], r"cut/3 has 60 features, but 1\.250 s have 62"),
    ],
)
def test_features_of_wrong_shape_name_the_recording(
    tmp_path, cuts, speech, change, message
) -> None:
    write_cache(tmp_path / "cache", cuts, speech=speech)
    corrupt(tmp_path / "cache", change)
    with pytest.raises(ValueError, match=message + r".* remove .* run recipes"):
        FeatureCache.open(tmp_path / "cache")


def test_one_frame_more_or_less_is_accepted(tmp_path, cuts, speech) -> None:
    write_cache(tmp_path / "cache", cuts, speech=speech)
    corrupt(tmp_path / "cache", lambda values: values[:61])
    assert len(FeatureCache.open(tmp_path / "cache").speech("cut/3", 0, 9)) == 61


def test_a_recording_that_has_changed_is_named(tmp_path, cuts, speech) -> None:
    write_cache(tmp_path / "cache", cuts, speech=speech)
    longer = cuts[0].truncate(duration=0.5, preserve_id=True)
    with pytest.raises(ValueError, match=r"cut/0 has 44 features, but 0\.500 s have 24"):
        FeatureCache.open(tmp_path / "cache").missing([longer])


def test_features_that_do_not_fit_float16_are_skipped(tmp_path, cuts, speech) -> None:
    whole = speech.forward
    speech.forward = lambda *given: (found := whole(*given))._replace(values=found.values * 1e6)
    with pytest.raises(ValueError, match="do not fit into float16; choose another layer"):
        write_cache(tmp_path / "cache", cuts, speech=speech)


def test_invalid_arguments_are_refused(tmp_path, cuts, speech, text) -> None:
    with pytest.raises(ValueError, match="nothing to cache"):
        write_cache(tmp_path / "cache", cuts)
    with pytest.raises(ValueError, match="needs a transcriber"):
        write_cache(tmp_path / "cache", cuts, speech=speech, text=text)
    with pytest.raises(ValueError, match="occurs twice"):
        write_cache(tmp_path / "cache", [*cuts, cuts[0]], speech=speech)


def first_of(cache: FeatureCache, queue) -> None:
    queue.put(cache.speech("cut/1", 0.2, 0.1).tolist())


def test_loader_processes_read_the_same(tmp_path, cuts, speech) -> None:
    """Forked ones; spawned ones get a pickle."""
    write_cache(tmp_path / "cache", cuts, speech=speech)
    cache = FeatureCache.open(tmp_path / "cache")
    expected = cache.speech("cut/1", 0.2, 0.1).tolist()  # Its file is open.
    assert pickle.loads(pickle.dumps(cache)).speech("cut/1", 0.2, 0.1).tolist() == expected
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=first_of, args=(cache, queue))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    assert queue.get() == expected


def test_each_shard_is_opened_once(tmp_path, cuts, speech, monkeypatch) -> None:
    import safetensors

    write_cache(tmp_path / "cache", cuts, speech=speech)
    opened: list[str] = []
    real = safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda path, **kind: (opened.append(path), real(path, **kind))[1]
    )
    cache = FeatureCache.open(tmp_path / "cache")
    for _ in range(3):
        for cut in cuts:
            cache.speech(cut.id, 0.1, 0.2)
    assert len(opened) == 1


def test_errors_about_missing_features_name_the_remedy(tmp_path, cuts, speech, text) -> None:
    write_cache(tmp_path / "spoken", cuts[:1], speech=speech)
    cache = FeatureCache.open(tmp_path / "spoken")
    way = r"; write another cache with one into a new folder \(recipes/cache_teachers\.py\)$"
    with pytest.raises(ValueError, match=f"the cache has no transcriber{way}"):
        cache.text("cut/0")
    with pytest.raises(ValueError, match=f"the cache has no text teacher{way}"):
        FeatureCache.open(tmp_path / "spoken", text=(text.name, "mean"))
    write_cache(tmp_path / "words", cuts[:1], transcriber=EvenTranscriber())
    with pytest.raises(ValueError, match=f"the cache has no speech teacher{way}"):
        FeatureCache.open(tmp_path / "words").speech("cut/0", 0, 1)
