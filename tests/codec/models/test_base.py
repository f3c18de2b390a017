"""SpeechCodec: its checks, and what it leaves to a codec. test_model.py tests the rest."""

import pytest
import torch
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
