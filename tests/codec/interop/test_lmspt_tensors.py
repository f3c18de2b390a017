"""The released LM-SPT's tensors, and ours for them."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from original_lmspt import OTHERS, RELEASED, TINY, ByNumber, other, same, shapes_of, state_of
from torch import Tensor
from torch.nn import functional

from codec import Codec
from codec.config import codec_config_from_dict
from codec.interop.checkpoint import Original
from codec.interop.lmspt import (
    config_from_lmspt,
    config_to_lmspt,
    from_lmspt,
    lmspt_tensor_names,
    to_lmspt,
)
from codec.modules.quantize import Quantized, SplitVQ

FOLDER = ROOT / "tests" / "golden"
HOP, AUXILIARY_HOP = 1920, 1280


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(FOLDER / "lmspt_tiny.pt", weights_only=True)


@pytest.fixture(scope="module")
def codec(golden: dict[str, Any]) -> Codec:
    return from_lmspt(Original(golden["config"], golden["state_dict"]))


def latents(codec: Codec, wave: Tensor) -> Tensor:
    """Without our padding to full frames: the same number of frames as the original."""
    networks = codec.encoder.semantic.network, codec.encoder.acoustic.network
    return torch.cat([network(wave) for network in networks], dim=1)


def close(ours: Tensor, theirs: Tensor, hop: int = HOP) -> None:
    """The same wave; ours has the samples that odd strides leave out."""
    size = theirs.shape[-1]
    assert ours.shape[-1] == size + 4
    assert ours.shape[-1] % hop == 0
    assert not ours[..., size:].any()
    torch.testing.assert_close(ours[..., :size], theirs, atol=1e-5, rtol=0)


def test_the_released_keys_and_size() -> None:
    with torch.device("meta"):
        codec = Codec(config_from_lmspt(RELEASED))
        outline = to_shapes(codec)
    expected = json.loads((FOLDER / "lmspt_released_state_keys.json").read_text())
    assert len(expected) == 618
    assert outline == {name: tuple(shape) for name, shape in expected.items()}
    assert sum(parameter.numel() for parameter in codec.parameters()) == 74_652_220
    sizes = (codec.num_codebooks, codec.codebook_sizes, codec.frame_rate)
    assert sizes == (8, (16_384, *[4096] * 7), 12.5)


def test_our_configuration_of_the_released_form_is_the_released() -> None:
    file = ROOT / "recipes/configs/codec/lmspt_v2_12.5hz.yaml"
    ours = codec_config_from_dict(yaml.safe_load(file.read_text())["codec"])
    assert config_to_lmspt(ours) == config_to_lmspt(config_from_lmspt(RELEASED))


def to_shapes(codec: Codec) -> dict[str, tuple[int, ...]]:
    ours, sizes = codec.state_dict(), codec.codebook_sizes
    shapes = {theirs: tuple(ours[name].shape) for name, theirs in lmspt_tensor_names(codec).items()}
    shapes["quantizer.semantic_vocab_usage"] = (1, sizes[0])
    return shapes | {"quantizer.acoustic_vocab_usage": (len(sizes) - 1, max(sizes[1:]))}


def test_round_trip_is_bit_exact(golden: dict[str, Any], codec: Codec) -> None:
    assert not codec.training
    assert (codec.sample_rate, codec.hop_length, codec.latent_dimension) == (24_000, HOP, 32)
    back = to_lmspt(codec)
    assert same(back.state, golden["state_dict"])
    again = from_lmspt(back)
    assert again.config == codec.config
    assert same(again.state_dict(), codec.state_dict())
    with torch.no_grad():
        for tensor in again.state_dict().values():
            tensor.zero_()
    assert same(back.state, golden["state_dict"])
    exported = to_lmspt(codec).state
    with torch.no_grad():
        exported["decoder.model.0.bias"].zero_()
        exported["quantizer.acoustic_vocab_usage"].zero_()
    assert same(to_lmspt(codec).state, golden["state_dict"])


@pytest.mark.parametrize("suffix", ["", "_odd_batch2"])
def test_codes_and_waves_are_the_originals(
    golden: dict[str, Any], codec: Codec, suffix: str
) -> None:
    with torch.no_grad():
        latent = latents(codec, golden[f"input{suffix}"])
        codes = codec.quantizer.encode(latent)
    assert torch.equal(codes, golden[f"codes{suffix}"].transpose(0, 1))
    close(codec.decode(codes), golden[f"output{suffix}"])
    close(codec.resynthesize(codes), golden[f"aux_output{suffix}"], AUXILIARY_HOP)
    close(codec.resynthesize(codes[:, :1]), golden[f"aux_output{suffix}"], AUXILIARY_HOP)
    if not suffix:
        theirs = torch.cat([golden["latent_semantic"], golden["latent_acoustic"]], dim=1)
        torch.testing.assert_close(latent, theirs, atol=1e-5, rtol=0)
        quantized = codec.quantizer.decode(codes)
        torch.testing.assert_close(quantized, golden["quantized"], atol=1e-5, rtol=0)
        semantic = codec.quantizer.decode(codes[:, :1])
        torch.testing.assert_close(semantic, golden["quantized_semantic"], atol=1e-5, rtol=0)


def test_decoding_of_some_codebooks(golden: dict[str, Any], codec: Codec) -> None:
    codes = golden["codes"].transpose(0, 1)
    close(codec.decode(codes[:, :1]), golden["output_semantic_only_main"])
    close(codec.decode(codes[:, :3]), golden["output_first3_streams"])
    close(codec.decode(codes[:, 1:], first_codebook=1), golden["output_acoustic_only"])


def test_no_sample_is_lost(golden: dict[str, Any], codec: Codec) -> None:
    """The original drops an incomplete last frame; the receptive field is 26 frames."""
    wave = torch.cat([golden["input"].repeat(1, 1, 4), golden["input"][..., :777]], dim=-1)
    codes = codec.encode(wave).codes
    assert codes.shape[-1] == -(-wave.shape[-1] // HOP) == 51
    decoded, changed = codec.decode(codes), wave.clone()
    assert decoded.shape[-1] >= wave.shape[-1]
    assert decoded[..., 50 * HOP : wave.shape[-1]].count_nonzero() > 700
    changed[..., 50 * HOP :] += 0.1
    with torch.no_grad():
        last = [codec.encoder(each)[..., 50] for each in (wave, changed)]
        assert not torch.allclose(*last, atol=1e-5)
        theirs = codec.quantizer.encode(latents(codec, wave))
    assert theirs.shape[-1] == 50
    assert torch.equal(codes[..., : 51 - 26], theirs[..., : 51 - 26])
    assert not torch.equal(codes[..., :50], theirs)


def padded(wave: Tensor, size: int) -> Tensor:
    return functional.pad(wave, (0, size - wave.shape[-1]))[..., :size]


def test_forward_is_the_originals(golden: dict[str, Any], codec: Codec) -> None:
    theirs, wave = golden["forward_odd_batch2"], golden["input_odd_batch2"]
    with torch.no_grad():
        quantized: Quantized = codec.quantizer(latents(codec, wave))
        x = padded(codec.decoder(quantized.latent), wave.shape[-1])
        x_semantic = padded(codec.auxiliary(quantized.part("first")), wave.shape[-1] * 2 // 3)
    assert torch.equal(quantized.codes, theirs["codes_BKT"])
    torch.testing.assert_close(x, theirs["x"], atol=1e-5, rtol=0)
    torch.testing.assert_close(x_semantic, theirs["x_semantic"], atol=1e-5, rtol=0)
    for name, ours in losses_of(quantized).items():
        torch.testing.assert_close(ours, theirs[name], atol=0, rtol=1e-5)


def losses_of(quantized: Quantized) -> dict[str, Tensor]:
    """The original's: sums over codebooks."""
    return {
        "commit_acoustic": quantized.commitments[1:].sum(),
        "codebook_acoustic": quantized.codebook_losses[1:].sum(),
        "commit_semantic": quantized.commitments[0],
        "codebook_semantic": quantized.codebook_losses[0],
    }


