"""Makes clips of a few words, word boundaries and letter probabilities of codes from token shards.

    python recipes/make_clips.py tokens=out/small/tokens/train reader=out/small/semantic/reader \\
        out=out/small/clips

Writes OUT/clips, token shards whose rows are clips of utterances, to train the AR on short texts as
well (`clips=OUT/clips`); OUT/letters.json, the probabilities of letters given each code, which
initialize embeddings of codes from those of letters (`ar.letter_init=OUT/letters.json`); and
OUT/edges.jsonl.gz, the frames between the words of utterances and clips
(`word_boundaries=[OUT/edges.jsonl.gz]`, for ar.text.interleaved). The CTC recognizer `reader`
(recipes/train_semantic.py) must be that of the codec of the tokens.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchaudio.functional import edit_distance
from tqdm import tqdm

from codec.config import at_least
from codec.distillation.ctc_reader import CodeRecognizer, normalize_transcript
from codec.program import counted
from codec.tokens import TokenRow, TokenShard, write_shard
from codec.transcripts import has_words, lowercase_if_all_caps
from recipes.lib.run import finished, load_config, run_recipe
from slm.data.interleaving import write_word_boundaries
from slm.models.ar import Letters

logger = logging.getLogger(__name__)

NUM_CHECKED = 100
"""Number of utterances whose error rate is checked first."""
MAX_CHECKED = 30.0
"""Maximum length of these in seconds: the time of an edit distance is quadratic in the length."""
MAX_CER = 0.8
"""A recognizer of other codes exceeds this character error rate: it is close to guessing."""
MIN_WORD, MAX_WORD = 0.08, 1.5
"""Bounds of a clip's mean word length in seconds; others have a wrong text or a long silence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipsConfig:
    """One set of clips."""

    tokens: str = "out/smoke/tokens/train"
    """Token shards of utterances."""
    reader: str = "out/smoke/semantic/reader"
    """Folder of the CTC recognizer of their codec's codes."""
    out: Path = Path("out/smoke/clips")
    """Folder for clips/, letters.json and edges.jsonl.gz."""
    max_words: int = 8
    """Maximum number of words of a clip; the number is uniformly distributed from 1 on."""
    seed: int = 0
    """Seed of the lengths of clips."""

    def __post_init__(self) -> None:
        at_least(1, max_words=self.max_words)
        at_least(0, seed=self.seed)


class Clip(NamedTuple):
    """Words [first, last) of an utterance, in frames [start, stop)."""

    first: int
    last: int
    start: int
    stop: int


@dataclass(slots=True)
class Clips:
    """Clips and word boundaries of utterances, and the numbers of those that were left out."""

    rows: list[TokenRow] = field(default_factory=list)
    boundaries: dict[str, list[int]] = field(default_factory=dict)
    """By id of an utterance or clip: frames between its words, from 0 to its number of frames."""
    num_unspelled: int = 0
    """Utterances whose transcripts cannot be aligned."""
    num_dropped: int = 0
    """Clips without words, or with too short or too long ones."""


