"""Codec: the SpeechCodec interface for the families seanet and spectral, saving and loading."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from codec import Codec, CodecConfig, load_codec, read_audio
from codec.config import QuantizerConfig, SEANetConfig, SpectralConfig

SPECTRAL = CodecConfig(
    spectral=SpectralConfig(
        num_mels=20, encoder_width=16, encoder_depths=(1, 1, 1), dimension=8,
        decoder_width=16, decoder_depths=(1, 1, 1),
    ),
    quantizer=QuantizerConfig(num_codebooks=3, codebook_size=16),
)  # fmt: skip
SEANET = CodecConfig(
    family="seanet",
    seanet=SEANetConfig(
        num_filters=4, strides=(8, 5, 4), dimension=8, semantic_dimension=6, activation="snake",
        num_residual_layers=2, num_lstm_layers=1,
    ),
    quantizer=QuantizerConfig(num_codebooks=3, codebook_size=16),
)  # fmt: skip


@pytest.fixture(params=[SPECTRAL, SEANET], ids=["spectral", "seanet"])
def codec(request, write_wav, tmp_path) -> Codec:
    """Random networks with codebooks made from 12 s of something like speech."""
    torch.manual_seed(0)
    codec = Codec(request.param).train()
    wave = read_audio(write_wav(tmp_path / "train.wav", 12.0), 16_000)
    codec(torch.from_numpy(wave)[None, None])
    return codec.eval()


@pytest.fixture
def speech(write_wav, tmp_path) -> torch.Tensor:
    wave = read_audio(write_wav(tmp_path / "a.wav", 2.0, seed=3), 16_000)
    return torch.from_numpy(wave)[None, None]


def test_lengths_of_any_input(codec: Codec, speech) -> None:
    for size in (1, 2, 159, 160, 161, 639, 640, 641, 12_345):
        codes, lengths = codec.encode(speech[..., :size])
        frames = -(-size // codec.hop_length)
        assert codes.shape == (1, 3, frames)
        assert codes.dtype == torch.int64
        assert lengths.tolist() == [frames]
        assert codec.decode(codes).shape == (1, 1, frames * codec.hop_length)


def test_padded_batch_equals_single_items(codec: Codec, speech) -> None:
    sizes = torch.tensor([32_000, 20_001, 641, 1])
    batch = speech.repeat(4, 1, 1)
    codes, lengths = codec.encode(batch, sizes)
    waves = codec.decode(codes, lengths)
    for item, size in enumerate(sizes):
        alone = codec.encode(speech[..., :size]).codes
        frames = alone.shape[-1]
        assert torch.equal(codes[item, :, :frames], alone[0])
        samples = frames * codec.hop_length
        torch.testing.assert_close(
            waves[item, :, :samples], codec.decode(alone)[0], atol=1e-5, rtol=0
        )


def test_any_number_of_first_codebooks(codec: Codec, speech) -> None:
    codes = codec.encode(speech).codes
    assert torch.equal(codec.encode(speech, num_codebooks=2).codes, codes[:, :2])
    waves = [codec.decode(codes[:, :count]) for count in (1, 2, 3)]
    assert not torch.equal(waves[0], waves[2])
    with pytest.raises(ValueError, match="between 1 and 3"):
        codec.encode(speech, num_codebooks=4)


def test_any_stretch_of_codebooks(codec: Codec, speech) -> None:
    codes = codec.encode(speech, first_codebook=1, num_codebooks=2).codes
    with torch.inference_mode():
        latent = codec.encoder(speech)
        expected = codec.quantizer.codebooks[1].nearest(latent[0].T)
    assert codes.shape[1] == 2
    assert torch.equal(codes[0, 0], expected)
    assert torch.equal(codec.encode(speech, first_codebook=1).codes, codes)
    blocks = np.split(speech[0, 0].numpy(), [7_001, 20_000])
    streamed = codec.encode_stream(blocks, num_codebooks=2, first_codebook=1)
    np.testing.assert_array_equal(streamed, codes[0])

    with torch.inference_mode():
        books = codec.quantizer.codebooks[1:]
        entries = [book.lookup(row) for book, row in zip(books, codes[0], strict=True)]
        wave = codec.decoder((entries[0] + entries[1]).T[None])
    decoded = codec.decode(codes, first_codebook=1)
    torch.testing.assert_close(decoded, wave, atol=1e-6, rtol=0)
    assert not torch.equal(decoded, codec.decode(codes))
    chunks = np.concatenate(list(codec.decode_stream(codes[0].numpy(), first_codebook=1)))
    np.testing.assert_array_equal(chunks, decoded[0, 0])


def test_the_decoder_input_is_the_sum_of_entries(codec: Codec, speech) -> None:
    codes = codec.encode(speech).codes
    pairs = zip(codec.entries(), codes[0], strict=True)
    with torch.inference_mode():
        wave = codec.decoder(sum(entries[row] for entries, row in pairs).T[None])
    torch.testing.assert_close(codec.decode(codes), wave, atol=1e-6, rtol=0)


def test_codebooks_that_are_not_there(codec: Codec, speech) -> None:
    codes = codec.encode(speech).codes
    for first in (-1, 3):
        with pytest.raises(ValueError, match="first_codebook must lie between 0 and 2"):
            codec.encode(speech, first_codebook=first)
        with pytest.raises(ValueError, match="first_codebook must lie between 0 and 2"):
            codec.decode(codes[:, :1], first_codebook=first)
    for count in (0, 3):
        with pytest.raises(ValueError, match="between 1 and 2 from first_codebook 1 on"):
            codec.encode(speech, num_codebooks=count, first_codebook=1)
    with pytest.raises(ValueError, match="between 1 and 2 from first_codebook 1 on"):
        codec.encode_stream([speech[0, 0].numpy()], num_codebooks=3, first_codebook=1)
    with pytest.raises(ValueError, match="1 to 2 codebooks"):
        codec.decode(codes, first_codebook=1)
    with pytest.raises(ValueError, match="1 to 1 codebooks"):
        next(codec.decode_stream(codes[0, :2].numpy(), first_codebook=2))


def test_long_recordings_in_chunks(codec: Codec, write_wav, tmp_path) -> None:
    """Chunks with context against one pass: equal for the frame-rate family (1 s receptive field);
    SEANet's LSTM has a larger one, and less than 2 % of its codes change."""
    wave = read_audio(write_wav(tmp_path / "long.wav", 75.3, seed=5), 16_000)
    speech = torch.from_numpy(wave)[None, None]
    with torch.inference_mode():
        full = codec.quantizer.encode(codec.encoder(speech))
        wave = codec.decoder(codec.quantizer.decode(full))
    chunks = codec.encode(speech).codes
    assert chunks.shape == full.shape
    mismatch = (chunks != full).float().mean()
    assert mismatch <= (0.0 if codec.config.family == "spectral" else 0.02)
    error = (codec.decode(full) - wave).abs().max() / wave.abs().max()
    assert error <= (1e-4 if codec.config.family == "spectral" else 0.05)


