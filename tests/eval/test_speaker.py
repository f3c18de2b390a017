import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eval.speaker import SpeakerEncoder, similarity

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
