"""What teachers say of crops: beside the codec or from a cache, at the codec's frame rate."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lhotse import Recording
from lhotse.cut import MonoCut
from safetensors.torch import save_file
from test_feature_cache import Clock, cuts, speech, text
from test_speech_teachers import save
from test_teachers import save_text_model

import codec.words
from codec.config import CodecConfig, SpectralConfig
from codec.data import Crops, load_cut
from codec.feature_writer import write_cache
from codec.speech_teachers import SpeechTeacher
from codec.targets import Teachers
from codec.teachers import TextTeacher
from codec.train_config import DistillConfig, SpeechTeacherConfig, TextTeacherConfig

__all__ = ["cuts", "speech", "text"]  # Fixtures.

CODEC = CodecConfig(spectral=SpectralConfig(hop=160, window=640))  # 16 kHz, 25 Hz.


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec.words, "load_transcriber", lambda *_, **__: Clock())


def crops(cuts: list[MonoCut], start: float = 0.0, seconds: float = 2.0) -> Crops:
    """The cuts from `start` on, padded to `seconds`."""
    wave, lengths = torch.zeros(len(cuts), 1, round(16_000 * seconds)), []
    for row, cut in zip(wave, cuts, strict=True):
        samples = torch.from_numpy(load_cut(cut, 16_000, start=start, duration=seconds))
        row[0, : len(samples)] = samples
        lengths.append(len(samples))
    ids = tuple(cut.id for cut in cuts)
    return Crops(wave, torch.tensor(lengths), ids, (start,) * len(cuts))


def configured(tmp_path: Path, **changes: object) -> DistillConfig:
    """The two tiny teachers of the fixtures; `speech` and `text` change their settings."""
    speech: dict = {"model": str(tmp_path / "hubert"), **changes.pop("speech", {})}  # type: ignore
    text: dict = {
        "model": str(tmp_path / "bert"), "transcriber": "clock", **changes.pop("text", {})  # type: ignore
    }  # fmt: skip
    return DistillConfig(
        speech=SpeechTeacherConfig(**speech), text=TextTeacherConfig(**text), half=False, **changes
    )


@pytest.fixture
def cached(
    tmp_path: Path, cuts: list[MonoCut], speech: SpeechTeacher, text: TextTeacher
) -> DistillConfig:
    folder = tmp_path / "cache"
    write_cache(folder, cuts, speech=speech, text=text, transcriber=Clock(), recorded=False)
    return configured(tmp_path, cache=str(folder))


def test_a_cache_says_what_the_teachers_say(
    cached: DistillConfig, cuts: list[MonoCut], tmp_path: Path
) -> None:
    batch = crops(cuts)
    live = Teachers(configured(tmp_path), CODEC, "cpu")(batch)
    read = Teachers(cached, CODEC, "cpu")(batch)
    assert live.keys() == read.keys() == {"speech", "text"}
    for name, target in live.items():
        # The whole batch may have a frame more than its longest item.
        frames = min(target.mask.shape[1], read[name].mask.shape[1])
        mask = target.mask[:, :frames]
        assert torch.equal(mask, read[name].mask[:, :frames])
        found, expected = read[name].values[:, :frames][mask], target.values[:, :frames][mask]
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


def test_frames_are_those_of_the_codec_and_padding_is_masked(
    cached: DistillConfig, cuts: list[MonoCut]
) -> None:
    teachers, batch = Teachers(cached, CODEC, "cpu"), crops(cuts)
    targets = teachers(batch)
    frames = batch.wave.shape[-1] // CODEC.hop_length
    spoken = batch.lengths / CODEC.hop_length
    for name in ("speech", "text"):
        values, mask = targets[name]
        assert values.shape[2] == teachers.widths[name] == 16
        assert abs(values.shape[1] - frames) <= 1
        assert bool(((mask.sum(1) - spoken).abs() <= 1).all())
        assert [bool(row[0]) for row in mask] == [True] * len(cuts)


def test_each_word_has_its_own_frames(cached: DistillConfig, cuts: list[MonoCut]) -> None:
    """The clock hears "the mat", half of the recording each."""
    teachers = Teachers(cached, CODEC, "cpu")
    (values,), (mask,) = teachers(crops([cuts[0]], seconds=1.2))["text"]
    states = teachers.cache.text(cuts[0].id).states.float()
    assert mask.tolist() == [True] * 23 + [False] * 7  # 0.9 s are 22.5 frames.
    torch.testing.assert_close(values[:11], states[:1].expand(11, -1))
    torch.testing.assert_close(values[12:23], states[1:].expand(11, -1))
    # From 0.6 s on only the second word is left.
    (values,), (mask,) = teachers(crops([cuts[0]], start=0.6, seconds=0.4))["text"]
    assert mask.tolist() == [True] * 8 + [False] * 2
    torch.testing.assert_close(values[:8], states[1:].expand(8, -1))


@pytest.mark.parametrize("from_cache", [False, True])
def test_the_sentence_stands_on_every_frame(
    cached: DistillConfig, cuts: list[MonoCut], tmp_path: Path, from_cache: bool
) -> None:
    config = configured(
        tmp_path, text={"align": "global"}, cache=cached.cache if from_cache else ""
    )
    values, mask = Teachers(config, CODEC, "cpu")(crops(cuts[:2]))["text"]
    assert mask.sum(1).tolist() == [23, 43]
    torch.testing.assert_close(values, values[:, :1].expand_as(values))


@pytest.mark.parametrize("from_cache", [False, True])
def test_word_pieces_by_index_are_what_was_released(
    cached: DistillConfig, cuts: list[MonoCut], text: TextTeacher, tmp_path: Path, from_cache: bool
) -> None:
    config = configured(tmp_path, text={"align": "index"}, cache=cached.cache if from_cache else "")
    values, mask = Teachers(config, CODEC, "cpu")(crops(cuts[:2]))["text"]
    assert mask.all()
    torch.testing.assert_close(values, text.padded(["the mat"] * 2, values.shape[1]))


def test_a_crop_without_words_teaches_nothing(
    cached: DistillConfig, cuts: list[MonoCut], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Clock, "words", lambda self, wave, lengths, texts=None: [[] for _ in wave])
    for align in ("ctc", "global"):
        config = configured(tmp_path, text={"align": align})
        values, mask = Teachers(config, CODEC, "cpu")(crops(cuts[:2]))["text"]
        assert not mask.any()
        assert bool(values.isfinite().all())


def test_units_are_the_nearest_centroids(cached: DistillConfig, cuts, tmp_path: Path) -> None:
    features = Teachers(cached, CODEC, "cpu")(crops(cuts))["speech"]
    centroids = features.values[0, [2, 9, 20]].contiguous()
    file = tmp_path / "units.safetensors"
    save_file({"centroids": centroids}, file, {"teacher": cached.speech.model, "layer": "mean"})
    objective = {"objective": "units", "units": str(file)}
    teachers = Teachers(configured(tmp_path, speech=objective, cache=cached.cache), CODEC, "cpu")
    units, mask = teachers(crops(cuts))["speech"]
    assert teachers.widths["speech"] == 3
    assert units[0, [2, 9, 20]].tolist() == [0, 1, 2]
    assert torch.equal(mask, features.mask)
    save_file({"centroids": centroids}, file, {"teacher": "another", "layer": "mean"})
    with pytest.raises(ValueError, match=r"units of another, layer mean, but distill\.speech"):
        Teachers(configured(tmp_path, speech=objective, cache=cached.cache), CODEC, "cpu")
    file.write_bytes(b"cut")
    with pytest.raises(ValueError, match="not a whole file of units"):
        Teachers(configured(tmp_path, speech=objective, cache=cached.cache), CODEC, "cpu")
    file.unlink()
    with pytest.raises(ValueError, match=r"no such file; recipes/make_units\.py"):
        Teachers(configured(tmp_path, speech=objective, cache=cached.cache), CODEC, "cpu")


def test_a_codec_of_another_sample_rate_is_heard_at_the_teachers(
    cuts: list[MonoCut], tmp_path: Path
) -> None:
    save(tmp_path / "hubert", "hubert")
    save_text_model(tmp_path / "bert")
    config = CodecConfig(sample_rate=24_000, spectral=SpectralConfig(hop=240, window=960))
    wave = torch.from_numpy(load_cut(cuts[1], 24_000))[None, None]
    batch = Crops(wave, torch.tensor([wave.shape[-1]]), (cuts[1].id,), (0.0,))
    other = Teachers(configured(tmp_path), config, "cpu")(batch)["speech"]
    usual = Teachers(configured(tmp_path), CODEC, "cpu")(crops([cuts[1]], seconds=1.7))["speech"]
    assert other.values.shape == usual.values.shape
    cosine = torch.nn.functional.cosine_similarity(other.values, usual.values, dim=2)
    assert float(cosine.min()) > 0.9


def test_recordings_that_the_cache_lacks(
    cached: DistillConfig, cuts: list[MonoCut], tmp_path: Path, write_wav: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    teachers = Teachers(cached, CODEC, "cpu")
    assert teachers.known(cuts) == cuts
    new = Recording.from_file(write_wav(tmp_path / "new.wav", 0.5)).to_cut()
    with pytest.raises(ValueError, match=rf"lacks 1 of 6 recordings \(the first: {new.id}\)"):
        teachers.known([*cuts, new])
    (tmp_path / "cache" / "skipped.jsonl").write_text(f'{{"id": "{new.id}", "reason": "bad"}}\n')
    assert teachers.known([*cuts, new]) == cuts
    assert "1 recordings are left out" in caplog.text
    assert Teachers(configured(tmp_path), CODEC, "cpu").known([new]) == [new]


def test_a_text_teacher_needs_somebody_who_hears_the_words(tmp_path: Path) -> None:
    save(tmp_path / "hubert", "hubert")
    save_text_model(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"distill\.text\.transcriber names no model"):
        Teachers(configured(tmp_path, text={"transcriber": ""}), CODEC, "cpu")
