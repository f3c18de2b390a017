"""SpeechTokenizer's configuration and tensors, and ours for them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ROOT
from original_seanet import PLAIN, PLAIN_SHAPES, SNAKE, SNAKE_SHAPES, random_state
from torch import Tensor

from codec import Codec, CodecConfig
from codec.config import QuantizerConfig
from codec.interop.checkpoint import Original
from codec.interop.speechtokenizer import from_original, tensor_names, to_original

GOLDEN = ROOT / "tests" / "golden" / "speechtokenizer_tiny.pt"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def test_the_published_size() -> None:
    """166 tensors, 103.68 M parameters and 16.79 M numbers in buffers, as counted there."""
    with torch.device("meta"):
        codec = Codec(CodecConfig(family="seanet"))
    names = set(tensor_names(codec).values())
    assert len(names) == 166
    assert "encoder.model.13.lstm.weight_ih_l1_reverse" in names
    assert "decoder.model.12.convtr.convtr.weight_g" in names
    parameters = sum(parameter.numel() for parameter in codec.parameters())
    assert round(parameters / 1e6, 2) == 103.68
    assert round(sum(buffer.numel() for buffer in codec.buffers()) / 1e6, 2) == 16.79


def test_fine_tuning_starts_from_the_imported_codebooks(golden: dict[str, Any]) -> None:
    """k-means would throw the imported entries away; one step moves used ones a little."""
    codec = from_original(Original(golden["config"], golden["state_dict"])).train()
    codec(golden["input"])
    for index, book in enumerate(codec.quantizer.codebooks):
        name = f"quantizer.vq.layers.{index}._codebook"
        counts = golden["state_dict"][f"{name}.cluster_size"] * 0.99
        chosen = torch.bincount(golden["codes"][index, 0], minlength=64)
        kept = book.cluster_size == counts + 0.01 * chosen
        assert int(kept.sum()) > 32
        assert int(book.num_updates) == 2


def test_without_an_lstm_there_is_one_direction() -> None:
    """The original widens its last convolution for a second one even where there is no LSTM."""
    plain = from_original(Original(PLAIN, random_state(PLAIN_SHAPES))).config
    codec = Codec(replace(plain, seanet=replace(plain.seanet, bidirectional=True)))
    original = to_original(codec)
    assert original.config["bidirectional"] is False
    assert {name: tuple(tensor.shape) for name, tensor in original.state.items()} == PLAIN_SHAPES
    assert same(from_original(original).state_dict(), codec.state_dict())


def test_an_untrained_codec_stays_one() -> None:
    config = CodecConfig(
        family="seanet",
        seanet=from_original(Original(PLAIN, random_state(PLAIN_SHAPES))).config.seanet,
        quantizer=QuantizerConfig(num_codebooks=1, codebook_size=16),
    )
    original = to_original(Codec(config))
    assert original.state["quantizer.vq.layers.0._codebook.inited"].tolist() == [0.0]
    book = from_original(original).quantizer.codebooks[0]
    assert int(book.num_updates) == 0
    book.initialize(torch.randn(40, 8))
    assert book.entries.abs().sum() > 0


def test_what_was_exported_is_a_copy(golden: dict[str, Any]) -> None:
    codec = from_original(Original(golden["config"], golden["state_dict"]))
    original = to_original(codec)
    with torch.no_grad():
        for tensor in codec.state_dict().values():
            tensor.zero_()
    assert same(original.state, golden["state_dict"])


def test_numbers_as_the_original_takes_them(golden: dict[str, Any]) -> None:
    loose = {"bidirectional": 1, "strides": (8.0, 5, 4.0, 2), "n_q": 8.0, "sample_rate": 16000.0}
    codec = from_original(Original(golden["config"] | loose, golden["state_dict"]))
    assert codec.config == from_original(Original(golden["config"], golden["state_dict"])).config
    assert all(type(stride) is int for stride in codec.config.seanet.strides)
    assert codec.config.seanet.bidirectional is True


def test_a_round_trip_changes_only_what_is_documented(golden: dict[str, Any]) -> None:
    """The docstring of to_original says it: update counts, so the digest, and training's keys."""
    config = from_original(Original(SNAKE, random_state(SNAKE_SHAPES))).config
    quantizer = replace(config.quantizer, decay=0.9, kmeans_iterations=3, dropout=0.5)
    codec = Codec(replace(config, quantizer=quantizer)).train()
    for _ in range(2):
        codec(golden["input"])
    again = from_original(to_original(codec.eval()))
    expected = QuantizerConfig(num_codebooks=2, codebook_size=16, decay=0.99, kmeans_iterations=50)
    assert again.config == replace(config, quantizer=expected)
    assert again.stamp.digest != codec.stamp.digest
    codes = codec.encode(golden["input"]).codes
    assert torch.equal(again.encode(golden["input"]).codes, codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))
    assert from_original(to_original(again)).stamp.digest == again.stamp.digest


def test_tensors_that_cannot_be_used(golden: dict[str, Any]) -> None:
    state, bias = golden["state_dict"], "encoder.model.0.conv.conv.bias"

    def error_of(**changed: Any) -> str:
        with pytest.raises(ValueError, match="does not match its configuration") as caught:
            from_original(Original(golden["config"], state | changed))
        return str(caught.value)

    unusable = f"not dense or not floating-point: {bias}"
    assert unusable in error_of(**{bias: state[bias].to_sparse()})
    assert unusable in error_of(**{bias: state[bias].long()})
    assert unusable in error_of(**{bias: state[bias].to("meta")})
    # A few bytes of a file may be a tensor of any size.
    assert unusable in error_of(**{bias: torch.zeros(1).expand(len(state[bias]))})
    name = "encoder.model.0.conv.conv.weight_g"
    new = name.replace("weight_g", "parametrizations.weight.original0")
    twice = error_of(**{new: torch.ones_like(state[name])})
    assert f"under their old and their new name: {name}" in twice
    # The original's flag is a float; corrected versions have a bool.
    flag = "quantizer.vq.layers.0._codebook.inited"
    codec = from_original(Original(golden["config"], state | {flag: torch.tensor([True])}))
    assert int(codec.quantizer.codebooks[0].num_updates) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        # Terabytes, 2^63 numbers and 2^30 modules, if they were made before the tensors are seen.
        ("dimension", 2**31 - 1, "of another shape: encoder"),
        ("dimension", 2**31, "dimension must be"),
        ("strides", [2] * 80, "tensors of more than"),
        ("n_q", 2**30, "num_codebooks must be at least 1 and at most 1024.*got 1073741824"),
        ("n_residual_layers", 2**30, "n_residual_layers asks for"),
        ("lstm_layers", 1000, "lstm_layers asks for"),
        ("strides", [2] * 10**5, "strides asks for 100000"),
    ],
)
def test_a_configuration_alone_takes_no_memory(
    golden: dict[str, Any], key: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_original(Original(golden["config"] | {key: value}, golden["state_dict"]))
