"""Codecs in half precision: half the size, codes of their own, and the same ever after."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_lmspt import QUANTIZER, SPECTRAL, made

from codec import Codec, load_codec
from codec.__main__ import main
from codec.models.codec import is_half_precision, save_half_precision, to_half_precision


def noise() -> torch.Tensor:
    return 0.3 * torch.randn(2, 1, 4000, generator=torch.Generator().manual_seed(1))


def test_a_rounded_codec_survives_saving(tmp_path: Path) -> None:
    codec = made(SPECTRAL)
    codec.save_pretrained(tmp_path / "full")
    assert not is_half_precision(codec)
    rounded = to_half_precision(Codec.from_pretrained(tmp_path / "full"))
    assert is_half_precision(rounded)
    assert rounded.stamp.digest != codec.stamp.digest
    save_half_precision(rounded, tmp_path / "half")
    read = Codec.from_pretrained(tmp_path / "half")
    assert read.stamp.digest == rounded.stamp.digest
    assert is_half_precision(read)
    assert read.decoder.head.weight.dtype == torch.float32
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name
    assert torch.equal(read.encode(noise()).codes, rounded.encode(noise()).codes)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert not any(name.endswith("entry_sum") for name in stored)
    assert stored["decoder.head.weight"].dtype == torch.float16
    # Saved in full precision, it has the same float16 values.
    read.save_pretrained(tmp_path / "again")
    assert is_half_precision(Codec.from_pretrained(tmp_path / "again"))
    read.train()(noise())  # It can be trained further.


def test_a_codec_that_is_not_rounded_is_not_saved_in_half_precision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="round it first"):
        save_half_precision(made(SPECTRAL), tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_weights_that_float16_cannot_hold_are_named() -> None:
    codec = made(SPECTRAL)
    with torch.no_grad():
        codec.decoder.head.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"decoder\.head\.weight is too large for float16"):
        to_half_precision(codec)


def test_a_folded_codec_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    codec = made(replace(SPECTRAL, quantizer=QUANTIZER))
    with pytest.raises(ValueError, match="folded"):
        to_half_precision(codec.fold_weight_norm())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made(SPECTRAL).save_pretrained(tmp_path / "full")
    main(["halve", str(tmp_path / "full"), str(tmp_path / "half")])
    printed = json.loads(capsys.readouterr().out)
    codec = load_codec(tmp_path / "half")
    assert printed["codec"]["digest"] == codec.stamp.digest
    assert codec.auxiliary is None
    with pytest.raises(SystemExit):
        main(["halve", str(tmp_path / "full"), str(tmp_path / "half")])
    assert "--overwrite" in capsys.readouterr().err
    sizes = [(tmp_path / one / "model.safetensors").stat().st_size for one in ("full", "half")]
    assert sizes[1] < 0.55 * sizes[0]
