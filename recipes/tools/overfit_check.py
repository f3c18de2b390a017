"""How much of its training a voice knows by heart: `python recipes/tools/overfit_check.py
key=value`.

Greedily, from an item's text and its first seconds: the share of codebook 1 that the AR gives back,
and of the other codebooks that the NAR gives back from the true first one; and the WER of the
model's own transcripts. Prints one JSON line.
"""

import json
import logging
from dataclasses import dataclass, replace

import numpy as np
import torch

from codec.tokens import TokenShard
from eval.text import wer
from recipes.lib.run import load_config, run_program
from slm.data.sequences import Prompt
from slm.generation.sampling import Request, first_codes, generate, speech_only
from slm.voice import Voice

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class OverfitCheckConfig:
    """A voice and what it was trained on."""

    voice: str = "out/overfit/tts/voice"
    """Folder of the voice."""
    tokens: str = "out/smoke/tokens/train"
    """The token shards of its training."""
    num_items: int = 20
    """The first so many."""
    prompt_seconds: float = 1.0
    """How much of an item's beginning is given; at most half of it."""


def main(argv: list[str]) -> None:
    config = load_config(OverfitCheckConfig, argv, "Say what a voice knows by heart.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    voice = Voice.from_pretrained(config.voice, device=device)
    voice.sampling = replace(voice.sampling, greedy=True, max_attempts=1)
    shard = TokenShard.open(config.tokens, expect=voice.codec.stamp)
    rows = [shard[i] for i in range(len(shard)) if shard.texts[i].strip()][: config.num_items]
    codes = [row.codes.astype(np.int64) for row in rows]
    most = round(config.prompt_seconds * voice.codec.frame_rate)
    starts = [min(most, one.shape[1] // 2) for one in codes]
    texts = [row.text for row in rows]
    result = {
        "items": len(rows),
        "ar_share": share_of_equal(
            _spoken(voice, texts, codes, starts), codes, starts, slice(0, 1)
        ),
        "asr_wer": wer(texts, voice.transcribe([one[0] for one in codes])),
    }
    if voice.nar is not None:
        prompts = [one[:, :start] for one, start in zip(codes, starts, strict=True)]
        first = [one[0, start:] for one, start in zip(codes, starts, strict=True)]
        filled = voice.nar.decode(texts, prompts, first)
        result["nar_share"] = share_of_equal(filled, codes, starts, slice(1, None))
    print(json.dumps(result))


def _spoken(
    voice: Voice, texts: list[str], codes: list[np.ndarray], starts: list[int]
) -> list[np.ndarray]:
    """Codebook 1 behind each beginning, (1, T)."""
    utterances = [
        voice.prepare(text, Prompt(codes=one[:, :start], text="", continuation=True))
        for text, one, start in zip(texts, codes, starts, strict=True)
    ]
    requests = [
        Request(context=one.context, min_tokens=one.bounds[0], max_tokens=one.bounds[1], seed=0)
        for one in utterances
    ]
    made = generate(voice.lm, requests, speech_only(voice.lm, voice.sampling), voice.sampling)
    return [first_codes(voice.lm, one)[None] for one in made]


def share_of_equal(
    made: list[np.ndarray], codes: list[np.ndarray], starts: list[int], books: slice
) -> float:
    """Equal codes over all: what is missing or too much counts as wrong."""
    equal = total = 0
    for one, true, start in zip(made, codes, starts, strict=True):
        target = true[books, start:]
        ours = one if books.start == 0 else one[books]
        length = min(ours.shape[1], target.shape[1])
        equal += int((ours[:, :length] == target[:, :length]).sum())
        total += target.shape[0] * max(ours.shape[1], target.shape[1])
    return equal / total


if __name__ == "__main__":
    run_program(main)
