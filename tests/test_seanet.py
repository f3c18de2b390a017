"""SEANet and its quantiser against tensors that SpeechTokenizer's own code produced."""

from pathlib import Path

import pytest
import torch

from codec import Codec, CodecConfig
from codec.config import QuantizerConfig, SEANetConfig

GOLDEN = Path(__file__).parent / "golden" / "speechtokenizer_tiny.pt"


def ours(name: str, num_strides: int) -> str | None:
    """Our name of one of SpeechTokenizer's tensors (one residual unit per stride)."""
    name = name.replace(".conv.conv.", ".conv.").replace(".convtr.convtr.", ".conv.")
    name = name.replace("weight_g", "parametrizations.weight.original0")
    name = name.replace("weight_v", "parametrizations.weight.original1")
    parts = name.split(".")
    if parts[0] == "transform":
        return f"semantic_head.{parts[1]}"
    if parts[0] == "quantizer":
        buffer = {"embed": "entries", "embed_avg": "entry_sum", "cluster_size": "cluster_size"}
        leaf = buffer.get(parts[-1])
        return leaf and f"quantizer.codebooks.{parts[3]}.{leaf}"
    side, index, rest = parts[0], int(parts[2]), parts[3:]
    # Encoder: 0 in, then (unit, activation, down) per stride, LSTM, activation, out.
    # Decoder: 0 in, LSTM, then (activation, up, unit) per stride, activation, out.
    lstm_at = 1 + 3 * num_strides if side == "encoder" else 1
    if index == 0:
        return ".".join([side, "conv_in", *rest])
    if index == 3 * num_strides + 3:
        return ".".join([side, "conv_out", *rest])
    if index == lstm_at:
        return ".".join([side, "lstm", *rest])
    stage, slot = divmod(index - (1 if side == "encoder" else 2), 3)
    if rest[0] in ("block", "shortcut"):
        unit = {"block.1": "conv_in", "block.3": "conv_out"}.get(".".join(rest[:2]), "shortcut")
        tail = rest[2:] if rest[0] == "block" else rest[1:]
        return ".".join([side, "stages", str(stage), "units", "0", unit, *tail])
    assert slot in (1, 2)
    return ".".join([side, "stages", str(stage), "down" if side == "encoder" else "up", *rest])


@pytest.fixture(scope="module")
def golden() -> dict:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture(scope="module")
def codec(golden: dict) -> Codec:
    config = golden["config"]
    assert config["activation"] == "ELU"
    assert config["n_residual_layers"] == 1
    codec = Codec(
        CodecConfig(
            family="seanet",
            sample_rate=config["sample_rate"],
            seanet=SEANetConfig(
                num_filters=config["n_filters"],
                strides=tuple(config["strides"]),
                dimension=config["dimension"],
                semantic_dimension=config["semantic_dimension"],
                bidirectional=config["bidirectional"],
                dilation_base=config["dilation_base"],
                residual_kernel_size=config["residual_kernel_size"],
                num_lstm_layers=config["lstm_layers"],
            ),
            quantizer=QuantizerConfig(
                num_codebooks=config["n_q"], codebook_size=config["codebook_size"]
            ),
        )
    )
    state = codec.state_dict()
    loaded = set()
    for name, tensor in golden["state_dict"].items():
        target = ours(name, len(config["strides"]))
        if target is not None:
            assert state[target].shape == tensor.shape, name
            state[target] = tensor
            loaded.add(target)
    assert {name for name in set(state) - loaded if "num_updates" not in name} == set()
    codec.load_state_dict(state)
    return codec.eval()


def test_codes_equal_the_originals(codec: Codec, golden: dict) -> None:
    for suffix in ("", "_odd_batch2"):
        codes = codec.encode(golden[f"input{suffix}"]).codes
        assert torch.equal(codes, golden[f"codes{suffix}"].transpose(0, 1))


def test_first_codebooks_equal_the_originals(codec: Codec, golden: dict) -> None:
    codes = codec.encode(golden["input"], num_codebooks=3).codes
    assert torch.equal(codes, golden["codes_nq3"].transpose(0, 1))


def test_waves_equal_the_originals(codec: Codec, golden: dict) -> None:
    for suffix in ("", "_odd_batch2"):
        wave = codec.decode(golden[f"codes{suffix}"].transpose(0, 1))
        torch.testing.assert_close(wave, golden[f"output{suffix}"], atol=1e-5, rtol=0)
    first = codec.decode(golden["codes"].transpose(0, 1)[:, :1])
    torch.testing.assert_close(first, golden["output_q0_only"], atol=1e-5, rtol=0)


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
