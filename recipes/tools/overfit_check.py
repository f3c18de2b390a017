"""Measures how much of its training set a voice has memorized.

    python recipes/tools/overfit_check.py voice=out/overfit/tts/voice tokens=out/smoke/tokens/train

Greedy decoding from each item's text and first seconds: the share of codebook 1 that the AR
reproduces, the share of the other codebooks that the NAR reproduces from the true codebook 1, and
the WER of the voice's own ASR. Prints one JSON line.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from tqdm import tqdm

from codec.tokens import TokenShard
from eval.text import wer
from recipes.lib.run import load_config, run_recipe
from recipes.scoring.eval_items import EvalItem, codes_of, continuation_items
from slm.generation.sampling import Request, first_codes, generate, speech_only
from slm.voice import Voice

BATCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class OverfitCheckConfig:
    """A voice and its training set."""

    voice: str = "out/overfit/tts/voice"
    """Folder of the voice."""
    tokens: str = "out/smoke/tokens/train"
    """Token shards of the training set."""
    num_items: int = 20
    """Number of items, the first ones."""
    prompt_seconds: float = 1.0
    """Length of the prompt, the item's beginning; at most half of the item."""


def main(argv: list[str]) -> None:
    """Prints the shares of reproduced codes and the WER."""
    config = load_config(OverfitCheckConfig, argv, (__doc__ or "").partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    voice = Voice.from_pretrained(config.voice, device=device)
    voice.sampling = replace(voice.sampling, greedy=True, max_attempts=1)
    shard = TokenShard.open(config.tokens, expect=voice.codec.stamp)
    rows = [shard[i] for i in range(len(shard)) if shard.texts[i].strip()][: config.num_items]
    items = continuation_items(rows, config.prompt_seconds, voice.codec.frame_rate)
    texts = [row.text for row in rows]
    targets = [item.remainder for item in items if item.remainder is not None]
    predicted, transcripts, filled = [], [], []
    for start in tqdm(range(0, len(items), BATCH), "items", unit="batch"):
        part = slice(start, start + BATCH)
        predicted += _greedy_codes(voice, items[part])
        transcripts += voice.transcribe([codes_of(row)[0] for row in rows[part]])
        if voice.nar is not None:
            prompts = [item.prompt.codes for item in items[part]]
            filled += voice.nar.decode(texts[part], prompts, [one[0] for one in targets[part]])
    result = {
        "items": len(rows),
        "ar_share": share_of_equal(predicted, [one[:1] for one in targets]),
        "asr_wer": wer(texts, transcripts),
    }
    if voice.nar is not None:
        result["nar_share"] = share_of_equal(
            [one[1:] for one in filled], [one[1:] for one in targets]
        )
    print(json.dumps(result))


def _greedy_codes(voice: Voice, items: Sequence[EvalItem]) -> list[Int[np.ndarray, "1 T"]]:
    """The AR's codebook 1 after each prompt, as long as it gets."""
    utterances = [voice.prepare(item.text, item.prompt) for item in items]
    requests = [
        Request(context=one.context, min_tokens=one.bounds[0], max_tokens=one.bounds[1], seed=0)
        for one in utterances
    ]
    made = generate(voice.lm, requests, speech_only(voice.lm, voice.sampling), voice.sampling)
    return [first_codes(voice.lm, one)[None] for one in made]


def share_of_equal(
    predictions: Sequence[Int[np.ndarray, "Q _"]], targets: Sequence[Int[np.ndarray, "Q _"]]
) -> float:
    """Returns the share of equal codes; missing and surplus frames count as unequal."""
    equal = total = 0
    for predicted, target in zip(predictions, targets, strict=True):
        length = min(predicted.shape[1], target.shape[1])
        equal += int((predicted[:, :length] == target[:, :length]).sum())
        total += target.shape[0] * max(predicted.shape[1], target.shape[1])
    return equal / total


if __name__ == "__main__":
    run_recipe(main)
