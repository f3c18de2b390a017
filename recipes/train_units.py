"""Acoustic BPE: merges frequent runs of codebook-1 codes, which shortens the LLM's sequences.

    python recipes/train_units.py tokens=out/tokens/train dev=out/tokens/dev size=2048 \\
        out=out/my.units

Name the file in `ar.speech.bpe_model` of a voice's configuration, and `bpe` in
`ar.speech.asr_form` (ASR), `ar.speech.tts_form` (TTS and continuation) or both. A model with
`remove_runs` gives shorter sequences, but for ASR only: durations are lost.

Not to be confused with the pseudo-labels of recipes/make_units.py, which are k-means clusters of a
teacher's features, for training a codec.
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

from codec.config import at_least
from codec.program import counted
from codec.tokens import TokenShard
from recipes.lib.run import finished, load_config, run_recipe
from slm.tokenization.acoustic_bpe import AcousticBPE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AcousticBPETrainConfig:
    """Tokens and size of one acoustic BPE model."""

    tokens: Path = Path("out/smoke/tokens/train")
    """Token shards to train on: a file, or a folder of them."""
    dev: Path | None = None
    """Token shards on which the compression is measured as well."""
    out: Path = Path("out/smoke/units.model")
    """The file to write."""
    size: int = 1024
    """Number of merges: pieces of several codes, in addition to one piece for each code."""
    remove_runs: bool = False
    """Remove codes that repeat the previous one; durations are lost, so this is for ASR only."""
    most_codes: int = 10_000_000
    """Maximum number of codes to train on, a random sample of utterances: about 100 bytes of memory
    each."""
    seed: int = 0
    """Seed of the sample."""

    def __post_init__(self) -> None:
        at_least(1, size=self.size, most_codes=self.most_codes)
        at_least(0, seed=self.seed)


def main(argv: list[str]) -> None:
    """Trains an acoustic BPE model and measures its compression."""
    config = load_config(AcousticBPETrainConfig, argv, __doc__ or "")
    train = TokenShard.open(config.tokens)
    dev = None if config.dev is None else TokenShard.open(config.dev, expect=train.stamp)
    for path, shard in ((config.tokens, train), (config.dev, dev)):
        if shard is not None and not shard.num_frames.any():
            raise ValueError(f"{path}: no utterance with codes; export other tokens")
    items = sample_utterances(train, config.most_codes, config.seed)
    logger.info("training on %d of %d utterances", len(items), len(train))
    start = time.monotonic()
    bpe = AcousticBPE.train(
        codebook_1_of(train, items, "read"), train.stamp, config.size, config.remove_runs
    )
    seconds = time.monotonic() - start
    if bpe.num_merges < config.size:
        logger.warning("only %d merges were found; give more tokens", bpe.num_merges)
    bpe.save(config.out)
    results = {
        "out": str(config.out),
        "codes": bpe.codebook_size,
        "merges": bpe.num_merges,
        "remove_runs": bpe.remove_runs,
        "seconds": round(seconds, 1),
        "train_ratio": round(pieces_per_frame(bpe, train, items, "train"), 4),
    }
    if dev is not None:
        results["dev_ratio"] = round(pieces_per_frame(bpe, dev, np.arange(len(dev)), "dev"), 4)
    print(json.dumps(results))
    form = "asr_form" if config.remove_runs else "tts_form"
    finished(
        f"acoustic BPE of {counted(bpe.num_merges, 'merge')}, "
        f"{results['train_ratio']} pieces per frame",
        config.out,
        f"accelerate launch recipes/{'asr' if config.remove_runs else 'tts'}.py "
        f"ar.speech.bpe_model={config.out} ar.speech.{form}=bpe ...",
    )


def sample_utterances(shard: TokenShard, max_codes: int, seed: int) -> Int[np.ndarray, " N"]:
    """Returns indices of random utterances, sorted: at least one, and otherwise at most `max_codes`
    frames together."""
    order = np.random.default_rng(seed).permutation(len(shard))
    number = int((np.cumsum(shard.num_frames[order]) <= max_codes).sum())
    return np.sort(order[: max(1, number)])


def codebook_1_of(
    shard: TokenShard, items: Int[np.ndarray, " N"], description: str
) -> Iterator[Int[np.ndarray, " T"]]:
    """Yields the codes of codebook 1 of each utterance, with a progress bar."""
    for item in tqdm(items, desc=description, unit="utterance", mininterval=1.0):
        yield shard[int(item)].codes[0].astype(np.int64)


def pieces_per_frame(
    bpe: AcousticBPE, shard: TokenShard, items: Int[np.ndarray, " N"], description: str
) -> float:
    """Returns the number of BPE pieces of the utterances, divided by their number of frames."""
    num_pieces = sum(len(bpe.encode(codes)) for codes in codebook_1_of(shard, items, description))
    return num_pieces / max(1, int(shard.num_frames[items].sum()))


if __name__ == "__main__":
    run_recipe(main)
