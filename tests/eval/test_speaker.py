import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from tiny_teachers import SPEECH_SIZES, save_speech_teacher, save_text_teacher

from eval import speaker
from eval.speaker import (
    LIBRARIES,
    SpeakerEncoder,
    load_speaker_encoder,
    similarity,
    speaker_libraries,
)

RATE = 16000


@pytest.fixture(scope="module")
def encoder() -> SpeakerEncoder:
    torch.manual_seed(0)
    return SpeakerEncoder(hidden_size=16, num_layers=1, embedding_size=8).eval()


def tone(seconds: float, pitch: float = 150.0, rate: int = RATE) -> np.ndarray:
    times = np.arange(round(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * pitch * k * times) / k for k in range(1, 10))
    return (0.1 * wave).astype(np.float32)


def test_embedding_is_a_unit_vector_and_deterministic(encoder: SpeakerEncoder) -> None:
    first, second = encoder.embed(tone(2.0), RATE), encoder.embed(tone(2.0), RATE)
    assert first.shape == (8,)
    assert np.linalg.norm(first) == pytest.approx(1.0, abs=1e-5)
    assert similarity(first, second) == pytest.approx(1.0, abs=1e-6)
    assert similarity(first, encoder.embed(tone(2.0, 300.0), RATE)) < 0.9999


def test_features_are_a_power_mel_without_logarithm(encoder: SpeakerEncoder) -> None:
    wave = torch.from_numpy(tone(1.0))
    mel = encoder.mel(wave)
    assert mel.shape == (101, 40)
    torch.testing.assert_close(encoder.mel(2 * wave), 4 * mel)
    # Slaney bands: a tone of 1 kHz is loudest where 1 kHz lies on that scale, 15 of 45.2 mels.
    steady = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    assert int(encoder.mel(torch.from_numpy(steady))[50].argmax()) == round(15 / 45.245 * 41) - 1


def test_only_quiet_recordings_are_amplified(encoder: SpeakerEncoder) -> None:
    quiet, loud = tone(2.0) * 1e-2, tone(2.0) * 3
    assert similarity(encoder.embed(quiet, RATE), encoder.embed(quiet * 0.1, RATE)) > 0.999999
    heard: list[torch.Tensor] = []
    handle = encoder.lstm.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    encoder.embed(loud, RATE)
    encoder.embed(loud / 2, RATE)
    handle.remove()
    torch.testing.assert_close(heard[0], 4 * heard[1])


@pytest.mark.parametrize(
    ("seconds", "starts"),
    [(0.5, [0]), (1.6, [0]), (2.0, [0]), (2.37, [0, 77]), (4.0, [0, 77, 154, 231])],
)
def test_windows_of_one_and_a_half_seconds(
    encoder: SpeakerEncoder, seconds: float, starts: list[int]
) -> None:
    found = encoder.partial_starts(round(seconds * RATE))
    assert found[: len(starts)] == starts or found == starts[: len(found)]
    last = found[-1] * 160
    assert len(found) == 1 or (seconds * RATE - last) / (160 * 160) >= 0.75