def main(argv: list[str]) -> None:
    """Cuts the utterances of token shards into clips."""
    config = load_config(ClipsConfig, argv, __doc__ or "")
    shard, recognizer = TokenShard.open(config.tokens), CodeRecognizer.load(config.reader)
    if len(recognizer.entries) != shard.stamp.codebook_sizes[0]:
        raise ValueError(
            f"{config.reader}: for a codebook of {len(recognizer.entries)} entries, but that of "
            f"{config.tokens} has {shard.stamp.codebook_sizes[0]}; name the reader of their codec"
        )
    cer = check_recognizer(recognizer, shard, config)
    clips = make_clips(recognizer, shard, config)
    if not clips.rows:
        raise ValueError(
            f"{config.tokens}: no clips: the transcripts of {clips.num_unspelled} utterances "
            f"cannot be aligned, {clips.num_dropped} clips are too short or too long for their text"
        )
    codes = (shard[row].codes[0] for row in tqdm(range(len(shard)), desc="letters", unit="utt"))
    Letters(recognizer.letters, recognizer.letter_shares(codes)).save(config.out / "letters.json")
    write_shard(config.out / "clips" / "clips.parquet", clips.rows, shard.stamp)
    write_word_boundaries(config.out / "edges.jsonl.gz", clips.boundaries.items())
    results = {
        "clips": str(config.out / "clips"),
        "letters": str(config.out / "letters.json"),
        "number": len(clips.rows),
        "hours": round(sum(row.duration for row in clips.rows) / 3600, 3),
        "unspelled": clips.num_unspelled,
        "dropped": clips.num_dropped,
        "cer": round(cer, 4),
    }
    print(json.dumps(results))
    finished(
        f"{counted(len(clips.rows), 'clip')} of {counted(len(shard), 'utterance')}",
        config.out,
        f"accelerate launch recipes/tts.py tokens={config.tokens} clips={results['clips']} "
        f"ar.letter_init={results['letters']} ...",
    )


def check_recognizer(recognizer: CodeRecognizer, shard: TokenShard, config: ClipsConfig) -> float:
    """Returns the recognizer's character error rate on the first utterances.

    Raises:
        ValueError: it exceeds MAX_CER, as for codes of another codec.
    """
    errors = letters = 0
    short = np.flatnonzero(shard.durations <= MAX_CHECKED)[:NUM_CHECKED].tolist()
    for row in short:
        text = normalize_transcript(shard.texts[row])
        errors += edit_distance(recognizer.transcribe(shard[row].codes[0]), text)
        letters += len(text)
    if not letters or errors / letters > MAX_CER:
        raise ValueError(
            f"{config.reader} does not recognize the codes of {config.tokens} (CER "
            f"{errors / max(1, letters):.0%} on the first utterances); name the reader of their "
            f"codec, {shard.stamp.id}"
        )
    return errors / letters


def make_clips(recognizer: CodeRecognizer, shard: TokenShard, config: ClipsConfig) -> Clips:
    """Returns clips that divide each utterance at random word boundaries (forced alignment)."""
    clips = Clips()
    rate = shard.stamp.frame_rate
    for index in tqdm(range(len(shard)), desc="clips", unit="utt"):
        row = shard[index]
        text = lowercase_if_all_caps(row.text)
        words = text.split()
        try:
            boundaries = recognizer.word_boundaries(row.codes[0], text)
        except ValueError as error:
            clips.num_unspelled += 1
            logger.debug("%s: %s", row.id, error)
            continue
        clips.boundaries[row.id] = boundaries
        random = np.random.default_rng((config.seed, index))
        for clip in cut(boundaries, config.max_words, random):
            seconds = (clip.stop - clip.start) / rate
            clip_text = " ".join(words[clip.first : clip.last])
            plausible = MIN_WORD <= seconds / (clip.last - clip.first) <= MAX_WORD
            if not plausible or not has_words(clip_text):
                clips.num_dropped += 1
                continue
            name = f"{row.id}#{clip.first}-{clip.last}"
            clips.boundaries[name] = [
                frame - clip.start for frame in boundaries[clip.first : clip.last + 1]
            ]
            codes = row.codes[:, clip.start : clip.stop]
            clips.rows.append(row._replace(id=name, text=clip_text, duration=seconds, codes=codes))
    return clips


def cut(boundaries: list[int], max_words: int, random: np.random.Generator) -> Iterator[Clip]:
    """Yields consecutive clips of 1 to `max_words` words that cover an utterance.

    Args:
        boundaries: frames between the words, from 0 to the number of frames.
    """
    first, words = 0, len(boundaries) - 1
    while first < words:
        last = min(words, first + int(random.integers(1, max_words + 1)))
        yield Clip(first, last, boundaries[first], boundaries[last])
        first = last


if __name__ == "__main__":
    run_recipe(main)
