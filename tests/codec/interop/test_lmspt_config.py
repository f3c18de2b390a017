"""The released LM-SPT's configuration, and ours for it."""

from dataclasses import replace
from typing import Any

import pytest
from original_lmspt import OTHERS, TINY, other, state_of

from codec.config import AuxiliaryConfig, CodecConfig, ConvConfig, LMSPTConfig, QuantizerConfig
from codec.interop.checkpoint import Original
from codec.interop.lmspt import DEFAULTS, config_from_lmspt, config_to_lmspt, from_lmspt

AUXILIARY: dict[str, Any] = TINY["aux_decoder"]


def test_the_originals_defaults() -> None:
    """Of a configuration that says nothing at all."""
    expected = CodecConfig(
        family="lmspt",
        sample_rate=44_100,
        lmspt=LMSPTConfig(
            encoder="conv",
            decoder="conv",
            dimension=1024,
            conv=ConvConfig(
                width=64, strides=(2, 4, 8, 8), decoder_width=1536, decoder_strides=(8, 8, 4, 2)
            ),
            auxiliary=AuxiliaryConfig(
                kind="conv", sample_rate=44_100, width=1536, strides=(8, 8, 4, 2)
            ),
        ),
        quantizer=QuantizerConfig(
            num_codebooks=8,
            codebook_sizes=(2048,) * 8,
            codebook_dimensions=(8,) * 8,
            normalize=True,
            learning="gradient",
            kmeans_iterations=0,
            revival_ratio=0.0,
            dropout=1.0,
        ),
    )
    assert config_from_lmspt({}) == expected
    assert config_from_lmspt(DEFAULTS) == expected
    assert config_from_lmspt(dict.fromkeys(DEFAULTS)) == expected


@pytest.mark.parametrize("name", OTHERS)
def test_round_trip_of_configurations(name: str) -> None:
    ours = config_from_lmspt(other(name))
    theirs = config_to_lmspt(ours)
    assert config_from_lmspt(theirs) == ours
    assert theirs.keys() <= DEFAULTS.keys()


def test_defaults_that_depend_on_other_keys() -> None:
    ours = config_from_lmspt(other("lists"))
    assert ours.quantizer.sizes == (32, 16, 8)
    assert ours.quantizer.dimensions == (3, 4, 2)
    ours = config_from_lmspt(TINY | {"codebook_dim": [5, 6, 7]})
    assert ours.quantizer.dimensions == (5, 5, 6)
    ours = config_from_lmspt(TINY | {"semantic_codebook_size": 64})
    assert ours.quantizer.sizes == (64, 16, 16)
    conv = config_from_lmspt(TINY | {"acoustic_encoder_dim": 5}).lmspt.conv
    assert (conv.semantic_width, conv.width) == (2, 5)
    conv = config_from_lmspt(other("shared")).lmspt.conv
    assert (conv.semantic_width, conv.width) == (0, 3)
    assert config_from_lmspt(other("strides")).lmspt.dimension == 16
    # The decoder that the original makes itself has the model's causality, and the usual units.
    auxiliary = config_from_lmspt(
        other("causal, aux too") | {"dilation": [1, 1, 1]}
    ).lmspt.auxiliary
    assert auxiliary == AuxiliaryConfig(
        kind="conv", sample_rate=8000, width=12, strides=(3, 2), causal=True
    )
    assert not config_from_lmspt(other("causal")).lmspt.auxiliary.causal


def test_keys_of_hydra_are_ignored() -> None:
    auxiliary = AUXILIARY | {"_target_": "lmspt.model_codec.dac_model.Decoder"}
    model = TINY | {"_target_": "lmspt.model_codec.lmspt_model.LMSPT", "aux_decoder": auxiliary}
    model |= {"_partial_": False, "_convert_": "all", "_recursive_": True}
    assert config_from_lmspt(model) == config_from_lmspt(TINY)
    whole = {"SAMPLE_RATE": 8000, "model": model, "discriminator": {"sample_rate": 8000}}
    assert config_from_lmspt(whole) == config_from_lmspt(TINY)
    trained = {"SAMPLE_RATE": 8000, "model": {"model": model, "discriminator": {"rates": "${x}"}}}
    assert config_from_lmspt(trained) == config_from_lmspt(TINY)
    around: dict[str, Any] = {}
    around["model"] = around
    with pytest.raises(ValueError, match="unknown key model"):
        config_from_lmspt(around)


