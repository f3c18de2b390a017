"""Speech encoders against transformers' own forward, alone and in padded batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import voiced
from tiny_teachers import SPEECH_MODELS, save_speech_teacher
from transformers import (
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperModel,
)

from codec.distillation import teachers
from codec.distillation.teachers import SpeechTeacher, load_speech_teacher, whisper_log_mel

WAVE_KINDS = [kind for kind in SPEECH_MODELS if kind != "whisper"]


def load(folder: Path, kind: str, layer: str = "mean", normalize: bool = True) -> SpeechTeacher:
    return load_speech_teacher(
        save_speech_teacher(folder, kind, normalize), layer=layer, half=False
    )


def speech(*seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch with something else than zeros in its padding, and its lengths."""
    waves = [voiced(length, seed=number) for number, length in enumerate(seconds)]
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = torch.full((len(waves), 1, int(lengths.max())), 0.7)
    for row, wave in zip(batch, waves, strict=True):
        row[0, : len(wave)] = torch.from_numpy(wave)
    return batch, lengths


@torch.no_grad()
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", WAVE_KINDS)
def test_wave_models_give_what_transformers_gives(tmp_path, kind: str, normalize: bool) -> None:
    teacher = load(tmp_path, kind, normalize=normalize)
    assert (teacher.frame_rate, teacher.sample_rate, teacher.dimension) == (50.0, 16_000, 16)
    wave, _ = speech(0.9)
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    inputs = extractor(wave[0, 0].numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    model = SPEECH_MODELS[kind]().from_pretrained(tmp_path).eval()
    own = model(inputs, output_hidden_states=True)
    states = [*own.hidden_states[:-1], own.last_hidden_state]
    assert len(states) == 4
    found = teacher(wave)
    assert found.lengths.tolist() == [teacher.num_frames(14_400)] == [44]
    torch.testing.assert_close(found.values, torch.stack(states).mean(0), atol=1e-4, rtol=1e-4)
    for layer in ("0", "2", "3", "last"):
        chosen = load_speech_teacher(str(tmp_path), layer=layer, half=False)(wave)
        expected = states[3 if layer == "last" else int(layer)]
        torch.testing.assert_close(chosen.values, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", SPEECH_MODELS)
def test_a_padded_item_gets_the_features_that_it_gets_alone(tmp_path, kind: str) -> None:
    teacher = load(tmp_path, kind)
    wave, lengths = speech(1.0, 0.31, 0.765)
    together = teacher(wave, lengths)
    assert together.values.shape[:2] == (3, teacher.num_frames(16_000))
    for row, length in enumerate(lengths.tolist()):
        alone = teacher(wave[row : row + 1, :, :length])
        frames = teacher.num_frames(length)
        assert together.lengths[row] == alone.lengths[0] == frames
        values = together.values[row]
        torch.testing.assert_close(values[:frames], alone.values[0], atol=2e-4, rtol=2e-4)
        assert not values[frames:].any()
    # The test can fail: what is not marked as padding changes the features.
    unmarked = teacher(wave).values[1, : together.lengths[1]]
    assert (unmarked - together.values[1, : together.lengths[1]]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("num_mels", [80, 128])
def test_log_mels_are_whispers(num_mels: int) -> None:
    wave, lengths = speech(1.0, 0.96)
    wave[1] *= 0.01
    wave[1, :, lengths[1] :] = 0
    extractor = WhisperFeatureExtractor(feature_size=num_mels)
    found = whisper_log_mel(wave[:, 0], num_mels)
    assert found.shape == (2, num_mels, 100)
    for row, length in enumerate(lengths.tolist()):
        whole = extractor(wave[row, 0, :length].numpy(), sampling_rate=16_000, return_tensors="pt")
        expected = whole.input_features[0, :, :100]
        torch.testing.assert_close(found[row], expected, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_whisper_gives_what_transformers_gives_for_30_seconds(tmp_path) -> None:
    teacher = load(tmp_path, "whisper")
    own = WhisperModel.from_pretrained(tmp_path).encoder.eval()
    wave, _ = speech(30.0)
    mel = whisper_log_mel(wave[:, 0], 80)
    output = own(mel, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    found = teacher(wave)
    assert found.values.shape == (1, 1500, 16)
    expected = torch.stack(output.hidden_states).mean(0)
    torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=1e-4)
    for layer in ("0", "1", "3", "last"):
        chosen = load_speech_teacher(str(tmp_path), layer=layer, half=False)(wave).values
        state = output.hidden_states[3 if layer == "last" else int(layer)]
        torch.testing.assert_close(chosen, state, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hubert", "whisper"])
def test_long_recordings_are_seen_in_equal_windows(tmp_path, kind: str) -> None:
    teacher = load(tmp_path, kind, normalize=False)
    teacher.window_frames = 20
    wave, lengths = speech(1.03, 0.3)
    found = teacher(wave, lengths)
    frames = [teacher.num_frames(count) for count in lengths.tolist()]
    assert found.lengths.tolist() == frames
    assert frames[0] in (51, 52)
    # 51 or 52 frames are 17 or 18 in each of three windows.
    size = -(-frames[0] // 3)
    end = (2 * size - 1) * 320 + teacher.receptive_field
    second = teacher(wave[:1, :, size * 320 : end]).values
    torch.testing.assert_close(found.values[0, size : 2 * size], second[0], atol=2e-4, rtol=2e-4)
    alone = teacher(wave[1:, :, : lengths[1]]).values
    torch.testing.assert_close(found.values[1, : frames[1]], alone[0], atol=2e-4, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", SPEECH_MODELS)
@pytest.mark.parametrize("samples", [0, 1, 120, 399, 401])
def test_what_is_too_short_gives_a_frame(tmp_path, kind: str, samples: int) -> None:
    teacher = load(tmp_path, kind)
    wave, _ = speech(0.2)
    alone = teacher(wave[..., :samples])
    assert alone.lengths.tolist() == [2 if kind == "whisper" and samples > 320 else 1]
    assert alone.values.isfinite().all()
    batch = teacher(wave.expand(2, 1, -1), torch.tensor([samples, 3200]))
    count = int(alone.lengths[0])
    torch.testing.assert_close(batch.values[0, :count], alone.values[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", SPEECH_MODELS)
def test_the_gradient_reaches_the_wave_and_no_weight(tmp_path, kind: str) -> None:
    teacher = load(tmp_path, kind)
    wave, lengths = speech(0.5, 0.3)
    wave.requires_grad_()
    values = teacher(wave, lengths).values
    (values * torch.randn_like(values)).sum().backward()
    assert wave.grad is not None
    assert wave.grad.isfinite().all()
    assert wave.grad[0].abs().gt(0).float().mean() > 0.9
    assert not wave.grad[1, :, lengths[1] :].any()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SPEECH_MODELS)
def test_half_changes_little(tmp_path, kind: str, dtype: torch.dtype, monkeypatch) -> None:
    teacher = load(tmp_path, kind)
    monkeypatch.setattr(teachers, "network_dtype", lambda device, half: dtype if half else None)
    half = load_speech_teacher(str(tmp_path))
    assert half.network.dtype == dtype
    wave, lengths = speech(0.8, 0.5)
    exact, near = teacher(wave, lengths), half(wave, lengths)
    assert near.values.dtype == torch.float32
    assert torch.equal(near.lengths, exact.lengths)
    similar = torch.cosine_similarity(near.values, exact.values, dim=-1)
    assert similar[0].mean() > 0.98


def test_a_teacher_without_its_preprocessors_settings_warns(tmp_path, caplog) -> None:
    folder = save_speech_teacher(tmp_path, "hubert")
    (tmp_path / "preprocessor_config.json").unlink()
    teacher = load_speech_teacher(folder, half=False)
    assert "no preprocessor_config.json" in caplog.text
    wave, _ = speech(0.3)
    with torch.no_grad():
        louder = teacher(wave * 3).values
        torch.testing.assert_close(louder, teacher(wave).values, atol=1e-3, rtol=1e-3)


def test_features_of_a_second_are_as_the_convolutions_count(tmp_path) -> None:
    teacher = load(tmp_path, "hubert")
    own = teacher.network._get_feat_extract_output_lengths
    for samples in np.random.default_rng(0).integers(400, 50_000, 200).tolist():
        assert teacher.num_frames(samples) == own(samples)
