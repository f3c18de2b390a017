"""From what is to be said to a wave: the AR, the NAR and the codec's decoder, for a batch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from slm.config import SamplingConfig
from slm.data.sequences import NO_FORCED_TOKENS, Coverage, ForcedTokens, Prompt, join_texts
from slm.generation.checks import (
    Failure,
    begins_with_prompt,
    is_early,
    is_empty,
    lacks_end,
    longest_silence,
    repeats_codes,
    severity,
)
from slm.generation.rerank import can_transcribe, text_scores, transcripts
from slm.generation.sampling import Request, first_codes, generate, retry, speech_only
from slm.models.ar import SpeechLM
from slm.models.nar import NAR

logger = logging.getLogger(__name__)


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
    script: ForcedTokens = NO_FORCED_TOKENS
    """Where the AR goes word by word: the words behind the first."""


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
    """None, or what is wrong with the least bad of all tries (slm/generation/checks.py names
    it)."""
    tries: int
    """So many were made."""
    seed: int
    """The one under which this was made."""
    sample_rate: int
    score: float | None = None
    """Where candidates were compared: how well the model's own ASR finds that the speech says the
    text (slm/generation/rerank.py)."""


class Candidate(NamedTuple):
    """What the AR made of an utterance under one seed."""

    first: Int[np.ndarray, " _"]
    """Codebook 1 of the new part."""
    failure: Failure | None
    seed: int
    score: float | None


def speak(
    models: Models, utterances: Sequence[Utterance], sampling: SamplingConfig
) -> list[Speech]:
    """What was said of each utterance, as one batch.

    What fails a check is made again under a new seed, until `sampling.max_attempts` were made; then
    the least bad is returned with its failure's name. Where the model was trained on ASR, the
    checks
    `early` and `leak` also transcribe what passed all others: with a small voice a fifth (one) to a
    half (a batch of four) of the AR's time again.
    Raises ValueError for several candidates and a model without ASR.
    """
    if sampling.num_candidates > 1 and not can_transcribe(models.lm):
        raise ValueError(
            f"sampling.num_candidates is {sampling.num_candidates}: they are compared by the "
            "model's own ASR, but this voice was trained without asr; set it to 1"
        )
    best: list[Speech | None] = [None] * len(utterances)
    for attempt in range(sampling.max_attempts):
        waiting = [i for i, one in enumerate(best) if one is None or one.failure is not None]
        if not waiting:
            break
        made = _try([utterances[i] for i in waiting], models, sampling, attempt)
        for index, speech in zip(waiting, made, strict=True):
            kept = _better(best[index], speech)
            best[index] = replace(kept, tries=attempt + 1)
        failed = sum(one.failure is not None for one in made)
        if failed and sampling.max_attempts > 1:
            logger.info(
                "try %d of %d failed for %d items", attempt + 1, sampling.max_attempts, failed
            )
    return [one for one in best if one is not None]


def _better(before: Speech | None, new: Speech) -> Speech:
    """Of two that may have failed the less bad, the earlier one where they are alike."""
    if before is None or severity(new.failure) < severity(before.failure):
        return new
    return before


def _try(
    utterances: Sequence[Utterance], models: Models, sampling: SamplingConfig, attempt: int
) -> list[Speech]:
    """Every utterance once: its best candidate, or the next ones where only a wave tells that a
    candidate failed."""
    ranked = candidates(models.lm, utterances, sampling, attempt)
    best: list[Speech | None] = [None] * len(utterances)
    unsettled = list(range(len(utterances)))
    for rank in range(sampling.num_candidates):
        made = _finish(
            models,
            [utterances[i] for i in unsettled],
            [ranked[i][rank] for i in unsettled],
            sampling,
        )
        for index, speech in zip(unsettled, made, strict=True):
            best[index] = _better(best[index], speech)
        unsettled = [
            index
            for index, speech in zip(unsettled, made, strict=True)
            if speech.failure is not None
            and rank + 1 < len(ranked[index])
            and ranked[index][rank + 1].failure is None
        ]
        if not unsettled:
            break
    return [one for one in best if one is not None]


def candidates(
    lm: SpeechLM, utterances: Sequence[Utterance], sampling: SamplingConfig, attempt: int = 0
) -> list[list[Candidate]]:
    """`sampling.num_candidates` for each utterance in one batch, the best first: those that did not
    fail, and among them the one whose text the model's own ASR finds the likeliest given the
    speech. The first one's seed is the utterance's own, so that one candidate is the plain call.

    Cost: the AR's work as many times, and one pass of ASR over all (no generation).
    """
    requests = [
        retry(
            Request(
                context=one.context,
                min_tokens=one.bounds[0],
                max_tokens=one.bounds[1],
                seed=one.seed,
                script=one.script,
            ),
            attempt,
            number,
        )
        for one in utterances
        for number in range(sampling.num_candidates)
    ]
    made = generate(lm, requests, speech_only(lm, sampling), replace(sampling, max_attempts=1))
    said = [one for one in utterances for _ in range(sampling.num_candidates)]
    codes = [first_codes(lm, one) for one in made]
    scores: Sequence[float | None] = [None] * len(made)
    if sampling.num_candidates > 1:
        scores = text_scores(lm, [one.text for one in said], _heard(said, codes))
    found = [
        Candidate(row, result.failure or _code_failure(lm, one, row, sampling), result.seed, score)
        for one, result, row, score in zip(said, made, codes, scores, strict=True)
    ]
    count = sampling.num_candidates
    groups = [found[start : start + count] for start in range(0, len(found), count)]
    return [sorted(group, key=_rank) for group in groups]


def _rank(one: Candidate) -> tuple[int, float]:
    return severity(one.failure), 0.0 if one.score is None else -one.score


def _heard(
    utterances: Sequence[Utterance], first: Sequence[np.ndarray]
) -> list[Int[np.ndarray, " _"]]:
    """What the texts are the transcripts of: a continuation's text has its beginning's words."""
    return [
        np.concatenate([one.prompt.codes[0], row]) if one.prompt.continuation else row
        for one, row in zip(utterances, first, strict=True)
    ]


def _code_failure(
    lm: SpeechLM, one: Utterance, first: np.ndarray, sampling: SamplingConfig
) -> Failure | None:
    """What the codes themselves tell."""
    prompt, num_prompt = one.prompt, one.prompt.codes.shape[1]
    if "early" in sampling.checks:
        text, before = lm.tokenizer.in_words(one.text), lm.tokenizer.in_words(prompt.text)
        if is_early(len(first), one.bounds, text, num_prompt, before):
            return "early"
    if "leak" in sampling.checks:
        rate = lm.vocabulary.codec.frame_rate
        if repeats_codes(first, prompt.codes[0], rate):
            return "leak"
    return None


def _finish(
    models: Models, utterances: Sequence[Utterance], made: Sequence[Candidate],
    sampling: SamplingConfig,
) -> list[Speech]:  # fmt: skip
    """Candidates to waves, and what these tell."""
    codec = models.codec
    first, seeds = [one.first for one in made], [one.seed for one in made]
    codes = complete(models, utterances, first, seeds, sampling)
    speeches = []
    for one, candidate, new in zip(utterances, made, codes, strict=True):
        wave = decode(codec, one.prompt.codes, new)
        speeches.append(
            Speech(
                wave=wave,
                codes=new,
                text=one.text,
                prompt_text=one.prompt.text,
                failure=_wave_failure(wave, codec.sample_rate, candidate, sampling),
                tries=1,
                seed=candidate.seed,
                sample_rate=codec.sample_rate,
                score=candidate.score,
            )
        )
    return _listened(models.lm, utterances, speeches, sampling)


def _wave_failure(
    wave: np.ndarray, sample_rate: int, made: Candidate, sampling: SamplingConfig
) -> Failure | None:
    if is_empty(wave):
        return "empty"
    if made.failure is not None or "silence" not in sampling.checks:
        return made.failure
    return "silence" if longest_silence(wave, sample_rate) > sampling.silence_seconds else None


def _listened(
    lm: SpeechLM, utterances: Sequence[Utterance], speeches: Sequence[Speech],
    sampling: SamplingConfig,
) -> list[Speech]:  # fmt: skip
    """The same, after the model's own ASR has heard those that had not failed."""
    checked = list(speeches)
    asked = {"early", "leak"} & set(sampling.checks)
    rows = [row for row, one in enumerate(speeches) if one.failure is None]
    if not asked or not rows or not can_transcribe(lm):
        return checked
    codes = _heard([utterances[row] for row in rows], [speeches[row].codes[0] for row in rows])
    for row, heard in zip(rows, transcripts(lm, codes), strict=True):
        one = utterances[row]
        said, text, before = (
            lm.tokenizer.in_words(each) for each in (heard, one.text, one.prompt.text)
        )
        if "leak" in asked and begins_with_prompt(said, before, text):
            checked[row] = replace(speeches[row], failure="leak")
        elif "early" in asked and lacks_end(said, text):
            checked[row] = replace(speeches[row], failure="early")
    return checked


def complete(
    models: Models,
    utterances: Sequence[Utterance],
    first: Sequence[np.ndarray],
    seeds: Sequence[int],
    sampling: SamplingConfig,
) -> list[np.ndarray]:
    """Codes (Q, T) of the new parts from their codebook 1."""
    if models.nar is None:
        return [row[None] for row in first]
    spelt = models.lm.tokenizer.spelt
    texts = [spelt(join_texts(one.prompt.text, one.text)) for one in utterances]
    return models.nar.decode(
        texts,
        [one.prompt.codes for one in utterances],
        first,
        temperature=sampling.nar_temperature,
        seeds=seeds,
    )


@torch.inference_mode()
def decode(codec: Decoder, prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The wave of the new part. The prompt is decoded before it, so that it starts clean."""
    joined = np.concatenate([prompt, new], axis=1).astype(np.int64)
    if joined.shape[1] == 0:
        return np.zeros(0, np.float32)
    wave = codec.decode(torch.from_numpy(joined)[None].to(codec.device))
    return wave[0, 0, prompt.shape[1] * codec.hop_length :].float().cpu().numpy()