def test_numbers_as_the_original_takes_them() -> None:
    loose = {
        "encoder_rates": (2.0, 3),
        "n_codebooks": 3.0,
        "is_causal": 0,
        "dilation": [1, 3, 9, 27],
    }
    loose |= {"output_sample_rate": 8000, "semantic_quantizer_kwargs": {"levels": [8, 5]}}
    loose |= {"quantizer_dropout": 0, "semantic_quantizer": "vq"}
    ours = config_from_lmspt(TINY | loose)
    expected = config_from_lmspt(TINY)
    assert ours == replace(expected, quantizer=replace(expected.quantizer, dropout=0.0))
    assert type(ours.quantizer.num_codebooks) is int
    assert type(ours.lmspt.causal) is bool


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"output_sample_rate": 16_000},
            "output_sample_rate is 16000, sample_rate 8000: our",
        ),
        (
            {"semantic_quantizer": "fsq"},
            "semantic_quantizer is 'fsq', which has no learned",
        ),
        ({"n_semantic_codebooks": 2}, "n_semantic_codebooks is 2; only 1 is supported"),
        ({"n_codebook": 8}, r"unknown key n_codebook; is n_codebooks meant\?"),
        ({4: 8}, "unknown key 4 of the released LM-SPT's model"),
        ({"n_codebooks": 1}, "n_codebooks must be an integer from 2 to"),
        ({"n_codebooks": 2**30}, "n_codebooks must be an integer from 2 to"),
        ({"encoder_rates": 6}, "encoder_rates must be a list"),
        ({"encoder_rates": []}, "encoder_rates must be a list"),
        ({"encoder_rates": [6, 1]}, "encoder_rates must be an integer from 2 to .*, got 1"),
        ({"encoder_rates": [2, 4]}, "8 samples per frame, the decoder 6"),
        ({"decoder_rates": [2, 2.5]}, "decoder_rates must be an integer"),
        ({"dilation": [1, 3]}, "dilation needs 3 numbers"),
        ({"residual_kernel_size": 4}, "residual_kernel_size must be odd"),
        ({"codebook_size": 1}, "codebook_size must be an integer from 2 to 65536, got 1"),
        ({"acoustic_codebook_size": [16]}, r"acoustic_codebook_size needs 2 numbers, got \[16\]"),
        ({"acoustic_codebook_dim": [4, 0]}, "acoustic_codebook_dim must be an integer from 1 to"),
        ({"quantizer_dropout": 1.5}, r"quantizer_dropout must lie in \[0, 1\], got 1.5"),
        ({"quantizer_dropout": "0.5"}, "quantizer_dropout must lie in"),
        ({"quantizer_dropout": True}, "quantizer_dropout must lie in"),
        ({"semantic_encoder_dim": 0}, "semantic_encoder_dim must be an integer from 1 to"),
        ({"acoustic_encoder_dim": 0}, "acoustic_encoder_dim must be an integer from 1 to"),
        ({"is_causal": "yes"}, "is_causal must be true or false, got 'yes'"),
        (
            {"sample_rate": "${a}", "decoder_rates": "${b}", "dilation": [1, "${c}", 9]},
            r"^sample_rate, decoder_rates, dilation: refer to other .*infer/conf/model/, which",
        ),
        ({"latent_dim": True}, "latent_dim must be an integer"),
        ({"encoder_dim": 2**31}, "encoder_dim must be an integer"),
        ({"encoder_dim": 2**30, "latent_dim": None}, "latent_dim must be an integer"),
        ({"encoder_rates": [2] * 99, "latent_dim": None}, "latent_dim must be an integer"),
        ({"model": [1]}, "model must have keys and values"),
        ({"aux_decoder": "Decoder"}, "aux_decoder must have keys and values, got 'Decoder'"),
        ({"aux_decoder": {}}, "lacks aux_decoder.input_channel, aux_decoder.channels, aux_dec"),
        ({"aux_decoder": AUXILIARY | {"rate": 1}}, r"rate; is aux_decoder\.rates meant"),
        (
            {"aux_decoder": AUXILIARY | {"d_out": 2}},
            "aux_decoder.d_out is 2: our codecs",
        ),
        ({"aux_decoder": AUXILIARY | {"input_channel": 9}}, "input_channel is 9, latent_dim is 8"),
        ({"aux_decoder": AUXILIARY | {"sample_rate": 8000}}, "3 samples at 8000 Hz"),
        ({"aux_decoder": AUXILIARY | {"rates": ["${x}"]}}, "aux_decoder.rates: refer to"),
    ],
)
def test_bad_configurations_are_named(changed: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_lmspt(TINY | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"latent_dim": 2**31 - 1, "aux_decoder": None}, "of another shape"),
        ({"n_codebooks": 1000}, "n_codebooks asks for 1000, and there"),
        (
            {"encoder_rates": [2] * 99, "decoder_rates": [2] * 99, "decoder_dim": 2**31 - 1},
            "decoder_width must be at least",
        ),
    ],
)
def test_a_configuration_alone_takes_no_memory(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_lmspt(Original(TINY | changed, state_of(TINY)))


def test_options_that_the_original_does_not_support() -> None:
    ours = config_from_lmspt(TINY)

    def error_of(**changed: Any) -> str:
        with pytest.raises(ValueError, match="the released LM-SPT does not support ") as caught:
            config_to_lmspt(replace(ours, **changed))
        return str(caught.value).removeprefix("the released LM-SPT does not support ")

    lmspt, quantizer = ours.lmspt, ours.quantizer
    conv = replace(lmspt.conv, dilations=(1, 3))
    assert error_of(lmspt=replace(lmspt, conv=conv)) == "lmspt.conv.dilations other than 3"
    layers = replace(lmspt.transformer, num_layers=1, num_heads=1)
    assert error_of(lmspt=replace(lmspt, transformer=layers)) == "lmspt.transformer"
    none = replace(ours, lmspt=replace(lmspt, auxiliary=replace(lmspt.auxiliary, kind="none")))
    with pytest.raises(ValueError, match="export the folder of the training run, which has it"):
        config_to_lmspt(none)
    assert error_of(quantizer=replace(quantizer, learning="ema")) == "quantizer.learning ema"
    plain = replace(quantizer, normalize=False, codebook_dimensions=())
    assert "quantizer.normalize false, codebooks without projections" in error_of(quantizer=plain)
    assert "lmspt.encoder spectral, lmspt.decoder spectral" in error_of(
        lmspt=LMSPTConfig(), sample_rate=16_000
    )
    whisper = LMSPTConfig(semantic="whisper")
    assert "lmspt.semantic whisper" in error_of(lmspt=whisper, sample_rate=16_000)
    with pytest.raises(ValueError, match="only codecs of the family lmspt can be exported, not"):
        config_to_lmspt(CodecConfig())
