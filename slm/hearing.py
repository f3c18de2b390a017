"""From recordings to codes, and from codebook 1 to what they say, for a batch."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from slm.ar import SpeechLM
from slm.config import SamplingConfig
from slm.generate import Request, generate, restrict_context, text_bound, text_only
from slm.prompts import asr_context

logger = logging.getLogger(__name__)


class Transcript(NamedTuple):
    """What a recording says."""

    text: str
    failure: str | None
    """None, or what is wrong with it after the last try: empty, loop or cut."""


@torch.inference_mode()
def encode(codec: Any, waves: Sequence[Float[np.ndarray, " _"]]) -> list[Int[np.ndarray, "Q _"]]:
    """Codes (Q, T) of each wave."""
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = torch.zeros(len(waves), 1, int(lengths.max()))
    for row, wave in enumerate(waves):
        batch[row, 0, : len(wave)] = torch.from_numpy(np.ascontiguousarray(wave, np.float32))
    codes = codec.encode(batch.to(codec.device), lengths.to(codec.device))
    return [
        item[:, :length].cpu().numpy()
        for item, length in zip(codes.codes, codes.lengths.tolist(), strict=True)
    ]


def hear(
    lm: SpeechLM, first: Sequence[Int[np.ndarray, " _"]], sampling: SamplingConfig
) -> list[Transcript]:
    """Transcripts of codes of codebook 1, each (T,), the likeliest token always taken."""
    lm.check_task("asr")
    alphabet, rate = lm.alphabet, lm.vocabulary.codec.frame_rate
    requests = []
    for codes in first:
        context = asr_context(alphabet.vocabulary, alphabet.speech_ids("asr", codes))
        most = text_bound(len(codes), rate)
        most = restrict_context(lm.max_positions, context, 1, most, "recording")
        requests.append(Request(context=context, min_tokens=0, max_tokens=most, seed=0))
    made = generate(lm, requests, text_only(lm), replace(sampling, greedy=True))
    failed = [one.failure for one in made if one.failure is not None]
    if failed:
        logger.warning("%d of %d transcripts failed: %s", len(failed), len(made), ", ".join(failed))
    return [Transcript(alphabet.text_of(one.tokens), one.failure) for one in made]
