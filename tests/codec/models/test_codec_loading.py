"""load_codec: which codec a folder holds. What is wrong with a folder is in test_model.py."""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from tiny_baselines import save_baseline

from codec import Codec, SpeechCodec, load_codec
from codec.distillation import teachers
from codec.models import codec as loading
from codec.models.hf import DacBaseline


def test_ours_and_others(tmp_path: Path, tiny_codec_folder: Path) -> None:
    ours, other = load_codec(tiny_codec_folder), load_codec(save_baseline(tmp_path, "dac"))
    assert isinstance(ours, Codec)
    assert isinstance(other, DacBaseline)
    assert all(isinstance(codec, SpeechCodec) for codec in (ours, other))
    assert load_codec(tiny_codec_folder, fold=False).train().training


def test_ours_need_no_transformers(
    tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("transformers", "codec.models.hf"):
        monkeypatch.setitem(sys.modules, name, None)  # Importing it fails.
    assert isinstance(load_codec(tiny_codec_folder), Codec)


def test_a_damaged_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"family": "spec')
    monkeypatch.setattr(loading, "hf_hub_download", lambda *_: str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match=r"corrupted file \(not a JSON object\)"):
        load_codec("some/codec")


def test_a_name_in_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "hf_hub_download", None)  # Calling it fails.
    (tmp_path / "models").mkdir()
    start = "no such folder; give a hub id (owner/name) or a folder"
    with pytest.raises(ValueError, match="models/none: no such folder; give a hub id") as caught:
        load_codec("models/none")
    why = " (models is a folder here, so it is not looked up on the hub)"
    assert str(caught.value) == f"models/none: {start}{why}"
    for name in (
        str(tmp_path / "none"),
        "../none",
        "out/smoke/none",
    ):  # These were never meant as hub ids.
        with pytest.raises(ValueError, match="none: no such folder") as caught:
            load_codec(name)
        assert str(caught.value) == f"{name}: {start}"
    with (
        pytest.raises(ValueError, match="models/none: no such folder"),
        teachers.loading("models/none", "speech teacher"),
    ):
        raise AssertionError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (HFValidationError("Repo id must ..."), "that is not a hub id, owner/name"),
        (LocalEntryNotFoundError("no cache"), "it cannot be reached, and the model is not in"),
    ],
)
def test_hub_errors_are_explained_without_class_names(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(loading, "hf_hub_download", fail)
    with pytest.raises(ValueError, match="the hub does not provide it") as caught:
        load_codec("some/codec")
    assert f"({reason}" in str(caught.value)
    assert "Error" not in str(caught.value)


def test_another_model_is_no_codec(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    with pytest.raises(
        ValueError, match=r"type hubert is not a supported codec.*encodec, dac, mimi, xcodec2"
    ):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    with pytest.raises(ValueError, match="cannot be loaded as a codec"):
        load_codec(tmp_path)
