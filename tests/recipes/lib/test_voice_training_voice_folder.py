"""recipes/lib/voice_training.py: a part of a voice is whole, or as it was."""

import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_slm import save_shard

from codec.tokens import TokenShard
from recipes.lib.voice_training import described, short_path, whole_folder


@pytest.mark.parametrize("limit", [None, 20_000], ids=["failing writer", "full disk"])
def test_a_voice_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, limit: int | None
) -> None:
    folder = tmp_path / "voice" / "nar"
    with whole_folder(folder) as partial:
        (partial / "kept").write_text("whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write() -> None:
        with whole_folder(folder) as partial:
            (partial / "torn").write_text("half")
            if limit is None:
                raise SafetensorError("I/O error: No space left on device (os error 28)")
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            save_file({"weight": torch.zeros(100_000)}, partial / "model.safetensors")

    try:
        with pytest.raises(OSError, match="nar: cannot be written"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in folder.parent.iterdir()] == ["nar"]
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with whole_folder(folder) as partial:
        (partial / "new").write_text("whole")
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_data_are_told_by_what_they_hold_and_not_by_where_they_lie(tmp_path: Path) -> None:
    one, same, other = (
        described(TokenShard.open(save_shard(tmp_path / name / "train.parquet", 4, seed=seed)), "t")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == same != other
    assert one.endswith(" 4 utterances, 0.00 hours")
    assert short_path("out/small/tokens/train") == "out/small/tokens/train"
    assert short_path("/srv/people/ann/tokens/train") == "tokens/train"
    assert short_path("/train") == "train"
