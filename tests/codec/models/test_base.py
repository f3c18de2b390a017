"""SpeechCodec: its checks, and what it leaves to a codec. test_model.py tests the rest."""

import numpy as np
import pytest
import torch
from conftest import plain
from torch import Tensor, nn

from codec.models.base import SpeechCodec


class Loudness(SpeechCodec):
    """Two codebooks of unlike sizes; the codes are the samples."""

    sample_rate, hop_length, codebook_sizes = 100, 1, (8, 4)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def _encode_chunk(self, wave: Tensor, lengths: Tensor | None, books: range) -> Tensor:
        return wave.long().expand(-1, len(books), -1)

    def _decode_chunk(self, codes: Tensor, lengths: Tensor | None, first_codebook: int) -> Tensor:
        return codes[:, :1].float()


def test_each_codebook_has_its_size() -> None:
    codec = Loudness()
    assert (codec.num_codebooks, codec.frame_rate, codec.source) == (2, 100.0, "untitled")
    codes = torch.tensor([[[7, 0], [3, 3]]])
    assert codec.decode(codes).shape == (1, 1, 2)
    with pytest.raises(ValueError, match=r"codebook 2 must lie in 0\.\.3, got 3\.\.4"):
        codec.decode(torch.tensor([[[7, 0], [3, 4]]]))
    with pytest.raises(ValueError, match=r"codebook 2 must lie in 0\.\.3, got 0\.\.7"):
        codec.decode(codes[:, :1], first_codebook=1)
    with pytest.raises(ValueError, match=r"codebook 1 must lie in 0\.\.7, got -1\.\.6"):
        codec.decode(codes[:, :1] - 1)


def test_abstract_properties_raise() -> None:
    for name in ("sample_rate", "hop_length", "codebook_sizes", "stamp"):
        with pytest.raises(NotImplementedError):
            getattr(SpeechCodec(), name)


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros((1, 1, 9), np.float32), r"tensor, not a ndarray of float32; .*torch\.from_numpy"),
        ([0.0, 1.0], "tensor, not a list"),
        (torch.zeros(1, 1, 9, dtype=torch.int64), r"floats, not a Tensor of torch\.int64; divide"),
        (torch.zeros(1, 2, 9), r"got \(1, 2, 9\); average the channels"),
        (torch.tensor([[[0.0, float("nan")]]]), "NaN or infinite"),
        (torch.tensor([[[0.0, float("inf")]]]), "NaN or infinite"),
        (torch.tensor([[[0.0, -3000.0]]]), "got up to 3000; divide 16-bit integers"),
    ],
)
def test_waves_that_are_none_are_refused(wave: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(SpeechCodec.encode)(Loudness(), wave)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (np.zeros(9, np.int16), r"not a ndarray of int16"),
        (np.zeros((1, 9), np.float32), r"float32 \(1, 9\)"),
        (torch.zeros(9), "not a Tensor"),
        (np.array([0.0, np.nan], np.float32), "NaN or infinite"),
        (np.array([0.0, 3000.0], np.float32), "got up to 3000"),
    ],
)
def test_blocks_that_are_none_are_refused(block: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(SpeechCodec.encode_stream)(Loudness(), [np.zeros(9, np.float32), block])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_codes_are_integers(dtype: torch.dtype) -> None:
    codes = torch.full((1, 1, 4), float("nan"), dtype=dtype)
    with pytest.raises(ValueError, match=f"tensor of integers, not a Tensor of {dtype}"):
        plain(SpeechCodec.decode)(Loudness(), codes)
    with pytest.raises(ValueError, match=r"tensor of integers, not a ndarray of int64"):
        plain(SpeechCodec.decode)(Loudness(), np.zeros((1, 1, 4), np.int64))
    with pytest.raises(ValueError, match=r"in a NumPy array, not a ndarray of float64"):
        next(plain(SpeechCodec.decode_stream)(Loudness(), np.zeros((1, 4))))
    narrow = torch.tensor([[[1, 7]]], dtype=torch.int32)
    assert Loudness().decode(narrow).tolist() == [[[1.0, 7.0]]]


@pytest.mark.parametrize("lengths", [[9], torch.tensor([9.0]), torch.tensor([9, 9])])
def test_lengths_are_one_integer_a_wave(lengths: object) -> None:
    with pytest.raises(ValueError, match=r"lengths must be a tensor of integers \(1,\)"):
        plain(SpeechCodec.encode)(Loudness(), torch.zeros(1, 1, 9), lengths)


def test_double_precision_is_encoded_as_single() -> None:
    wave = torch.tensor([[[1.0, 3.0]]])
    assert torch.equal(Loudness().encode(wave.double()).codes, Loudness().encode(wave).codes)
