"""Debian packages without root."""

from pathlib import Path

import pytest

from recipes.offline import debian_prompts as debian
from recipes.offline.debian_prompts import PACKAGES, fetch_packages, find_packages
from recipes.prepare_data import main


def test_without_package_lists_apt_gets_lists_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []

    def apt(command: list[str], folder: Path) -> None:
        commands.append(" ".join(command))
        if len(commands) == 1:
            raise ConnectionError("E: Unable to locate package")
        for package in PACKAGES:
            (folder / f"{package}_1_all.deb").touch()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(debian, "run_command", apt)
    monkeypatch.setattr(debian.shutil, "which", lambda name: name)
    (tmp_path / "temporary").mkdir()
    found = fetch_packages(PACKAGES, Path("temporary"))
    assert [path.name for path in found] == [f"{package}_1_all.deb" for package in PACKAGES]
    assert [command.split()[-1] for command in commands] == [PACKAGES[1], "update", PACKAGES[1]]
    assert f"Dir::State::Lists={tmp_path}/temporary/lists" in commands[1]
    assert (tmp_path / "temporary" / "lists" / "partial").is_dir()


def test_without_apt_the_message_names_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"no apt-get.*data of your own"):
        main(["prompts", "--out", str(tmp_path / "out")])


def test_the_newest_of_several_is_taken(tmp_path: Path) -> None:
    for version in (1, 2):
        (tmp_path / f"a_{version}_all.deb").touch()
    assert [one.name for one in find_packages(["a"], tmp_path)] == ["a_2_all.deb"]
    with pytest.raises(ValueError, match=r"holds no b_\*\.deb"):
        find_packages(["a", "b"], tmp_path)


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(ConnectionError, match=r"sh failed .*E: no such thing"):
        debian.run_command(["sh", "-c", "echo 'E: no such thing' >&2; exit 3"])
