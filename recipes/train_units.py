"""Acoustic BPE: finds frequent runs of codes in training tokens, so that sequences are shorter.

python recipes/train_units.py tokens=out/tokens/train dev=out/tokens/dev size=2048 out=out/my.units

Name the file in `ar.speech.bpe_model` of a voice's configuration, and `bpe` in
`ar.speech.asr_form` (ASR), `ar.speech.tts_form` (TTS and continuation) or both. A model that
removes runs gives shorter sequences, but for ASR only: durations are lost.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from codec.tokens import TokenShard
from recipes.lib.run import load_config, run_program
from slm.tokenization.acoustic_bpe import AcousticBPE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitsTrainConfig:
    tokens: Path = Path("out/smoke/tokens/train")
    """Token shards to train on: a file, or a folder of them."""
    dev: Path | None = None
    """Token shards on which lengths are measured as well."""
    out: Path = Path("out/smoke/units.model")
    """The file to write."""
    size: int = 1024
    """Merges: pieces of several codes, beside one piece for each code."""
    remove_runs: bool = False
    """Leave out codes that repeat the one before; durations are lost, so only ASR can use it."""
    most_codes: int = 10_000_000
    """Train on whole utterances, drawn at random, that have no more codes in all: bounds the
    memory, at about 100 bytes a code."""
    seed: int = 0
    """Of that draw."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.most_codes < 1:
            raise ValueError(f"most_codes must be at least 1, got {self.most_codes}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def main(argv: list[str]) -> None:
    config = load_config(UnitsTrainConfig, argv, __doc__ or "")
    train = TokenShard.open(config.tokens)
    dev = None if config.dev is None else TokenShard.open(config.dev, expect=train.stamp)
    for path, shard in ((config.tokens, train), (config.dev, dev)):
        if shard is not None and not shard.num_frames.any():
            raise ValueError(f"{path}: no utterance with codes; export other tokens")
    items = drawn(train, config.most_codes, config.seed)
    logger.info("training on %d of %d utterances", len(items), len(train))
    start = time.monotonic()
    units = AcousticBPE.train(
        first_codes(train, items, "read"), train.stamp, config.size, config.remove_runs
    )
    seconds = time.monotonic() - start
    if units.num_merges < config.size:
        logger.warning("only %d merges were found; give more tokens", units.num_merges)
    units.save(config.out)
    results = {
        "out": str(config.out),
        "codes": units.codebook_size,
        "merges": units.num_merges,
        "remove_runs": units.remove_runs,
        "seconds": round(seconds, 1),
        "train_ratio": round(ratio(units, train, items, "train"), 4),
    }
    if dev is not None:
        results["dev_ratio"] = round(ratio(units, dev, np.arange(len(dev)), "dev"), 4)
    print(json.dumps(results))


def drawn(shard: TokenShard, most_codes: int, seed: int) -> Int[np.ndarray, " N"]:
    """Rows of utterances with no more than `most_codes` frames in all, at least one, in order."""
    order = np.random.default_rng(seed).permutation(len(shard))
    number = int((np.cumsum(shard.num_frames[order]) <= most_codes).sum())
    return np.sort(order[: max(1, number)])


def first_codes(
    shard: TokenShard, items: Int[np.ndarray, " N"], what: str
) -> Iterator[Int[np.ndarray, " T"]]:
    """Codebook 1 of each utterance, with progress."""
    for item in tqdm(items, desc=what, unit="utterance", mininterval=1.0):
        yield shard[int(item)].codes[0].astype(np.int64)


def ratio(units: AcousticBPE, shard: TokenShard, items: Int[np.ndarray, " N"], what: str) -> float:
    """Pieces of these utterances per frame."""
    num_pieces = sum(len(units.encode(codes)) for codes in first_codes(shard, items, what))
    return num_pieces / max(1, int(shard.num_frames[items].sum()))


if __name__ == "__main__":
    run_program(main)