def test_embeddings_agree_between_sample_rates(encoder: SpeakerEncoder) -> None:
    at_48 = encoder.embed(tone(2.0, rate=48000), 48000)
    assert similarity(encoder.embed(tone(2.0), RATE), at_48) > 0.999


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros(RATE, np.float32), "silent"),
        (tone(0.2), r"0\.4 s"),
        (np.full(RATE, np.nan, np.float32), "NaN"),
    ],
)
def test_invalid_recordings_are_refused(
    encoder: SpeakerEncoder, wave: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encoder.embed(wave, RATE)


def test_folder_round_trip_and_invalid_folders(encoder: SpeakerEncoder, tmp_path: Path) -> None:
    config = {"hidden_size": 16, "num_layers": 1, "embedding_size": 8}
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        SpeakerEncoder.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(encoder.state_dict(), tmp_path / "model.safetensors")
    loaded = SpeakerEncoder.from_folder(tmp_path)
    assert np.array_equal(loaded.embed(tone(1.0), RATE), encoder.embed(tone(1.0), RATE))
    tensors = encoder.state_dict()
    del tensors["linear.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no valid speaker encoder.*linear\.bias"):
        SpeakerEncoder.from_folder(tmp_path)


# Filter banks (B,T,80) to the mean of their squares (B,80). Made once with onnx 1.23: a Mul of the
# input "feats" with itself and a ReduceMean over axis 1, opset 13.
ONNX = ROOT / "tests" / "golden" / "mean_power.onnx"


@pytest.fixture(scope="module")
def xvectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    folder = tmp_path_factory.mktemp("xvectors") / "wavlm-sv"
    torch.manual_seed(0)
    model = WavLMForXVector(
        WavLMConfig(**SPEECH_SIZES, tdnn_dim=(8,) * 5, xvector_output_dim=6, num_labels=3)
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "position" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("default")
def test_x_vectors_of_transformers(xvectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_speaker_encoder(xvectors)
    assert re.fullmatch("wavlm-sv@[0-9a-f]{16} transformers", encoder.name)
    first, other = encoder.embed(tone(1.0), RATE), encoder.embed(tone(1.0, 300.0), RATE)
    assert first.shape == (6,)
    assert np.linalg.norm(first) == pytest.approx(1.0, abs=1e-5)
    assert similarity(first, encoder.embed(tone(1.0) * 0.5, RATE)) > 0.9999  # As it was trained.
    assert similarity(first, other) < 0.999
    monkeypatch.setattr(speaker, "PIECE_SECONDS", 1.0)
    both = encoder.embed(np.concatenate([tone(1.0), tone(1.0, 300.0)]), RATE)
    assert similarity(both, first + other) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.filterwarnings("default")
def test_onnx_files_of_wespeaker(tmp_path: Path) -> None:
    encoder = load_speaker_encoder(ONNX)
    assert (
        encoder.name == "mean_power@" + hashlib.sha256(ONNX.read_bytes()).hexdigest()[:16] + " onnx"
    )
    wave = np.random.default_rng(0).normal(0, 0.05, RATE).astype(np.float32)
    wave[::2] += tone(0.5)
    features = encoder.features(wave)
    assert features.shape == (98, 80)  # 25 ms windows every 10 ms.
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(encoder.features(wave * 0.5), features, atol=1e-3)  # A logarithm.
    vector = encoder.embed(wave, RATE)
    expected = np.square(features).mean(0)
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), rtol=1e-4)
    shutil.copy(ONNX, tmp_path / "model.onnx")
    np.testing.assert_array_equal(load_speaker_encoder(tmp_path).embed(wave, RATE), vector)
    shutil.copy(ONNX, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="holds 2 ONNX files; name one"):
        load_speaker_encoder(tmp_path)
    (tmp_path / "broken.onnx").write_bytes(b"nothing of a model")
    with pytest.raises(ValueError, match="cannot be loaded as a speaker encoder"):
        load_speaker_encoder(tmp_path / "broken.onnx")


@pytest.mark.filterwarnings("default")
def test_kinds_of_encoders(
    encoder: SpeakerEncoder, xvectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ge2e"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"hidden_size": 16, "num_layers": 1, "embedding_size": 8})
    )
    save_file(encoder.state_dict(), folder / "model.safetensors")
    kinds = [load_speaker_encoder(one) for one in (folder, xvectors, ONNX)]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    assert kinds[0].name == f"ge2e@{digest}"  # As in earlier rows.
    assert speaker_libraries(kinds[0].name) == LIBRARIES
    assert len({speaker_libraries(one.name) for one in kinds}) == 3
    for one in kinds[1:]:
        with pytest.raises(ValueError, match="silent"):
            one.embed(np.zeros(RATE, np.float32), RATE)
        with pytest.raises(ValueError, match=r"0\.4 s"):
            one.embed(tone(0.2), RATE)
        assert one.embed(tone(0.41), RATE).shape == one.embed(tone(1.0, rate=48000), 48000).shape
    with pytest.raises(ValueError, match=r"a bert model is no speaker encoder; .*wavlm"):
        load_speaker_encoder(save_text_teacher(tmp_path / "bert"))
    headless = load_speaker_encoder(save_speech_teacher(tmp_path / "wavlm", "wavlm"))
    with pytest.raises(ValueError, match="it has no x-vector head"):
        headless.embed(tone(1.0), RATE)
    with pytest.raises(ValueError, match="no such folder; `make models`"):
        load_speaker_encoder(tmp_path / "none")
    monkeypatch.setattr(speaker, "NUM_FILTER_BANKS", 40)
    with pytest.raises(ValueError, match=r"feats has the shape \['B', 'T', 80\], not \(1, T, 40\)"):
        load_speaker_encoder(ONNX)
