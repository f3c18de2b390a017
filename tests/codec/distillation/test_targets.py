"""Targets of crops, computed or from a cache, at the codec's frame rate."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lhotse import Recording
from lhotse.cut import MonoCut
from safetensors.torch import save_file
from tiny_teachers import EvenTranscriber, save_speech_teacher, save_text_teacher

from codec.config import CodecConfig, SpectralConfig
from codec.distillation import word_alignment
from codec.distillation.feature_cache import write_cache
from codec.distillation.targets import Teachers
from codec.distillation.teachers import SpeechTeacher, TextTeacher
from codec.training.config import DistillConfig, LossWeights, SpeechTeacherConfig, TextTeacherConfig
from codec.training.data import Crops, load_cut

CODEC = CodecConfig(spectral=SpectralConfig(hop=160, window=640))  # 16 kHz, 25 Hz.


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_alignment, "load_transcriber", lambda *_, **__: EvenTranscriber())


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
        speech=SpeechTeacherConfig(**speech),
        text=TextTeacherConfig(**text),
        bfloat16=False,
        **changes,
    )


@pytest.fixture
def cached(
    tmp_path: Path, cuts: list[MonoCut], speech: SpeechTeacher, text: TextTeacher
) -> DistillConfig:
    folder = tmp_path / "cache"
    write_cache(
        folder, cuts, speech=speech, text=text, transcriber=EvenTranscriber(), recorded=False
    )
    return configured(tmp_path, cache=str(folder))


LIVE_OR_CACHED = pytest.mark.parametrize("from_cache", [False, True])


@LIVE_OR_CACHED
def test_an_item_of_a_batch_has_the_target_that_it_has_alone(
    cached: DistillConfig, cuts: list[MonoCut], tmp_path: Path, from_cache: bool
) -> None:
    teachers = Teachers(cached if from_cache else configured(tmp_path), CODEC, "cpu")
    together = teachers(crops(cuts, seconds=2.0))
    for index, cut in enumerate(cuts):
        alone = teachers(crops([cut], seconds=2.0))
        exact = teachers(crops([cut], seconds=cut.duration))
        for name, (values, mask) in together.items():
            assert torch.equal(mask[index], alone[name].mask[0])
            torch.testing.assert_close(values[index], alone[name].values[0], atol=1e-5, rtol=1e-4)
            frames = exact[name].mask.shape[1]
            assert torch.equal(mask[index, :frames], exact[name].mask[0])
            assert not mask[index, frames:].any()


def test_cached_targets_equal_computed_ones(
    cached: DistillConfig, cuts: list[MonoCut], tmp_path: Path
) -> None:
    batch = crops(cuts)
    live = Teachers(configured(tmp_path), CODEC, "cpu")(batch)
    read = Teachers(cached, CODEC, "cpu")(batch)
    assert live.keys() == read.keys() == {"speech", "text"}
    for name, (values, mask) in live.items():
        assert torch.equal(mask, read[name].mask)
        torch.testing.assert_close(read[name].values[mask], values[mask], atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("kind", ["hubert", "whisper"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_frames_are_those_of_the_codec_whatever_the_length(
    tmp_path: Path, kind: str, strides: tuple[int, ...]
) -> None:
    """50, 25 and 12.5 Hz and one above the teachers' 50: 100 Hz."""
    model = save_speech_teacher(tmp_path / kind, kind)
    config = DistillConfig(speech=SpeechTeacherConfig(model=model), bfloat16=False)
    networks = SpectralConfig(hop=160, window=640, strides=strides)
    codec_config = CodecConfig(spectral=networks)
    teachers = Teachers(config, codec_config, "cpu")
    for extra in (0, 1, 79, 80, 319):
        samples = 16_000 + extra
        wave = torch.randn(2, 1, samples + 4000) * 0.1
        batch = Crops(wave, torch.tensor([samples, 9000]), ("a", "b"), (0.0, 0.0))
        values, mask = teachers(batch)["speech"]
        assert values.shape[:2] == (2, -(-wave.shape[-1] // codec_config.hop_length))
        spoken = batch.lengths / codec_config.hop_length
        # HuBERT's convolutions leave up to 1.25 of their frames of 320 samples at the end.
        left = 1.25 * 320 / codec_config.hop_length
        assert bool((mask.sum(1) >= spoken - left - 0.51).all())
        assert bool((mask.sum(1) <= spoken + 1.01 * max(1, 320 / codec_config.hop_length)).all())


def test_each_word_has_its_own_frames(cached: DistillConfig, cuts: list[MonoCut]) -> None:
    """The transcriber recognizes "the mat", half of the recording each."""
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


@LIVE_OR_CACHED
def test_global_alignment_has_the_sentence_on_every_frame(
    cached: DistillConfig, cuts: list[MonoCut], text: TextTeacher, tmp_path: Path, from_cache: bool
) -> None:
    config = configured(
        tmp_path, text={"align": "global"}, cache=cached.cache if from_cache else ""
    )
    values, mask = Teachers(config, CODEC, "cpu")(crops(cuts[:2]))["text"]
    assert mask.sum(1).tolist() == [23, 43]
    sentence = text([["the", "mat"]])[0].sentence
    torch.testing.assert_close(values, sentence.expand_as(values), atol=5e-3, rtol=5e-3)


@LIVE_OR_CACHED
def test_index_alignment_is_that_of_the_released_code(
    cached: DistillConfig, cuts: list[MonoCut], text: TextTeacher, tmp_path: Path, from_cache: bool
) -> None:
    config = configured(tmp_path, text={"align": "index"}, cache=cached.cache if from_cache else "")
    values, mask = Teachers(config, CODEC, "cpu")(crops(cuts[:2]))["text"]
    assert mask.all()
    torch.testing.assert_close(values, text.padded(["the mat"] * 2, values.shape[1]))


def test_a_crop_without_words_has_an_empty_mask(
    cached: DistillConfig, cuts: list[MonoCut], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        EvenTranscriber, "words", lambda self, wave, lengths, texts=None: [[] for _ in wave]
    )
    for align in ("ctc", "global"):
        config = configured(tmp_path, text={"align": align})
        values, mask = Teachers(config, CODEC, "cpu")(crops(cuts[:2]))["text"]
        assert not mask.any()
        assert bool(values.isfinite().all())


def test_pseudo_labels_are_the_nearest_centroids(
    cached: DistillConfig, cuts, tmp_path: Path
) -> None:
    features = Teachers(cached, CODEC, "cpu")(crops(cuts))["speech"]
    centroids = features.values[0, [2, 9, 20]].contiguous()
    file = tmp_path / "units.safetensors"
    facts = {"teacher": cached.speech.model, "layer": "mean", "frame_rate": "25.0"}

    def teachers(centroids: torch.Tensor = centroids, **changes: str) -> Teachers:
        save_file({"centroids": centroids}, file, facts | changes)
        objective = {"objective": "units", "units": str(file)}
        config = configured(tmp_path, speech=objective, cache=cached.cache)
        return Teachers(config, CODEC, "cpu")

    units, mask = teachers()(crops(cuts))["speech"]
    assert teachers().widths["speech"] == 3
    assert units[0, [2, 9, 20]].tolist() == [0, 1, 2]
    assert torch.equal(mask, features.mask)
    with pytest.raises(ValueError, match="centroids of another, layer mean, width 16, but"):
        teachers(teacher="another")
    with pytest.raises(ValueError, match="width 5, but"):
        teachers(centroids[:, :5].contiguous())
    with pytest.raises(ValueError, match=r"centroids at 50\.0 Hz, but the codec has 25 Hz"):
        teachers(frame_rate="50.0")


def test_corrupted_centroids(cached: DistillConfig, tmp_path: Path) -> None:
    file = tmp_path / "units.safetensors"
    objective = {"objective": "units", "units": str(file)}
    config = configured(tmp_path, speech=objective, cache=cached.cache)
    with pytest.raises(ValueError, match=r"no such file; recipes/make_units\.py"):
        Teachers(config, CODEC, "cpu")
    file.write_bytes(b"cut")
    with pytest.raises(ValueError, match="corrupted file of centroids"):
        Teachers(config, CODEC, "cpu")


def test_features_of_another_rate_are_noticed(
    cached: DistillConfig, cuts: list[MonoCut], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = Teachers(configured(tmp_path), CODEC, "cpu")
    monkeypatch.setattr(teachers, "speech_rate", 100.0)
    with pytest.raises(ValueError, match="s longer or shorter than the audio"):
        teachers(crops(cuts))


def test_waves_are_resampled_to_the_teachers_rate(cuts: list[MonoCut], tmp_path: Path) -> None:
    save_speech_teacher(tmp_path / "hubert", "hubert")
    save_text_teacher(tmp_path / "bert")
    config = CodecConfig(sample_rate=24_000, spectral=SpectralConfig(hop=240, window=960))
    wave = torch.from_numpy(load_cut(cuts[1], 24_000))[None, None]
    batch = Crops(wave, torch.tensor([wave.shape[-1]]), (cuts[1].id,), (0.0,))
    other = Teachers(configured(tmp_path), config, "cpu")(batch)["speech"]
    usual = Teachers(configured(tmp_path), CODEC, "cpu")(crops([cuts[1]], seconds=1.7))["speech"]
    assert other.values.shape == usual.values.shape
    cosine = torch.nn.functional.cosine_similarity(other.values, usual.values, dim=2)
    assert torch.equal(other.mask, usual.mask)
    assert float(cosine[usual.mask].min()) > 0.9


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": TextTeacherConfig(model="b")}, "transcriber names no model"),
        ({"shared_head": True, "speech": SpeechTeacherConfig(model="h")}, "is for two teachers"),
        ({"cache": "somewhere"}, "names no teacher"),
    ],
)
def test_inconsistent_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**settings)
    with pytest.raises(ValueError, match=r"distill\.speech\.weight must be at least 0, got -0\.1"):
        SpeechTeacherConfig(model="h", weight=-0.1)
    with pytest.raises(ValueError, match=r"distill\.text\.cosine_weight must be at least 0"):
        TextTeacherConfig(model="b", cosine_weight=-1.0)
    with pytest.raises(ValueError, match=r"losses\.weights\.distill must be at least 0"):
        LossWeights(distill=-1.0)
