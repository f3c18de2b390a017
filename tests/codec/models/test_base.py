"""SpeechCodec: its checks, and what it leaves to a codec. test_codec.py tests the rest."""

import numpy as np
import pytest
import torch
from conftest import plain
from torch import Tensor, nn
from torch.nn import functional

import codec.models.base
from codec.audio import INTEGER_PEAK
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
    loudness = Loudness()
    assert (loudness.num_codebooks, loudness.frame_rate, loudness.source) == (2, 100.0, "untitled")
    codes = torch.tensor([[[7, 0], [3, 3]]])
    assert loudness.decode(codes).shape == (1, 1, 2)
    with pytest.raises(ValueError, match=r"codebook 2 must lie in 0\.\.3, got 3\.\.4"):
        loudness.decode(torch.tensor([[[7, 0], [3, 4]]]))
    with pytest.raises(ValueError, match=r"codebook 2 must lie in 0\.\.3, got 0\.\.7"):
        loudness.decode(codes[:, :1], first_codebook=1)
    with pytest.raises(ValueError, match=r"codebook 1 must lie in 0\.\.7, got -1\.\.6"):
        loudness.decode(codes[:, :1] - 1)


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


def test_other_precisions_are_encoded_in_that_of_the_weights() -> None:
    """Single precision stays: what a codec in half precision makes of it is up to its layers."""
    seen = []

    class Spy(Loudness):
        def _encode_chunk(self, wave: Tensor, lengths: Tensor | None, books: range) -> Tensor:
            seen.append(wave.dtype)
            return super()._encode_chunk(wave, lengths, books)

    wave = torch.tensor([[[1.0, 3.0]]])
    expected = Loudness().encode(wave).codes
    for weights in (torch.float32, torch.bfloat16):
        for given in (torch.float64, torch.float32):
            assert torch.equal(Spy().to(weights).encode(wave.to(given)).codes, expected)
    assert seen == [torch.float32, torch.float32, torch.bfloat16, torch.float32]


