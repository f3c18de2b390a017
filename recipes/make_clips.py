"""Cuts the utterances of token shards into clips of a few words, and says what letters codes say.

    python recipes/make_clips.py tokens=out/small/tokens/train reader=out/small/semantic/reader \\
        out=out/small/clips

OUT/clips holds token shards whose rows are clips: an AR that trains on them too (`clips=OUT/clips`)
learns in short texts what it reads in long ones. OUT/letters.json lets the rows of new codes begin
as their letters' (`ar.letter_init=OUT/letters.json`). OUT/edges.jsonl.gz says between which frames
the words of utterances and clips are said (`edges=[OUT/edges.jsonl.gz]`, for ar.text.interleaved).
The reader (recipes/train_semantic.py) must be the one of the codec that made the tokens.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchaudio.functional import edit_distance
from tqdm import tqdm

from codec.config import at_least
from codec.distillation.ctc_reader import CodeReader, plain
from codec.tokens import TokenRow, TokenShard, write_shard
from recipes.lib.run import load_config, run_program
from slm.data.interleaving import write_edges
from slm.data.sequences import has_words, in_small_letters
from slm.models.ar import Letters

logger = logging.getLogger(__name__)

NUM_CHECKED = 100
"""Utterances that the reader reads first, to see that it knows these codes."""
MAX_CHECKED = 30.0
"""Seconds of the longest of these: an edit distance takes time by the square."""
WORST_CER = 0.8
"""What a reader of other codes exceeds: it does little better than one that guesses."""
MIN_WORD, MAX_WORD = 0.08, 1.5
"""Seconds a word on average; clips outside have a text that is not theirs, or a long silence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipsConfig:
    """One set of clips."""

    tokens: str = "out/smoke/tokens/train"
    """Token shards of whole utterances."""
    reader: str = "out/smoke/semantic/reader"
    """The reader of their codec."""
    out: Path = Path("out/smoke/clips")
    """The folder for clips/ and letters.json."""
    max_words: int = 8
    """A clip has one word to so many, drawn uniformly."""
    seed: int = 0
    """Of those draws."""

    def __post_init__(self) -> None:
        at_least(1, max_words=self.max_words)
        at_least(0, seed=self.seed)


class Clip(NamedTuple):
    """Words [first, last) of an utterance, in frames [start, stop)."""

    first: int
    last: int
    start: int
    stop: int


def main(argv: list[str]) -> None:
    config = load_config(ClipsConfig, argv, __doc__ or "")
    shard, reader = TokenShard.open(config.tokens), CodeReader.load(config.reader)
    if len(reader.entries) != shard.stamp.codebook_sizes[0]:
        raise ValueError(
            f"{config.reader}: reads a codebook of {len(reader.entries)} entries, but that of "
            f"{config.tokens} has {shard.stamp.codebook_sizes[0]}; name the reader of their codec"
        )
    cer = check_reader(reader, shard, config)
    counts = {"unspelled": 0, "dropped": 0}
    edges: dict[str, list[int]] = {}
    rows = list(clips(reader, shard, config, counts, edges))
    if not rows:
        raise ValueError(
            f"{config.tokens}: no utterance could be cut: {counts['unspelled']} have texts that "
            f"cannot be spelt or said in their time, {counts['dropped']} clips are too short or "
            "too long for their words"
        )
    heard = (shard[row].codes[0] for row in tqdm(range(len(shard)), desc="letters", unit="utt"))
    Letters(reader.reader.letters, reader.letter_shares(heard)).save(config.out / "letters.json")
    write_shard(config.out / "clips" / "clips.parquet", rows, shard.stamp)
    write_edges(config.out / "edges.jsonl.gz", edges.items())
    hours = sum(row.duration for row in rows) / 3600
    told = {"clips": str(config.out / "clips"), "letters": str(config.out / "letters.json")}
    sizes = {"number": len(rows), "hours": round(hours, 3), **counts, "cer": round(cer, 4)}
    print(json.dumps(told | sizes))


def check_reader(reader: CodeReader, shard: TokenShard, config: ClipsConfig) -> float:
    """CER of the first utterances. ValueError where the reader can make nothing of them."""
    wrong = letters = 0
    short = np.flatnonzero(shard.durations <= MAX_CHECKED)[:NUM_CHECKED].tolist()
    for row in short:
        text = plain(shard.texts[row])
        wrong += edit_distance(reader.read(shard[row].codes[0]), text)
        letters += len(text)
    if not letters or wrong / letters > WORST_CER:
        raise ValueError(
            f"{config.reader} does not read the codes of {config.tokens} (CER "
            f"{wrong / max(1, letters):.0%} on the first utterances); name the reader of the codec "
            f"that made them, {shard.stamp.id}"
        )
    return wrong / letters


def clips(
    reader: CodeReader, shard: TokenShard, config: ClipsConfig, counts: dict[str, int],
    found: dict[str, list[int]],
) -> Iterator[TokenRow]:  # fmt: skip
    """Each utterance once, cut at random; what cannot be aligned or is no speech is counted.
    `found` gains the edges of the words of utterances and clips."""
    rate = shard.stamp.frame_rate
    for index in tqdm(range(len(shard)), desc="clips", unit="utt"):
        row = shard[index]
        text = in_small_letters(row.text)
        words = text.split()
        try:
            edges = reader.word_edges(row.codes[0], text)
        except ValueError as error:
            counts["unspelled"] += 1
            logger.debug("%s: %s", row.id, error)
            continue
        found[row.id] = edges
        random = np.random.default_rng((config.seed, index))
        for clip in cut(edges, config.max_words, random):
            seconds = (clip.stop - clip.start) / rate
            said = " ".join(words[clip.first : clip.last])
            fits = MIN_WORD <= seconds / (clip.last - clip.first) <= MAX_WORD
            if not fits or not has_words(said):
                counts["dropped"] += 1
                continue
            name = f"{row.id}#{clip.first}-{clip.last}"
            found[name] = [edge - clip.start for edge in edges[clip.first : clip.last + 1]]
            yield row._replace(
                id=name,
                text=said,
                duration=seconds,
                codes=row.codes[:, clip.start : clip.stop],
            )


def cut(edges: list[int], max_words: int, random: np.random.Generator) -> Iterator[Clip]:
    """Clips of one word to `max_words`, one after the other, all of the utterance."""
    first, words = 0, len(edges) - 1
    while first < words:
        last = min(words, first + int(random.integers(1, max_words + 1)))
        yield Clip(first, last, edges[first], edges[last])
        first = last


if __name__ == "__main__":
    run_program(main)
