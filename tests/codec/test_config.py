"""Codec configurations: invalid values are reported with the name of their key."""

from dataclasses import asdict, replace

import pytest

from codec.config import (
    AuxiliaryConfig,
    CodecConfig,
    ConvConfig,
    LMSPTConfig,
    QuantizerConfig,
    SEANetConfig,
    SpectralConfig,
    TransformerConfig,
    codec_config_from_dict,
)
from codec.training.config import CodecOptimConfig, CropConfig

CONV = LMSPTConfig(encoder="conv", decoder="conv")


@pytest.mark.parametrize(
    ("config", "values", "words"),
    [
        (CodecOptimConfig, {"steps": 0}, "optim.steps"),
        (CodecOptimConfig, {"accumulate": 0}, "optim.accumulate"),
        (CodecOptimConfig, {"clip_norm": -1.0}, "optim.clip_norm"),
        (CodecOptimConfig, {"warmup_steps": -5}, "optim.warmup_steps"),
        (CodecOptimConfig, {"lr": -1e-3}, "optim.lr"),
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
def test_invalid_values_are_named(config, values, words) -> None:
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


@pytest.mark.parametrize(
    ("config", "values", "words"),
    [
        (ConvConfig, {"strides": ()}, "lmspt.conv.strides"),
        (ConvConfig, {"strides": (4, 0)}, "lmspt.conv.strides must be at least 1"),
        (LMSPTConfig, {"conv": ConvConfig(strides=(4, 1))}, "conv.strides must be at least 2"),
        (
            LMSPTConfig,
            {"conv": ConvConfig(decoder_strides=(1, 4))},
            "lmspt.conv.decoder_strides must be at least 2",
        ),
        (ConvConfig, {"kernel_size": 4}, "lmspt.conv.kernel_size must be odd"),
        (ConvConfig, {"decoder_width": 16}, "lmspt.conv.decoder_width must be at least 32"),
        (AuxiliaryConfig, {"depths": (1,)}, "lmspt.auxiliary.depths needs 3"),
        (AuxiliaryConfig, {"causal": True}, "lmspt.auxiliary.causal"),
        (AuxiliaryConfig, {"kind": "conv", "width": 2}, "lmspt.auxiliary.width"),
        (AuxiliaryConfig, {"kind": "conv", "strides": (4, 1)}, "auxiliary.strides must be at"),
        (AuxiliaryConfig, {"strides": (), "depths": (1,)}, "lmspt.auxiliary.strides"),
        (AuxiliaryConfig, {"depths": (1, -1, 1)}, "lmspt.auxiliary.depths must be at least 0"),
        (AuxiliaryConfig, {"window": 240}, "lmspt.auxiliary.window must be at least twice"),
        (AuxiliaryConfig, {"window": 641}, "lmspt.auxiliary.window"),
        (AuxiliaryConfig, {"hop": 0}, "lmspt.auxiliary.hop"),
        (LMSPTConfig, {"causal": True}, "lmspt.causal"),
        (LMSPTConfig, {"transformer": TransformerConfig(num_layers=1, num_heads=7)}, "num_heads"),
        (CodecConfig, {"quantizer": QuantizerConfig(num_codebooks=1)}, "num_codebooks"),
        (CodecConfig, {"lmspt": LMSPTConfig(encoder="conv")}, "strides must agree"),
        (CodecConfig, {"sample_rate": 24_000}, "640 samples at 16000 Hz"),
    ],
)
def test_invalid_lmspt_values_are_named(config, values, words) -> None:
    family = {"family": "lmspt"} if config is CodecConfig else {}
    with pytest.raises(ValueError, match=words):
        config(**family, **values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"codebook_sizes": (8, 8)}, "codebook_sizes needs one number for each of the 3"),
        ({"codebook_dimensions": (8,)}, "codebook_dimensions needs one number"),
        ({"codebook_dimensions": (8, 8, 0)}, "codebook_dimensions must be at least 1"),
        ({"codebook_sizes": (8, 8, 1)}, "between 2 and 65536"),
    ],
)
def test_invalid_codebooks_are_named(values, words) -> None:
    with pytest.raises(ValueError, match=words):
        QuantizerConfig(num_codebooks=3, **values)


def test_an_lmspt_configuration_survives_json() -> None:
    auxiliary = AuxiliaryConfig(kind="conv", width=128, strides=(8, 8, 5, 4))
    config = CodecConfig(
        family="lmspt",
        sample_rate=24_000,
        lmspt=replace(CONV, auxiliary=auxiliary),
        quantizer=QuantizerConfig(codebook_sizes=(16_384,) + (4096,) * 7, learning="gradient"),
    )
    data = asdict(config)
    data["lmspt"]["conv"]["strides"] = list(config.lmspt.conv.strides)
    data["quantizer"]["codebook_sizes"] = list(config.quantizer.codebook_sizes)
    assert codec_config_from_dict(data) == config
    assert config.hop_length == 1920
    assert config.lmspt.conv.upsampling == (2, 8, 6, 5, 4)
