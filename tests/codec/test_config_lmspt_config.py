"""LM-SPT's configuration: what cannot work is refused by the name of its key."""

from dataclasses import asdict, replace

import pytest

from codec.config import (
    AuxiliaryConfig,
    CodecConfig,
    ConvConfig,
    LMSPTConfig,
    QuantizerConfig,
    TransformerConfig,
    codec_config_from_dict,
)

CONV = LMSPTConfig(encoder="conv", decoder="conv")


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
        (CodecConfig, {"sample_rate": 24_000}, "lmspt.auxiliary: 640 samples"),
    ],
)
def test_what_cannot_work_is_named(config, values, words) -> None:
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
def test_codebooks_that_cannot_work_are_named(values, words) -> None:
    with pytest.raises(ValueError, match=words):
        QuantizerConfig(num_codebooks=3, **values)


def test_it_survives_json() -> None:
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
