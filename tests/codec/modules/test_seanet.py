"""SEANet and its quantiser against tensors that SpeechTokenizer's own code produced."""

from typing import Any

import pytest
import torch
from conftest import ROOT

from codec import Codec
from codec.interop.checkpoint import Original
from codec.interop.speechtokenizer import from_original

GOLDEN = ROOT / "tests" / "golden" / "speechtokenizer_tiny.pt"


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture(scope="module")
def codec(golden: dict) -> Codec:
    return from_original(Original(golden["config"], golden["state_dict"]))


def test_codes_equal_the_originals(codec: Codec, golden: dict) -> None:
    for suffix in ("", "_odd_batch2"):
        codes = codec.encode(golden[f"input{suffix}"]).codes
        assert torch.equal(codes, golden[f"codes{suffix}"].transpose(0, 1))


def test_stretches_of_codebooks_equal_the_originals(codec: Codec, golden: dict) -> None:
    """The original's n_q is the end of the stretch, st its start."""
    first = codec.encode(golden["input"], num_codebooks=3).codes
    assert torch.equal(first, golden["codes_nq3"].transpose(0, 1))
    inner = codec.encode(golden["input"], num_codebooks=3, first_codebook=1).codes
    assert torch.equal(inner, golden["codes_nq4_st1"].transpose(0, 1))


def test_waves_equal_the_originals(codec: Codec, golden: dict) -> None:
    codes = golden["codes"].transpose(0, 1)
    waves = {
        "output": codec.decode(codes),
        "output_odd_batch2": codec.decode(golden["codes_odd_batch2"].transpose(0, 1)),
        "output_q0_only": codec.decode(codes[:, :1]),
        "output_codes2to4_st2": codec.decode(codes[:, 2:5], first_codebook=2),
        "forward_out": codec(golden["input"]).wave.detach(),
    }
    for name, wave in waves.items():
        torch.testing.assert_close(wave, golden[name], atol=1e-5, rtol=0)


@torch.no_grad()
def test_features_equal_the_originals(codec: Codec, golden: dict) -> None:
    latent = codec.encoder(golden["input"])
    # Up to 8 in size: this is 4e-6 of it, where sums of float32 may differ.
    torch.testing.assert_close(latent, golden["latent"], atol=5e-5, rtol=0)
    codes = codec.encode(golden["input"]).codes
    for book, expected in zip((0, 3), golden["forward_feature_list_0_3"], strict=True):
        feature = codec.quantizer.decode(codes[:, book : book + 1], first_codebook=book)
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=0)
    semantic = codec.semantic_head(codec.quantizer.decode(codes[:, :1]).mT)
    torch.testing.assert_close(semantic, golden["forward_feature_layer0"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_guide_says_how_to_get_what_the_original_gives(codec: Codec, golden: dict) -> None:
    """Runs the right-hand column of the table for those who come from SpeechTokenizer."""
    guide = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    table = guide.split("## SpeechTokenizer and DM-Codec")[1].split("\n## ")[0]
    wave, lengths, codes = golden["input"], torch.tensor([16_000]), golden["codes"].transpose(0, 1)
    scope = {"codec": codec, "wave": wave, "lengths": lengths, "codes": codes}

    def run(code: str) -> Any:
        assert f"`{code}`" in table
        name, _, value = code.rpartition(" = ")
        result = eval(value, scope)
        return scope.setdefault(name, result) if name else result

    exact = {
        "codec.encode(wave, lengths).codes": "codes",
        "codec.encode(wave, num_codebooks=3)": "codes_nq3",
        "codec.encode(wave, first_codebook=1, num_codebooks=3)": "codes_nq4_st1",
    }
    for code, key in exact.items():
        found = run(code)
        found = found if isinstance(found, torch.Tensor) else found.codes
        assert torch.equal(found.transpose(0, 1), golden[key])
    run("out = codec(wave)")
    close = {
        "codec.decode(codes)": golden["output"],
        "codec.decode(codes[:, :1])": golden["output_q0_only"],
        "codec.decode(codes[:, 2:5], first_codebook=2)": golden["output_codes2to4_st2"],
        "out.wave": golden["forward_out"],
        'codec.semantic_head(out.quantized.part("first").mT)': golden["forward_feature_layer0"],
    }
    for code, expected in close.items():
        torch.testing.assert_close(run(code), expected, atol=1e-5, rtol=0)
    run("entries = codec.quantizer(codec.encoder(wave)).entries")
    # Straight through: latent + (entry - latent), with float32's error of a latent of up to 8.
    for code, expected in zip(
        ("entries[0]", "entries[3]"), golden["forward_feature_list_0_3"], strict=True
    ):
        torch.testing.assert_close(run(code), expected, atol=1e-5, rtol=0)
    assert run("out.quantized.commitment") > 0
    for name, value in (("sample_rate", 16_000), ("num_codebooks", 8), ("hop_length", 320)):
        assert f"`{name}`" in table
        assert getattr(codec, name) == value


@torch.no_grad()
def test_folded_weight_norm_changes_nothing(golden: dict) -> None:
    codec = from_original(Original(golden["config"], golden["state_dict"]))
    folded = from_original(Original(golden["config"], golden["state_dict"])).fold_weight_norm()
    assert folded.is_folded
    assert not codec.is_folded
    assert len(folded.state_dict()) < len(codec.state_dict())
    assert folded.stamp == codec.stamp
    for suffix in ("", "_odd_batch2"):
        codes = folded.encode(golden[f"input{suffix}"]).codes
        assert torch.equal(codes, golden[f"codes{suffix}"].transpose(0, 1))
        wave = folded.decode(codes)
        torch.testing.assert_close(wave, golden[f"output{suffix}"], atol=1e-5, rtol=0)


def test_padded_batch_equals_single_items(codec: Codec, golden: dict) -> None:
    wave = golden["input_odd_batch2"]
    for size in (wave.shape[-1], 4001, 977, 100, 1):
        lengths = torch.tensor([wave.shape[-1], size])
        noisy = wave.clone()
        noisy[1, :, size:] = 0.5  # Arbitrary values in padding must not change the codes.
        batch = codec.encode(noisy, lengths)
        alone = codec.encode(wave[1:, :, :size])
        frames = alone.codes.shape[-1]
        assert int(batch.lengths[1]) == frames
        assert torch.equal(batch.codes[1, :, :frames], alone.codes[0])
        together = codec.decode(batch.codes, batch.lengths)[1, :, : frames * codec.hop_length]
        torch.testing.assert_close(together, codec.decode(alone.codes)[0], atol=1e-5, rtol=0)
