"""From what is to be said to a wave: the AR, the NAR and the codec's decoder, for a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from slm.ar import SpeechLM
from slm.config import SamplingConfig
from slm.generate import Request, first_codes, generate, speech_only
from slm.nar import NAR
from slm.prompts import Coverage, Prompt, join_texts

SILENCE_RMS = 1e-4


@runtime_checkable
class Decoder(Protocol):
    """What speaking needs of a codec."""

    sample_rate: int
    hop_length: int

    @property
    def device(self) -> torch.device: ...

    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor: ...


class Models(NamedTuple):
    """What a voice is made of."""

    codec: Any
    """`codec.SpeechCodec`."""
    lm: SpeechLM
    nar: NAR | None
    coverage: Coverage


@dataclass(frozen=True, kw_only=True, slots=True)
class Utterance:
    """What is to be said, checked and encoded: `Voice.prepare` makes it."""

    text: str
    prompt: Prompt
    context: list[int]
    """What the AR goes on from."""
    bounds: tuple[int, int]
    """Least and most frames."""
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Speech:
    """What was said: the new part alone."""

    wave: np.ndarray
    """(S,) float32 at the codec's sample rate."""
    codes: np.ndarray
    """(Q, T)."""
    text: str
    prompt_text: str
    failure: str | None
    """None, or what is wrong with it after the last try: empty, loop or cut."""
    tries: int
    seed: int
    sample_rate: int


def speak(
    models: Models, utterances: Sequence[Utterance], sampling: SamplingConfig
) -> list[Speech]:
    """What was said of each utterance; a failure's name stands in it."""
    lm, codec = models.lm, models.codec
    requests = [
        Request(
            context=one.context,
            min_tokens=one.bounds[0],
            max_tokens=one.bounds[1],
            seed=one.seed,
        )
        for one in utterances
    ]
    made = generate(lm, requests, speech_only(lm, sampling), sampling)
    first = [first_codes(lm, one) for one in made]
    codes = complete(models.nar, utterances, first)
    speeches = []
    for one, result, new in zip(utterances, made, codes, strict=True):
        wave = decode(codec, one.prompt.codes, new)
        silent = wave.size == 0 or float(np.sqrt(np.mean(wave**2))) < SILENCE_RMS
        speeches.append(
            Speech(
                wave=wave,
                codes=new,
                text=one.text,
                prompt_text=one.prompt.text,
                failure="empty" if silent else result.failure,
                tries=result.tries,
                seed=result.seed,
                sample_rate=codec.sample_rate,
            )
        )
    return speeches


def complete(
    nar: NAR | None, utterances: Sequence[Utterance], first: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Codes (Q, T) of the new parts from their codebook 1."""
    if nar is None:
        return [row[None] for row in first]
    texts = [join_texts(one.prompt.text, one.text) for one in utterances]
    return nar.decode(texts, [one.prompt.codes for one in utterances], first)


@torch.inference_mode()
def decode(codec: Decoder, prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The wave of the new part. The prompt is decoded before it, so that it starts clean."""
    joined = np.concatenate([prompt, new], axis=1).astype(np.int64)
    if joined.shape[1] == 0:
        return np.zeros(0, np.float32)
    wave = codec.decode(torch.from_numpy(joined)[None].to(codec.device))
    return wave[0, 0, prompt.shape[1] * codec.hop_length :].float().cpu().numpy()
