"""load_codec: which codec a folder holds. What is wrong with a folder is in test_model.py."""

import json
import sys
from pathlib import Path

import pytest
from tiny_baselines import save_baseline

from codec import Codec, SpeechCodec, load_codec
from codec.baselines import DacBaseline


def test_ours_and_others(tmp_path: Path, tiny_codec_folder: Path) -> None:
    ours, other = load_codec(tiny_codec_folder), load_codec(save_baseline(tmp_path, "dac"))
    assert isinstance(ours, Codec)
    assert isinstance(other, DacBaseline)
    assert all(isinstance(codec, SpeechCodec) for codec in (ours, other))
    assert load_codec(tiny_codec_folder, fold=False).train().training


def test_ours_need_no_transformers(
    tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("transformers", "codec.baselines"):
        monkeypatch.setitem(sys.modules, name, None)  # Importing it fails.
    assert isinstance(load_codec(tiny_codec_folder), Codec)


def test_another_model_is_no_codec(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    with pytest.raises(ValueError, match=r"type hubert is no codec.*encodec, dac, mimi, xcodec2"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    with pytest.raises(ValueError, match="cannot be loaded as a codec"):
        load_codec(tmp_path)
