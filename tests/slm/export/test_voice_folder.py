"""slm/export/voice_folder.py: a voice is saved completely or not at all."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_slm import copy_of, quiet, save_voice

from slm.config import SamplingConfig
from slm.export.voice_folder import load_sampling
from slm.voice import Voice

pytestmark = quiet()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> Path:
    return save_voice(tmp_path_factory.mktemp("voices"), tiny_codec_folder)


@pytest.fixture
def voice(folder: Path) -> Voice:
    return Voice.from_pretrained(folder)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_sampling_is_kept(voice: Voice, tmp_path: Path) -> None:
    assert voice.sampling == SamplingConfig()
    voice.sampling = SamplingConfig(temperature=0.7, checks=("loop",), frames_per_token=(1.0, 9.0))
    voice.save_pretrained(tmp_path / "copy")
    assert Voice.from_pretrained(tmp_path / "copy").sampling == voice.sampling


@pytest.mark.parametrize("text", ["{", "[]", '{"temper": 1.0}', '{"temperature": 0.0}'])
def test_damaged_sampling_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sampling.json").write_text(text)
    with pytest.raises(ValueError, match=r"sampling\.json: .*remove it for the defaults"):
        load_sampling(tmp_path)


def test_an_earlier_voice_is_replaced_completely(
    voice: Voice, folder: Path, tmp_path: Path
) -> None:
    other = copy_of(folder, tmp_path)
    (other / "ar" / "model.safetensors").write_bytes(b"whole weights beside adapters")
    voice.prompts["ann"].save(other / "prompts", "stale")
    voice.save_pretrained(other)
    assert files(other) == files(folder) | {"README.md", "sampling.json"}
    assert [path.name for path in other.parent.iterdir()].count(other.name) == 1
    assert not list(other.parent.glob(".*"))
    assert Voice.from_pretrained(other).digest == voice.digest


def test_folders_with_other_contents_are_refused(voice: Voice, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("all of it")
    with pytest.raises(ValueError, match="neither empty nor a voice; name a new folder"):
        voice.save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match="neither empty nor a voice"):
        voice.save_pretrained(tmp_path / "mine" / "thesis")
    assert files(tmp_path) == {"mine/thesis"}
    assert voice.folder is not None
    for apart in (voice.folder.parent, voice.folder / "ar" / "copy"):
        with pytest.raises(ValueError, match="or around it; name another folder"):
            voice.save_pretrained(apart)
    (tmp_path / "empty").mkdir()
    voice.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "codec").is_dir()


@pytest.mark.parametrize("broken", ["prompt", "rename"])
def test_a_failure_leaves_the_earlier_voice(
    voice: Voice, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    other = copy_of(folder, tmp_path)
    (other / "kept").write_text("as it was")
    before, rename = files(other), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("no")
        return rename(path, target)

    def full(*_: object) -> None:
        raise OSError("no")

    if broken == "rename":
        monkeypatch.setattr(Path, "rename", fail)
    else:
        monkeypatch.setattr("slm.data.prompts.Prompt.save", full)
    with pytest.raises(OSError, match="no"):
        voice.save_pretrained(other)
    assert files(other) == before
    assert not list(other.parent.glob(".*"))


def test_the_card_follows_the_prompts_unless_it_was_edited(
    voice: Voice, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    voice.save_pretrained(tmp_path / "copy")
    card = tmp_path / "copy" / "README.md"
    loaded = Voice.from_pretrained(tmp_path / "copy")
    for name in ("bob", "abe"):
        loaded.prompts[name] = replace(loaded.prompts["ann"], credit=f"{name} himself")
        loaded.save_pretrained(tmp_path / "copy")
        assert f"`{name}`: {name} himself" in card.read_text()
    assert not caplog.records
    card.write_text(card.read_text() + "It was trained on my own recordings.\n")
    edited = card.read_text()
    loaded.save_pretrained(tmp_path / "copy")
    assert not caplog.records
    loaded.prompts["eve"] = loaded.prompts["ann"]
    with caplog.at_level(logging.WARNING):
        loaded.save_pretrained(tmp_path / "copy")
    assert card.read_text() == edited
    assert "was edited and is kept" in caplog.text
