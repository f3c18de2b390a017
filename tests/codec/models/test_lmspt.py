"""LM-SPT's forms: both encoders and decoders, shared, causal, with a Transformer, any strides."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from tiny_lmspt import QUANTIZER, SPECTRAL, made

from codec import Codec, CodecConfig
from codec.config import (
    AuxiliaryConfig,
    ConvConfig,
    LMSPTConfig,
    SpectralConfig,
    TransformerConfig,
    codec_config_from_dict,
)
from codec.models.base import CONTEXT_FRAMES
from codec.models.lmspt import build_quantizer
from codec.modules.quantize import SemanticPath
from recipes.lib.voice_training import finish_voice

TRANSFORMER = TransformerConfig(num_layers=2, num_heads=2, context=6)
CONV = CodecConfig(
    family="lmspt",
    sample_rate=24_000,
    lmspt=LMSPTConfig(
        encoder="conv",
        decoder="conv",
        dimension=16,
        conv=ConvConfig(width=2, semantic_width=3, strides=(3, 4, 5), decoder_width=16),
        auxiliary=AuxiliaryConfig(kind="conv", width=8, strides=(8, 5)),
    ),
    quantizer=QUANTIZER,
)
FIRST = replace(
    CONV,
    sample_rate=16_000,
    spectral=SpectralConfig(
        window=60, hop=30, strides=(2,), encoder_depths=(0, 0), decoder_width=16,
        decoder_depths=(1, 1),
    ),
    lmspt=replace(
        CONV.lmspt, decoder="spectral", transformer=TRANSFORMER, semantic_subtraction=False,
        auxiliary=AuxiliaryConfig(width=8, strides=(2,), depths=(0, 1), window=60, hop=30),
    ),
)  # fmt: skip
FORMS = {
    "conv": CONV,
    "causal": replace(CONV, lmspt=replace(CONV.lmspt, causal=True, transformer=TRANSFORMER)),
    "shared": replace(CONV, lmspt=replace(CONV.lmspt, shared_encoder=True)),
    "spectral": SPECTRAL,
    "first": FIRST,
}


def noise(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_lengths_of_any_input(config: CodecConfig) -> None:
    codec, hop = made(config), config.hop_length
    for samples in (1, hop - 1, hop, 7 * hop + 1):
        wave = noise(1, 1, samples)
        codes = codec.encode(wave).codes
        frames = -(-samples // hop)
        assert codes.shape == (1, 3, frames)
        decoded, changed = codec.decode(codes), wave.clone()
        assert decoded.shape == (1, 1, frames * hop)
        # The latent and the wave depend on the samples of the last frame.
        last = slice((frames - 1) * hop, samples)
        changed[..., last] += 0.5
        with torch.no_grad():
            latents = [codec.encoder(each)[..., -1] for each in (wave, changed)]
        assert not torch.allclose(*latents, atol=1e-5)
        assert decoded[..., last].any()
        resynthesized = codec.resynthesize(codes[:, :1])
        auxiliary = config.lmspt.auxiliary
        assert resynthesized.shape == (1, 1, frames * auxiliary.hop_length)
        assert resynthesized.shape[-1] / auxiliary.sample_rate == frames / codec.frame_rate


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_padded_batch_equals_single_items(config: CodecConfig) -> None:
    codec, hop = made(config), config.hop_length
    wave = noise(3, 1, 30 * hop + 7)
    lengths = torch.tensor([30 * hop + 7, 17 * hop - 3, 5])
    with torch.no_grad():
        latent = codec.encoder(wave, lengths)
        for item, length in enumerate(lengths.tolist()):
            alone = codec.encoder(wave[item : item + 1, :, :length])
            frames = alone.shape[-1]
            found = latent[item : item + 1, :, :frames]
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
            for network in (codec.decoder, codec.auxiliary):
                value = noise(3, config.dimension, 31)
                full = network(value, -(-lengths // hop))
                single = network(value[item : item + 1, :, :frames])
                found = full[item : item + 1, :, : single.shape[-1]]
                torch.testing.assert_close(found, single, atol=1e-5, rtol=1e-4)


def test_a_causal_codec_has_no_lookahead() -> None:
    codec = made(FORMS["causal"])
    hop = codec.hop_length
    wave = noise(1, 1, 20 * hop)
    changed = wave.clone()
    changed[..., 12 * hop :] = 0.3
    with torch.no_grad():
        latents = [codec.encoder(each) for each in (wave, changed)]
        torch.testing.assert_close(latents[0][..., :12], latents[1][..., :12])
        assert not torch.allclose(latents[0][..., 12], latents[1][..., 12])
        value = noise(1, 16, 20)
        cut = value.clone()
        cut[..., 12:] = 0
        waves = [codec.decoder(each) for each in (value, cut)]
        torch.testing.assert_close(waves[0][..., : 12 * hop], waves[1][..., : 12 * hop])
        assert not torch.allclose(waves[0][..., 12 * hop :], waves[1][..., 12 * hop :])


def test_attention_is_limited_to_the_context() -> None:
    """What chunked coding relies on: two layers of 6 frames reach 12."""
    torch.manual_seed(0)
    bottleneck = made(FIRST).encoder.semantic.bottleneck
    x = noise(1, 16, 60)
    changed = x.clone()
    changed[..., 40:] = 1.0
    with torch.no_grad():
        before, after = bottleneck(x), bottleneck(changed)
        torch.testing.assert_close(before[..., :28], after[..., :28])
        assert not torch.allclose(before[..., 28:40], after[..., 28:40], atol=1e-6)
        # Positions are relative: the same frames later in time come out the same.
        late = bottleneck(torch.cat([torch.zeros(1, 16, 30), x], dim=-1))
        torch.testing.assert_close(late[..., 42:], before[..., 12:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["conv", "spectral", "first"])
def test_chunks_of_a_long_recording_join(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect 9: nothing changes, except for a Transformer with its larger receptive field."""
    codec = made(FORMS[name])
    wave = noise(1, 1, 200 * codec.hop_length)
    full = codec.encode(wave).codes
    resynthesized, decoded = codec.resynthesize(full), codec.decode(full)
    monkeypatch.setattr(type(codec), "_chunk_frames", property(lambda self: (60, CONTEXT_FRAMES)))
    same = (codec.encode(wave).codes == full).float().mean()
    assert same > 0.99 if name == "first" else same == 1
    torch.testing.assert_close(codec.resynthesize(full), resynthesized, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(codec.decode(full), decoded, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("flags", "dimension", "path"),
    [
        ({"semantic_subtraction": False}, 0, SemanticPath.PARALLEL),
        ({"semantic_subtraction": False, "shared_encoder": True}, 4, SemanticPath.PARALLEL),
        ({}, 4, SemanticPath.RESIDUAL),
        ({"shared_encoder": True}, 4, SemanticPath.RESIDUAL),
        ({}, 0, SemanticPath.DETACHED_RESIDUAL),
        ({"shared_encoder": True}, 0, SemanticPath.DETACHED),
    ],
)
def test_the_keys_of_config_json_determine_the_semantic_path(flags, dimension, path) -> None:
    quantizer = replace(QUANTIZER, codebook_dimension=dimension)
    config = replace(CONV, lmspt=replace(CONV.lmspt, **flags), quantizer=quantizer)
    data = json.loads(json.dumps(asdict(config)))  # As in a saved codec's config.json.
    assert build_quantizer(codec_config_from_dict(data)).path is path


def test_a_shared_encoder_is_one() -> None:
    codec = made(FORMS["shared"])
    semantic, acoustic = codec.encoder(noise(1, 1, 600)).chunk(2, dim=1)
    assert torch.equal(semantic, acoustic)
    assert not any(name.startswith("encoder.acoustic") for name in codec.state_dict())


def test_a_shipped_codec_has_no_auxiliary_decoder_and_the_same_digest(tmp_path) -> None:
    codec = made(SPECTRAL)
    codec.save_pretrained(tmp_path / "trained")
    finish_voice(tmp_path, str(tmp_path / "trained"), "A card.", {})
    shipped = Codec.from_pretrained(str(tmp_path / "codec"))
    assert shipped.config.lmspt.auxiliary.kind == "none"
    assert shipped.stamp.digest == codec.stamp.digest
    codes = codec.encode(noise(1, 1, 4000)).codes
    assert torch.equal(shipped.decode(codes), codec.decode(codes))
    with pytest.raises(ValueError, match="no auxiliary decoder"):
        shipped.resynthesize(codes)
    with torch.no_grad():
        next(codec.decoder.parameters()).add_(1)
    assert shipped.stamp.digest != codec.stamp.digest


@pytest.mark.parametrize("name", ["conv", "spectral"])
def test_a_saved_lmspt_codec_is_loaded_unchanged(name: str, tmp_path) -> None:
    codec = made(FORMS[name])
    codec.save_pretrained(tmp_path / "codec")
    again = Codec.from_pretrained(str(tmp_path / "codec"))
    assert again.config == FORMS[name]
    assert again.stamp.digest == codec.stamp.digest
    wave = noise(1, 1, 4000)
    folded = Codec.from_pretrained(str(tmp_path / "codec")).fold_weight_norm()
    assert torch.equal(folded.encode(wave).codes, codec.encode(wave).codes)
    assert folded.stamp.digest == codec.stamp.digest


def test_codes_of_a_smaller_codebook_are_checked_by_its_size() -> None:
    codec = made(CONV)
    codes = torch.full((1, 3, 4), 15)
    codec.decode(codes)
    codes[:, 0] = 63
    codec.decode(codes)
    codes[:, 2] = 16
    with pytest.raises(ValueError, match=r"0\.\.15"):
        codec.decode(codes)