def test_a_saved_codec_is_loaded_unchanged(codec: Codec, speech, tmp_path, capfd) -> None:
    codec.save_pretrained(tmp_path / "codec")
    again = load_codec(tmp_path / "codec")
    assert capfd.readouterr().out == ""
    assert again.config == codec.config
    assert again.stamp.digest == codec.stamp.digest
    assert not again.training
    assert torch.equal(again.encode(speech).codes, codec.encode(speech).codes)
    assert json.loads((tmp_path / "codec" / "config.json").read_text())["sample_rate"] == 16_000
    with torch.no_grad():
        next(again.parameters()).add_(1e-3)
    assert again.stamp.digest != codec.stamp.digest


def test_loaded_codecs_are_folded_and_keep_their_stamp(codec: Codec, speech, tmp_path) -> None:
    codec.save_pretrained(tmp_path / "codec")
    full, folded = Codec.from_pretrained(str(tmp_path / "codec")), load_codec(tmp_path / "codec")
    normed = codec.config.family == "seanet"
    assert any("parametrizations" in name for name in full.state_dict()) == normed
    assert not any("parametrizations" in name for name in folded.state_dict())
    assert folded.stamp == full.stamp
    codes = full.encode(speech).codes
    assert torch.equal(folded.encode(speech).codes, codes)
    torch.testing.assert_close(folded.decode(codes), full.decode(codes), atol=1e-5, rtol=0)

    if normed:
        with pytest.raises(ValueError, match=r"load_codec\(\.\.\., fold=False\) to train it"):
            folded.train()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folded_codec_is_not_saved_and_the_unfolded_one_is_saved_unchanged(tmp_path) -> None:
    Codec(SEANET).save_pretrained(tmp_path / "codec")
    before = contents(tmp_path / "codec")
    folded = load_codec(tmp_path / "codec")
    for name in ("copy", "codec"):
        with pytest.raises(ValueError, match=r"from_pretrained or .*fold=False\) to save it"):
            folded.save_pretrained(tmp_path / name)
    assert not (tmp_path / "copy").exists()
    load_codec(tmp_path / "codec", fold=False).save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "codec") == before