@pytest.fixture(scope="module")
def trained(golden: dict[str, Any]) -> tuple[Codec, dict[str, Tensor]]:
    """One training step's terms, with the graph."""
    train = golden["train"]
    codec = from_lmspt(Original(golden["config"], golden["state_dict"])).train()
    assert isinstance(codec.quantizer, SplitVQ)
    kept = train["n_acoustic_kept_per_item"]
    codec.quantizer.acoustic._kept_codebooks = lambda *_: kept
    quantized = codec.quantizer(latents(codec, train["input"]))
    assert torch.equal(quantized.codes, train["codes_BKT"])
    x = padded(codec.decoder(quantized.latent), 12_000)
    x_semantic = padded(codec.auxiliary(quantized.part("first")), 8000)
    torch.testing.assert_close(x, train["x"], atol=1e-5, rtol=0)
    torch.testing.assert_close(x_semantic, train["x_semantic"], atol=1e-5, rtol=0)
    terms = losses_of(quantized)
    for name, wave in (("main", x), ("aux", x_semantic)):
        probe = torch.randn(
            wave.shape, generator=torch.Generator().manual_seed(train[f"probe_{name}_seed"])
        )
        terms[name] = train["probe_scale"] * (wave * probe).mean()
    return codec, terms


def gradients(trained: tuple[Codec, dict[str, Tensor]], loss: Tensor) -> dict[str, Tensor]:
    """By the original's names; 0 where the loss does not reach."""
    codec, _ = trained
    ours = dict(codec.named_parameters())
    names = {name: theirs for name, theirs in lmspt_tensor_names(codec).items() if name in ours}
    found = torch.autograd.grad(
        loss, [ours[name] for name in names], retain_graph=True, allow_unused=True
    )
    return {
        theirs: torch.zeros(()) if gradient is None else gradient.norm()
        for theirs, gradient in zip(names.values(), found, strict=True)
    }


