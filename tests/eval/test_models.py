import hashlib
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from eval import models
from eval.models import find_model, weights_digest


def test_a_folder_is_named_and_its_weights_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    folder.mkdir()
    for name in ("pytorch_model.bin", "model-2.safetensors", "model-1.safetensors", "config.json"):
        (folder / name).write_text(name)
    found = find_model(folder, "remedy")
    assert [file.name for file in found.weights] == ["model-1.safetensors", "model-2.safetensors"]
    label = found.label
    assert label == f"judge@{weights_digest(found.weights)}"
    (folder / "model-2.safetensors").write_text("other")
    assert found.label != label


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty", "empty: holds no weights .*; take that one$"),
        ("a/b/c", "a/b/c: no such folder; take that one$"),
        ("empty/model", "empty/model: no such folder; take that one$"),
        ("not an id", r"not an id: no such folder, nor a hub id \(owner/name\); take"),
        ("owner/model", "cannot be reached .* hf download owner/model --local-dir DIR, .*that one"),
    ],
)
def test_a_model_that_cannot_be_had(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, **_: object) -> str:
        huggingface_hub.utils.validate_repo_id(name)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        find_model(source, "take that one")


def test_a_hub_model_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(_name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if "pytorch_model*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").write_text("weights")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = find_model("owner/model", "")
    assert (found.name, found.folder) == ("owner/model", tmp_path)
    assert [file.name for file in found.weights] == ["pytorch_model.bin"]
    assert "model.safetensors" in asked[0]
    find_model("owner/model", "")
    assert len(asked) == 3  # Their safetensors would have been enough.


def test_digests_of_small_and_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.bin"
    content = bytes(range(256)) * 40
    file.write_bytes(content)
    assert weights_digest([file]) == hashlib.sha256(content).hexdigest()[:16]
    monkeypatch.setattr(models, "FULLY_READ_BYTES", 1000)
    monkeypatch.setattr(models, "NUM_BLOCKS", 5)
    monkeypatch.setattr(models, "BLOCK_BYTES", 100)
    sampled = weights_digest([file])
    assert sampled == weights_digest([file]) != hashlib.sha256(content).hexdigest()[:16]
    middle = content[:5100] + b"x" * 9 + content[5109:]
    for change in (b"x" + content[1:], middle, content[:-1] + b"x", content + b"x"):
        file.write_bytes(change)
        assert weights_digest([file]) != sampled
    file.write_bytes(content[:150] + b"x" + content[151:])  # Between two blocks.
    assert weights_digest([file]) == sampled
