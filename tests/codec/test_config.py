"""Codec configurations: what cannot work is refused by the name of its key."""

from dataclasses import asdict

import pytest

from codec.config import (
    CodecConfig,
    QuantizerConfig,
    SEANetConfig,
    SpectralConfig,
    codec_config_from_dict,
)
from codec.training.config import CropConfig, OptimConfig


@pytest.mark.parametrize(
    ("config", "values", "words"),
    [
        (OptimConfig, {"steps": 0}, "optim.steps"),
        (OptimConfig, {"accumulate": 0}, "optim.accumulate"),
        (OptimConfig, {"clip_norm": -1.0}, "optim.clip_norm"),
        (OptimConfig, {"warmup_steps": -5}, "optim.warmup_steps"),
        (OptimConfig, {"lr": -1e-3}, "optim.lr"),
        (CropConfig, {"seconds": 0.03}, "data.seconds"),
        (CropConfig, {"batch_size": 0}, "data.batch_size"),
        (SpectralConfig, {"kernel_size": 4}, "spectral.kernel_size must be odd"),
        (SpectralConfig, {"hop": 0}, "spectral.hop"),
        (SpectralConfig, {"strides": (0, 2)}, "spectral.strides"),
        (SpectralConfig, {"encoder_depths": (1,)}, "spectral.encoder_depths needs 3"),
        (SpectralConfig, {"window": 200}, "spectral.window"),
        (SEANetConfig, {"strides": ()}, "seanet.strides"),
        (SEANetConfig, {"num_filters": 0}, "seanet.num_filters"),
        (SEANetConfig, {"num_lstm_layers": -1}, "seanet.num_lstm_layers"),
        (QuantizerConfig, {"codebook_size": 1}, "codebook_size"),
        (QuantizerConfig, {"codebook_size": 65_537}, "65536"),
        (QuantizerConfig, {"dropout": 1.5}, "quantizer.dropout"),
        (QuantizerConfig, {"revival_ratio": -0.1}, "quantizer.revival_ratio must be at least 0"),
        (QuantizerConfig, {"kmeans_samples": 0}, "quantizer.kmeans_samples must be at least 1"),
        (CodecConfig, {"sample_rate": 0}, "sample_rate"),
    ],
)
def test_what_cannot_work_is_named(config, values, words) -> None:
    with pytest.raises(ValueError, match=words):
        config(**values)


def test_a_configuration_survives_json() -> None:
    config = CodecConfig(family="seanet", seanet=SEANetConfig(strides=(4, 2), activation="snake"))
    data = asdict(config)
    data["seanet"]["strides"] = [4, 2]
    assert codec_config_from_dict(data) == config
    assert config.hop_length == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spectral": {"num_mels": "20"}}, "config.spectral.num_mels: '20'"),
        ({"quantizer": {"codebook_size": 32.0}}, "config.quantizer.codebook_size: 32.0"),
        ({"quantizer": {"codebook_size": True}}, "config.quantizer.codebook_size: True"),
        ({"spectral": {"strides": [2, "2"]}}, "config.spectral.strides"),
        ({"seanet": {"activation": "ELU"}}, "config.seanet.activation: 'ELU'"),
        ({"family": "organ"}, "config.family: 'organ'"),
        ({"spectral": 5}, "config.spectral: 5"),
        ({"spectral": {"colour": 1}}, "unknown key 'colour'"),
    ],
)
def test_ill_typed_json_is_named(change, words) -> None:
    with pytest.raises(ValueError, match=words):
        codec_config_from_dict(change)