def test_a_training_step_is_the_originals(
    golden: dict[str, Any], trained: tuple[Codec, dict[str, Tensor]]
) -> None:
    train, terms = golden["train"], trained[1]
    assert terms.keys() == train["terms"].keys()
    for name, term in terms.items():
        torch.testing.assert_close(term.detach(), train["terms"][name], atol=0, rtol=1e-4)
    loss = torch.stack([train["weights"][name] * term for name, term in terms.items()]).sum()
    torch.testing.assert_close(loss.detach(), train["loss"], atol=0, rtol=1e-4)
    found = gradients(trained, loss)
    assert found.keys() == set(train["grad_norm_names"])
    assert len(found) == 616
    ours = torch.stack([found[name] for name in train["grad_norm_names"]])
    torch.testing.assert_close(ours, train["grad_norm"], atol=1e-7, rtol=1e-4)


def test_gradients_of_each_loss_term(
    golden: dict[str, Any], trained: tuple[Codec, dict[str, Tensor]]
) -> None:
    for name, expected in golden["train"]["grad_norm_by_term"].items():
        found = gradients(trained, trained[1][name])
        for part, norm in expected.items():
            inside = [value for key, value in found.items() if part in key.split(".")]
            assert inside
            ours = float(torch.stack(inside).norm())
            assert ours == pytest.approx(norm, rel=1e-4, abs=0), (name, part)


