"""codec/weights.py: sizes are refused before memory is allocated."""

import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from codec.weights import (
    build_outline,
    check_layers,
    check_pickled,
    check_sizes,
    stored_shapes,
    weights_of,
)


def test_outlines_have_shapes_and_no_memory() -> None:
    outline = build_outline(lambda: nn.Linear(2**25, 2**20), 2)
    assert outline.weight.is_meta
    assert outline.weight.shape == (2**20, 2**25)
    assert not nn.Linear(2, 2).weight.is_meta


def test_too_many_and_impossible_tensors() -> None:
    with pytest.raises(ValueError, match=r"more tensors than its weights have \(3\)"):
        build_outline(lambda: nn.ModuleList(nn.Linear(1, 1) for _ in range(2**40)), 3)

    def build() -> nn.Module:
        made = nn.Module()
        for number in range(2**40):
            made.register_buffer(str(number), torch.zeros(1))
        return made

    with pytest.raises(ValueError, match="more tensors"):
        build_outline(build, 3)
    with pytest.raises(ValueError, match="impossible sizes"):
        build_outline(lambda: nn.Linear(2**40, 2**40), 3)
    assert len(nn.Sequential(*(nn.Linear(1, 1) for _ in range(99)))) == 99


def test_models_of_other_threads_are_not_counted() -> None:
    def build() -> nn.Module:
        other = threading.Thread(target=lambda: [nn.Linear(1, 1) for _ in range(99)])
        other.start()
        other.join()
        return nn.Linear(1, 1)

    assert build_outline(build, 2).bias.is_meta


def test_sizes_of_a_model_and_of_its_files(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(600, 1000), "b": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert stored_shapes(tmp_path / "model.safetensors") == {"a": (600, 1000), "b": (1,)}
    files = weights_of(tmp_path)
    assert files == [tmp_path / "model.safetensors"]
    check_sizes(lambda: nn.Linear(1000, 2000), files)
    with pytest.raises(ValueError, match="asks for 10000000000 values, but its weights have 2400"):
        check_sizes(lambda: nn.Linear(10**5, 10**5, bias=False), files)
    with pytest.raises(ValueError, match="more tensors"):
        check_sizes(lambda: nn.ModuleList(nn.Linear(1, 1) for _ in range(99)), files)
    check_sizes(lambda: pytest.fail("built"), weights_of(tmp_path / "none"))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    files[0].unlink()
    check_sizes(lambda: nn.ModuleList(nn.Linear(1, 1) for _ in range(99)), weights_of(tmp_path))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete"):
        stored_shapes(file)


def test_numbers_of_layers_are_limited(tmp_path: Path) -> None:
    check_layers(tmp_path)
    for text in ('{"num_hidden_layers": 100, "layers": [1e9]}', '["layers"]', '{"layers": "x"}'):
        (tmp_path / "config.json").write_text(text)
        check_layers(tmp_path)
    for text in ('{"n_layer": 1073741824}', '{"text_config": {"num_hidden_layers": 1e12}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"its n\w+ is 1"):
            check_layers(tmp_path)


def test_tensors_larger_than_their_file_are_refused_before_memory_is_allocated(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.bin"
    torch.save({"generator": {"a": torch.zeros(3, 4)}, "step": [torch.ones(2)]}, file)
    check_pickled(file)
    tied = nn.Parameter(torch.zeros(1000))
    torch.save({"in": tied.detach(), "out": tied.detach(), "part": tied.detach()[1:]}, file)
    check_pickled(file)
    torch.save({"generator": {"a": torch.zeros(3, 4)}, "step": [torch.ones(2)]}, file)
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    # The number of values in the storage of `a`, 12, as pickle writes it in one byte: K, 12.
    changed = parts[pickled].replace(b"K\x0ct", b"\x8a\x05\x00\x00\x00\x00\x01t")
    assert changed != parts[pickled]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, changed if name == pickled else content)
    with pytest.raises(ValueError, match=r"its tensors need 17179869\d+ bytes, but it has \d+"):
        check_pickled(file)
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"a file of torch before 1\.6"):
        check_pickled(file)
