"""recipes/lib/voice_training.py: a description of token shards."""

from pathlib import Path

from tiny_slm import save_shard

from codec.tokens import TokenShard
from recipes.lib.voice_training import described, short_path


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