@pytest.mark.parametrize("name", OTHERS)
def test_other_configurations(name: str) -> None:
    config = other(name)
    state = state_of(config)
    codec = from_lmspt(Original(config, state))
    back = to_lmspt(codec)
    assert same(back.state, state)
    again = from_lmspt(back)
    assert again.config == codec.config
    assert same(again.state_dict(), codec.state_dict())

    theirs = ByNumber(state, config.get("dilation", [1, 3, 9]))
    wave = torch.randn(2, 1, 20 * codec.hop_length, generator=torch.Generator().manual_seed(1))
    semantic, acoustic = theirs.encode("semantic", wave), theirs.encode("acoustic", wave)
    dimension = config["latent_dim"] or 16
    assert semantic.shape == (2, dimension, 20)
    with torch.no_grad():
        latent = codec.encoder(wave)
    expected = torch.cat([semantic, acoustic], dim=1)
    torch.testing.assert_close(latent, expected, atol=1e-4, rtol=1e-5)
    first, taken = theirs.quantize("rvq_first.quantizers.0", semantic)
    codes, total = [first], taken
    residual = acoustic - taken if config.get("semantic_subtraction", True) else acoustic
    for level in range(config["n_codebooks"] - 1):
        row, value = theirs.quantize(f"rvq_rest.quantizers.{level}", residual)
        codes, total, residual = [*codes, row], total + value, residual - value
    ours = codec.encode(wave).codes
    assert torch.equal(ours, torch.stack(codes, dim=1))
    sides = {
        "decoder": (total, codec.decode(ours), {}),
        "aux_decoder": (taken, codec.resynthesize(ours), config.get("aux_decoder") or {}),
    }
    for side, (quantized, decoded, auxiliary) in sides.items():
        theirs.dilations = auxiliary.get("dilation", [1, 3, 9])
        if side == "decoder":
            theirs.dilations = config.get("dilation", [1, 3, 9])
        made = theirs.decode(side, quantized)
        assert decoded.shape[-1] >= made.shape[-1]
        torch.testing.assert_close(decoded[..., : made.shape[-1]], made, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", OTHERS)
def test_a_padded_batch_is_coded_as_its_items(name: str) -> None:
    codec = from_lmspt(Original(other(name), state_of(other(name))))
    hop = codec.hop_length
    lengths = torch.tensor([17 * hop + 1, 20 * hop, 3])
    wave = torch.randn(3, 1, 20 * hop, generator=torch.Generator().manual_seed(2))
    codes = codec.encode(wave, lengths)
    assert codes.lengths.tolist() == [18, 20, 1]
    together = codec.decode(codes.codes, codes.lengths)
    auxiliary = codec.resynthesize(codes.codes, codes.lengths)
    for item, (length, frames) in enumerate(zip(lengths, codes.lengths, strict=True)):
        alone = codec.encode(wave[item : item + 1, :, :length]).codes
        assert torch.equal(codes.codes[item : item + 1, :, :frames], alone)
        decoded, resynthesized = codec.decode(alone), codec.resynthesize(alone)
        assert decoded.shape[-1] == frames * hop >= length
        ours = together[item : item + 1, :, : decoded.shape[-1]]
        torch.testing.assert_close(ours, decoded, atol=1e-5, rtol=0)
        ours = auxiliary[item : item + 1, :, : resynthesized.shape[-1]]
        torch.testing.assert_close(ours, resynthesized, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OTHERS)
def test_causal_codecs_have_no_lookahead(name: str) -> None:
    codec = from_lmspt(Original(other(name), state_of(other(name))))
    causal, causal_too = codec.config.lmspt.causal, codec.config.lmspt.auxiliary.causal
    assert (causal, causal_too) == {
        "causal": (True, False), "causal, aux too": (True, True),
        "causal, a rate of 1": (True, True), "strides": (False, True),
    }.get(name, (False, False))  # fmt: skip
    hop, frame = codec.hop_length, 12
    wave = torch.randn(1, 1, 20 * hop, generator=torch.Generator().manual_seed(3))
    changed = wave.clone()
    changed[..., frame * hop + hop - 1 :] += 1
    with torch.no_grad():
        latent, other_latent = codec.encoder(wave), codec.encoder(changed)
        assert torch.equal(latent[..., :frame], other_latent[..., :frame]) == causal
        assert not torch.equal(latent[..., frame], other_latent[..., frame])
        quantized = torch.randn(1, codec.latent_dimension, 20)
        altered = quantized.clone()
        altered[..., frame:] += 1
        for decoder, is_causal in ((codec.decoder, causal), (codec.auxiliary, causal_too)):
            one, two = decoder(quantized), decoder(altered)
            before = frame * one.shape[-1] // 20
            assert torch.equal(one[..., :before], two[..., :before]) == is_causal
            assert not torch.equal(one[..., before:], two[..., before:])


def test_fine_tuning_starts_from_the_imported_codebooks(golden: dict[str, Any]) -> None:
    """No k-means, no revival: entries move with their gradient alone."""
    codec = from_lmspt(Original(golden["config"], golden["state_dict"])).train()
    codec(golden["train"]["input"])
    for name, theirs in lmspt_tensor_names(codec).items():
        if theirs.endswith("codebook.weight"):
            assert torch.equal(codec.state_dict()[name], golden["state_dict"][theirs])
            assert codec.state_dict()[name.replace("entries", "num_updates")] == 2


def test_a_round_trip_changes_only_what_is_documented() -> None:
    """The docstring of to_lmspt says it: update counts, so the digest, and training's keys."""
    config = config_from_lmspt(TINY)
    quantizer = replace(config.quantizer, decay=0.9, kmeans_iterations=3, revival_ratio=0.1)
    codec = Codec(replace(config, quantizer=quantizer)).train()
    wave = torch.randn(2, 1, 120, generator=torch.Generator().manual_seed(0))
    codec(wave)
    codec(wave)
    original = to_lmspt(codec.eval())
    assert {name: tuple(tensor.shape) for name, tensor in original.state.items()} == shapes_of(TINY)
    again = from_lmspt(original)
    assert again.config == config
    assert again.stamp.digest != codec.stamp.digest
    codes = codec.encode(wave).codes
    assert torch.equal(again.encode(wave).codes, codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))
    assert from_lmspt(to_lmspt(again)).stamp.digest == again.stamp.digest
