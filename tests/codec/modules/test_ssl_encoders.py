"""The semantic encoder that is Whisper's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_semantic import LM_SPT, noise, tiny_semantic
from tiny_teachers import save_speech_teacher

from codec import Codec, load_codec
from codec.distillation.teachers import load_speech_teacher
from codec.modules.ssl_encoders import WhisperEncoder, config_for_whisper, load_whisper


def test_features_are_whispers_stacked_per_frame(tmp_path: Path) -> None:
    codec, whisper = tiny_semantic(tmp_path)
    encoder, wave = codec.encoder.semantic, noise(1, 1, 5 * 640)
    assert isinstance(encoder, WhisperEncoder)
    teacher = load_speech_teacher(whisper, layer="last", half=False)
    values = teacher(wave).values
    features = encoder.features(wave)
    assert features.shape == (1, 2 * teacher.dimension, 5)
    expected = torch.cat([values[0, 0::2], values[0, 1::2]], dim=1)
    torch.testing.assert_close(features[0].T, expected)


@pytest.mark.parametrize("samples", [1, 639, 640, 641, 7 * 640 + 5])
def test_padded_batch_equals_single_items(tmp_path: Path, samples: int) -> None:
    codec, _ = tiny_semantic(tmp_path)
    wave = noise(2, 1, 9 * 640 + 3)
    alone = codec.encode(wave[:1, :, :samples])
    both = codec.encode(wave, torch.tensor([samples, wave.shape[-1]]))
    count = -(-samples // 640)
    assert alone.codes.shape[-1] == both.lengths[0] == count
    assert torch.equal(both.codes[:1, :, :count], alone.codes)


def test_items_may_all_be_shorter_than_the_batch(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    wave = noise(2, 1, 9 * 640)
    both = codec.encode(wave, torch.tensor([5 * 640, 3 * 640]))
    assert both.codes.shape == (2, 3, 9)
    alone = codec.encode(wave[:1, :, : 5 * 640])
    assert torch.equal(both.codes[:1, :, :5], alone.codes)


def test_a_chunk_fits_into_whispers_window(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    kept, context = codec._chunk_frames
    assert (kept + 2 * context) / codec.frame_rate <= 30
    wave = noise(1, 1, 47 * 16_000)
    codes = codec.encode(wave).codes
    assert codes.shape == (1, 3, 1175)
    first = codec.encode(wave[..., : (kept + context) * 640]).codes
    assert torch.equal(codes[..., :kept], first[..., :kept])
    assert np.array_equal(codec.encode_stream(wave[0, 0].numpy().reshape(47, -1)), codes[0])


def test_offsets_change_the_positions_only(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    encoder, wave = codec.encoder.semantic, noise(2, 1, 10 * 640)
    assert isinstance(encoder, WhisperEncoder)
    lengths = torch.tensor([10 * 640, 29 * 16_000])
    torch.manual_seed(0)
    drawn = [encoder.random_offsets(lengths).tolist() for _ in range(200)]
    low, high = min(one for one, _ in drawn), max(one for one, _ in drawn)
    assert 0 <= low < 200
    assert 1200 < high <= 1500 - 20
    assert max(one for _, one in drawn) <= 50
    plain = encoder.features(wave[:1])
    moved = encoder.features(wave[:1], offsets=torch.tensor([7]))
    table = encoder.whisper.network.embed_positions.weight
    with torch.no_grad():
        table.copy_(table.roll(-7, dims=0))
    torch.testing.assert_close(encoder.features(wave[:1]), moved)
    assert not torch.allclose(plain, moved)


def test_whisper_is_saved_with_the_codec_and_not_trained(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    codec.save_pretrained(tmp_path / "codec")
    loaded, wave = load_codec(str(tmp_path / "codec")), noise(1, 1, 6400)
    assert torch.equal(loaded.encode(wave).codes, codec.encode(wave).codes)
    codec.train()(wave).wave.square().sum().backward()
    learning = {name for name, each in codec.named_parameters() if each.requires_grad}
    assert not any("whisper" in name for name in learning)
    assert {"encoder.semantic.embed.weight", "encoder.semantic.project.bias"} <= learning
    assert codec.encoder.semantic.embed.weight.grad.abs().sum() > 0
    assert not any(part.training for part in codec.encoder.semantic.whisper.modules())


def test_another_whisper_is_refused_by_name(tmp_path: Path) -> None:
    codec, whisper = tiny_semantic(tmp_path)
    encoder = codec.encoder.semantic
    assert isinstance(encoder, WhisperEncoder)
    hubert = save_speech_teacher(tmp_path / "hubert", "hubert")
    with pytest.raises(ValueError, match="is not a Whisper"):
        config_for_whisper(hubert, LM_SPT)
    other = Codec(replace(codec.config, lmspt=replace(LM_SPT.lmspt, semantic="whisper")))
    assert isinstance(other.encoder.semantic, WhisperEncoder)
    with pytest.raises(ValueError, match=r"other sizes than codec\.lmspt\.whisper"):
        load_whisper(other.encoder.semantic, whisper)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, sample_rate=24_000), "needs sample_rate 16000"),
        (
            lambda c: replace(c, spectral=replace(c.spectral, hop=100, window=400)),
            "samples per frame, got 16000 and 400",
        ),
        (lambda c: replace(c, lmspt=replace(c.lmspt, shared_encoder=True)), "a separate encoder"),
        (
            lambda c: replace(
                c, lmspt=replace(c.lmspt, whisper=replace(c.lmspt.whisper, num_heads=5))
            ),
            "5 does not divide width 384",
        ),
    ],
)
def test_invalid_configurations_are_refused(change: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(LM_SPT)


def test_a_codec_without_a_semantic_half_cannot_freeze_it(tiny_codec_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"codec\.family lmspt, without lmspt\.shared"):
        Codec.from_pretrained(tiny_codec_folder).freeze_semantic()