class Smoothed(SpeechCodec):
    """Frames of 4 samples. A code is 1 + the maximum of its frame and the two on each side, and a
    decoded frame that of the codes: what 2 frames of context suffice for, and 1 does not."""

    sample_rate, hop_length, codebook_sizes = 40, 4, (100, 50)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.chunks: list[int] = []

    def _encode_chunk(self, wave: Tensor, lengths: Tensor | None, books: range) -> Tensor:
        self.chunks.append(wave.shape[-1])
        if lengths is not None:
            wave = wave * (torch.arange(wave.shape[-1]) < lengths[:, None])[:, None]
        frames = functional.pad(wave, (0, -wave.shape[-1] % 4)).unflatten(-1, (-1, 4)).amax(-1)
        widened = functional.max_pool1d(functional.pad(100 * frames, (2, 2)), 5, 1)
        return torch.cat([(widened // (1 + book)).long() for book in books], dim=1)

    def _decode_chunk(self, codes: Tensor, lengths: Tensor | None, first_codebook: int) -> Tensor:
        self.chunks.append(codes.shape[-1])
        rows = codes.sum(1, keepdim=True).float() + first_codebook
        if lengths is not None:
            rows = rows * (torch.arange(rows.shape[-1]) < lengths[:, None])[:, None]
        widened = functional.max_pool1d(functional.pad(rows, (2, 2)), 5, 1)
        return widened.repeat_interleave(4, -1)


@pytest.fixture
def smoothed(monkeypatch: pytest.MonkeyPatch) -> Smoothed:
    """In chunks of 10 frames with 2 frames of context."""
    for name, value in (("CHUNK_SECONDS", 1.0), ("CONTEXT_SECONDS", 0.2), ("CONTEXT_FRAMES", 1)):
        monkeypatch.setattr(codec.models.base, name, value)
    return Smoothed()


def ticks(num_samples: int, items: int = 1) -> Tensor:
    """Sparse samples, so that the maximum of a window moves at its very borders."""
    generator = torch.Generator().manual_seed(num_samples)
    wave = torch.rand(items, 1, num_samples, generator=generator)
    return 0.99 * wave * (torch.rand(wave.shape, generator=generator) < 0.1)


@pytest.mark.parametrize("num_samples", [1, 39, 40, 41, 80, 123, 399])
def test_chunks_with_their_context_are_one_pass(smoothed: Smoothed, num_samples: int) -> None:
    wave = ticks(num_samples)
    expected = smoothed._encode_chunk(wave, None, range(2))
    num_frames = expected.shape[-1]
    smoothed.chunks.clear()
    codes, lengths = smoothed.encode(wave)
    assert torch.equal(codes, expected)
    assert lengths.tolist() == [num_frames] == [-(-num_samples // 4)]
    # Each chunk has no more than its context.
    starts = range(0, num_frames, 10)
    sizes = [min(start + 12, num_frames) - max(start - 2, 0) for start in starts]
    assert smoothed.chunks == [
        min(4 * size, num_samples - 4 * max(start - 2, 0))
        for start, size in zip(starts, sizes, strict=True)
    ]
    smoothed.chunks.clear()
    decoded = smoothed.decode(codes)
    assert smoothed.chunks == sizes
    assert torch.equal(decoded, smoothed._decode_chunk(codes, None, 0))
    blocks = list(smoothed.decode_stream(codes[0].numpy()))
    assert [len(block) for block in blocks] == [4 * min(10, num_frames - each) for each in starts]
    np.testing.assert_array_equal(np.concatenate(blocks), decoded[0, 0])
    for size in (1, 7, 40, 200, 1000):
        smoothed.chunks.clear()
        starts = range(0, num_samples, size)
        blocks = [wave[0, 0].numpy()[start : start + size] for start in starts]
        streamed = smoothed.encode_stream(blocks)
        np.testing.assert_array_equal(streamed, codes[0])
        assert max(smoothed.chunks) <= 4 * 14


def test_items_of_a_padded_batch_are_chunked_as_alone(smoothed: Smoothed) -> None:
    wave, lengths = ticks(250, items=4), torch.tensor([250, 101, 1, 80])
    codes, frames = smoothed.encode(wave, lengths)
    decoded = smoothed.decode(codes, frames)
    assert frames.tolist() == [63, 26, 1, 20]
    for item, (length, count) in enumerate(zip(lengths, frames, strict=True)):
        alone = smoothed.encode(wave[item : item + 1, :, :length]).codes
        assert torch.equal(codes[item, :, :count], alone[0])
        assert torch.equal(decoded[item, :, : 4 * count], smoothed.decode(alone)[0])


def test_any_stretch_of_codebooks(smoothed: Smoothed) -> None:
    wave = ticks(130)
    codes = smoothed.encode(wave).codes
    assert torch.equal(smoothed.encode(wave, num_codebooks=1).codes, codes[:, :1])
    assert torch.equal(smoothed.encode(wave, first_codebook=1).codes, codes[:, 1:])
    second = smoothed.decode(codes[:, 1:], first_codebook=1)
    assert torch.equal(second, smoothed._decode_chunk(codes[:, 1:], None, 1))
    (block, *_) = smoothed.decode_stream(codes[0, 1:].numpy(), first_codebook=1)
    np.testing.assert_array_equal(block, second[0, 0, :40])
    streamed = smoothed.encode_stream([wave[0, 0].numpy()], first_codebook=1)
    np.testing.assert_array_equal(streamed, codes[0, 1:])
    for arguments in ((3, 0), (0, 0), (2, 1), (None, 2), (None, -1)):
        with pytest.raises(ValueError, match="must lie between"):
            smoothed.encode(wave, None, *arguments)


def test_the_context_of_few_frames_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 s, or 32 frames where these are longer."""
    assert Smoothed()._chunk_frames == (300, 32)
    assert Loudness()._chunk_frames == (3000, 200)


@pytest.mark.parametrize("call", ["encode", "encode_stream"])
def test_peaks_of_floats_may_exceed_one(call: str) -> None:
    """Float recordings do, up to where samples can only be integers."""
    for peak in (-INTEGER_PEAK, INTEGER_PEAK):
        wave = torch.tensor([0.0, peak])
        given = [wave.numpy()] if call == "encode_stream" else wave[None, None]
        getattr(Loudness(), call)(given)
        with pytest.raises(ValueError, match="divide 16-bit"):
            getattr(Loudness(), call)(
                [1.01 * wave.numpy()] if call == "encode_stream" else 1.01 * wave[None, None]
            )


def test_nothing_to_encode_is_an_error() -> None:
    wave = torch.zeros(2, 1, 9)
    for lengths in ([0, 9], [9, 10]):
        with pytest.raises(ValueError, match=r"no samples|exceed 9 samples"):
            Loudness().encode(wave, torch.tensor(lengths))
    assert Loudness().encode(wave, torch.tensor([1, 9])).lengths.tolist() == [1, 9]
    with pytest.raises(ValueError, match="no samples"):
        Loudness().encode(wave[..., :0])
    for blocks in ([], [np.zeros(0, np.float32)]):
        with pytest.raises(ValueError, match="no samples"):
            Loudness().encode_stream(blocks)
    for shape in ((1, 1, 0), (1, 3, 4), (1, 0, 4), (1, 4)):
        with pytest.raises(ValueError, match=r"codec expects codes \(batch, 1 to 2 codebooks"):
            plain(SpeechCodec.decode)(Loudness(), torch.zeros(shape, dtype=torch.long))