def test_a_codec_without_weight_norm_is_saved_after_folding(tmp_path) -> None:
    Codec(SPECTRAL).save_pretrained(tmp_path / "codec")
    load_codec(tmp_path / "codec").save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "codec")


def test_folding_ends_training_mode() -> None:
    codec = Codec(SEANET).train().fold_weight_norm()
    assert not any(module.training for module in codec.modules())


def test_broken_folders_are_named(codec: Codec, tmp_path) -> None:
    codec.save_pretrained(tmp_path / "good")
    weights = load_file(tmp_path / "good" / "model.safetensors")
    name = (
        "decoder.conv_out.conv.bias"
        if "decoder.conv_out.conv.bias" in weights
        else "decoder.head.bias"
    )

    def damaged(**change) -> str:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        if "weights" in change:
            save_file(change["weights"], folder / "model.safetensors")
        if "config" in change:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **change["config"]}))
        if "truncate" in change:
            full = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(full[: len(full) // 2])
        for gone in change.get("without", ()):
            (folder / gone).unlink()
        with pytest.raises(ValueError, match="bad") as caught:
            load_codec(folder)
        return str(caught.value)

    assert f"{name} is missing" in damaged(
        weights={key: value for key, value in weights.items() if key != name}
    )
    assert "has shape (99,)" in damaged(weights={**weights, name: torch.zeros(99)})
    assert r"unknown tensor 'x\n'" in damaged(weights={**weights, "x\n": torch.zeros(1)})
    assert "not a complete safetensors file" in damaged(truncate=True)
    assert "unknown key 'colour'" in damaged(config={"colour": "red"})
    assert "family" in damaged(config={"family": "organ"})
    assert "sample_rate" in damaged(config={"sample_rate": "fast"})
    many = {"num_codebooks": 2**40, "codebook_size": 8}
    assert "at most 1024" in damaged(config={"quantizer": many})
    many["num_codebooks"] = 1024
    assert "asks for more tensors than its weights have" in damaged(config={"quantizer": many})
    large = {"num_codebooks": 3, "codebook_size": 8, "codebook_dimension": 2**62}
    assert "config.json" in damaged(config={"quantizer": large})
    not_a_number = torch.full_like(weights[name], float("nan"))
    assert f"{name} has NaN" in damaged(weights={**weights, name: not_a_number})
    assert "no such file" in damaged(without=["model.safetensors"])
    assert "no config.json" in damaged(without=["config.json"])
    (tmp_path / "bad" / "config.json").write_text('{"family": "spec')
    with pytest.raises(ValueError, match=r"bad/config.json: corrupted file \(not a JSON object\)"):
        load_codec(tmp_path / "bad")


def test_digests_of_codecs_stay_what_they_were() -> None:
    """Token shards on disk store them. The tensors do not depend on a random generator."""
    codec = Codec(SPECTRAL)
    for tensor in codec.state_dict().values():
        values = torch.arange(tensor.numel()).reshape(tensor.shape) % 17
        tensor.copy_(values / 16 if tensor.is_floating_point() else values)
    assert codec.stamp.digest == "c174650dde6ef215"


def test_devices_that_are_not_there(tiny_codec_folder) -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
            load_codec(tiny_codec_folder, device=device)


def test_a_name_that_is_nowhere(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path / "nothing here"), "some/codec"):
        with pytest.raises(ValueError, match="no such folder"):
            load_codec(name)
