"""recipes/offline/debian_prompts.py."""

from pathlib import Path

import pytest

from recipes.offline import debian_prompts
from recipes.offline.debian_prompts import PACKAGES, fetch_packages, find_packages
from recipes.prepare_data import main


def test_missing_package_lists_are_replaced_by_private_ones(
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
    monkeypatch.setattr(debian_prompts, "run_command", apt)
    monkeypatch.setattr(debian_prompts.shutil, "which", lambda name: name)
    (tmp_path / "temporary").mkdir()
    found = fetch_packages(PACKAGES, Path("temporary"))
    assert [path.name for path in found] == [f"{package}_1_all.deb" for package in PACKAGES]
    assert [command.split()[-1] for command in commands] == [PACKAGES[1], "update", PACKAGES[1]]
    assert f"Dir::State::Lists={tmp_path}/temporary/lists" in commands[1]
    assert (tmp_path / "temporary" / "lists" / "partial").is_dir()


def test_missing_apt_is_an_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian_prompts.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"no apt-get.*use other data"):
        main(["prompts", "--out", str(tmp_path / "out")])


def test_newest_package_is_taken(tmp_path: Path) -> None:
    for version in (1, 2):
        (tmp_path / f"a_{version}_all.deb").touch()
    assert [one.name for one in find_packages(["a"], tmp_path)] == ["a_2_all.deb"]
    with pytest.raises(ValueError, match=r"holds no b_\*\.deb"):
        find_packages(["a", "b"], tmp_path)


def test_failed_command_is_an_error() -> None:
    with pytest.raises(ConnectionError, match=r"sh failed .*E: no such thing"):
        debian_prompts.run_command(["sh", "-c", "echo 'E: no such thing' >&2; exit 3"])
