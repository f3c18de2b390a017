"""SEANet and its quantiser against tensors that SpeechTokenizer's own code produced."""

from pathlib import Path

import pytest
import torch

from codec import Codec
from codec.interop import Original, from_original

GOLDEN = Path(__file__).parent / "golden" / "speechtokenizer_tiny.pt"


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
        noisy[1, :, size:] = 0.5  # Padding holds anything; it must not be heard.
        batch = codec.encode(noisy, lengths)
        alone = codec.encode(wave[1:, :, :size])
        frames = alone.codes.shape[-1]
        assert int(batch.lengths[1]) == frames
        assert torch.equal(batch.codes[1, :, :frames], alone.codes[0])
        together = codec.decode(batch.codes, batch.lengths)[1, :, : frames * codec.hop_length]
        torch.testing.assert_close(together, codec.decode(alone.codes)[0], atol=1e-5, rtol=0)
