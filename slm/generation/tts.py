"""TTS of a batch: attempts by the AR, the NAR and the codec's decoder, and their evaluation.

candidates   N sequences of codebook 1 for each utterance (AR, one batch)
rerank       best-of-N: the order in which they are decoded
finish       the other codebooks (NAR), and the wave (codec)
evaluate     all checks; a failed attempt is repeated with another seed
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec.program import counted
from codec.transcripts import has_words
from slm.config import SamplingConfig
from slm.data.coverage import Coverage
from slm.data.prompts import Prompt
from slm.data.sequences import NO_FORCED_TOKENS, ForcedTokens
from slm.generation.asr import encode
from slm.generation.checks import (
    MAX_MISMATCH,
    SHORT_TEXT,
    Failure,
    begins_with_prompt,
    is_early,
    is_empty,
    lacks_end,
    longest_silence,
    num_letters,
    repeats_codes,
    severity,
    share_of_wrong_letters,
    speech_level,
)
from slm.generation.rerank import can_transcribe, text_scores, transcripts
from slm.generation.sampling import Request, first_codes, generate, retry, speech_only
from slm.models.ar import SpeechLM
from slm.models.nar import NAR
from slm.tokenization.text_normalization import NormalizedText, join_texts

logger = logging.getLogger(__name__)


@runtime_checkable
class Decoder(Protocol):
    """The part of a codec that generation needs."""

    sample_rate: int
    hop_length: int

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        ...

    def decode(
        self, codes: Int[Tensor, "B Q T"], lengths: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B 1 S"]:
        """Codes to waves in [-1, 1]; `lengths`: frames of each item, None: all."""
        ...


class Models(NamedTuple):
    """The parts of a voice."""

    codec: Any
    """`codec.SpeechCodec`."""
    lm: SpeechLM
    nar: NAR | None
    coverage: Coverage


@dataclass(frozen=True, kw_only=True, slots=True)
class Utterance:
    """A text and a prompt, checked and encoded by `Voice.prepare`."""

    text: NormalizedText
    prompt: Prompt
    prompt_text: NormalizedText
    context: list[int]
    """Prompt tokens of the AR."""
    bounds: tuple[int, int]
    """Minimum and maximum frames."""
    seed: int
    forced: ForcedTokens = NO_FORCED_TOKENS
    """For an interleaved AR: the words after the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speech:
    """Generated speech, without the prompt."""

    wave: Float[np.ndarray, " S"]
    """float32 at the codec's sample rate, in [-1, 1]: divided by its peak if that is above 1."""
    codes: Int[np.ndarray, "Q T"]
    text: str
    prompt_text: str
    failure: str | None
    """None, or the first check that failed (slm/generation/checks.py) in the least bad attempt."""
    tries: int
    """Number of attempts."""
    seed: int
    """Of the returned attempt."""
    sample_rate: int
    score: float | None = None
    """With best-of-N: mean log-likelihood of the text under the model's own ASR
    (slm/generation/rerank.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One generation of an utterance, under one seed."""

    utterance: Utterance
    first: Int[np.ndarray, " T"]
    """Codebook 1 of the new part."""
    failure: Failure | None
    """Of the AR's generation: empty, cut or loop."""
    seed: int
    score: float | None = None
    """With best-of-N; see `Speech`."""
    codes: Int[np.ndarray, "Q T"] | None = None
    """All codebooks; None: not decoded yet."""
    wave: Float[np.ndarray, " S"] | None = None
    prompt_level: float = -math.inf
    """Level of the prompt's speech, decoded with the wave; see `speech_level`."""

    @property
    def transcribed(self) -> Int[np.ndarray, " _"]:
        """Codebook 1 of the speech whose transcript is the text: the text of a continuation has
        the prompt's words as well."""
        prompt = self.utterance.prompt
        return np.concatenate([prompt.codes[0], self.first]) if prompt.continuation else self.first


def synthesize(
    models: Models, utterances: Sequence[Utterance], sampling: SamplingConfig
) -> list[Speech]:
    """Speech of each utterance, as one batch.

    An attempt that fails a check is repeated with another seed, up to `sampling.max_attempts`
    times; then the least bad one is returned with its failure. Where the model was trained on ASR,
    the checks `early` and `leak` also transcribe what passed all others, which takes a fifth (one
    utterance) to a half (a batch of four) of the AR's time with a small voice.

    Raises:
        ValueError: for best-of-N with a model without ASR.
    """
    if sampling.num_candidates > 1 and not can_transcribe(models.lm):
        raise ValueError(
            f"sampling.num_candidates is {sampling.num_candidates}: they are compared by the "
            "model's own ASR, but this voice was trained without asr; set it to 1"
        )
    best: list[Speech | None] = [None] * len(utterances)
    for number in range(sampling.max_attempts):
        waiting = [i for i, one in enumerate(best) if one is None or one.failure is not None]
        if not waiting:
            break
        groups = candidates(models.lm, [utterances[i] for i in waiting], sampling, number)
        if sampling.num_candidates > 1:
            groups = rerank(models, groups, sampling)
        made = _first_without_failure(models, groups, sampling)
        for index, speech in zip(waiting, made, strict=True):
            best[index] = replace(_less_severe(best[index], speech), tries=number + 1)
        failed = sum(one.failure is not None for one in made)
        if failed and sampling.max_attempts > 1:
            logger.info(
                "attempt %d of %d failed for %s",
                number + 1, sampling.max_attempts, counted(failed, "item"),
            )  # fmt: skip
    return [one for one in best if one is not None]


def candidates(
    lm: SpeechLM, utterances: Sequence[Utterance], sampling: SamplingConfig, number: int = 0
) -> list[list[Attempt]]:
    """`sampling.num_candidates` generations of codebook 1 for each utterance, in one batch of the
    AR. The first one has the utterance's own seed: best-of-1 is the plain call.

    Args:
        number: of the attempt, from 0; selects the seeds.
    """
    per_candidate = [one for one in utterances for _ in range(sampling.num_candidates)]
    requests = [
        retry(
            Request(
                context=one.context,
                min_tokens=one.bounds[0],
                max_tokens=one.bounds[1],
                seed=one.seed,
                forced=one.forced,
            ),
            number,
            index % sampling.num_candidates,
        )
        for index, one in enumerate(per_candidate)
    ]
    once = replace(sampling, max_attempts=1)
    made = [
        Attempt(utterance=one, first=first_codes(lm, found), failure=found.failure, seed=found.seed)
        for one, found in zip(
            per_candidate, generate(lm, requests, speech_only(lm, once), once), strict=True
        )
    ]
    size = sampling.num_candidates
    return [made[start : start + size] for start in range(0, len(made), size)]


def rerank(
    models: Models, groups: Sequence[Sequence[Attempt]], sampling: SamplingConfig
) -> list[list[Attempt]]:
    """Best-of-N: each utterance's candidates, best first, that are to be decoded.

    Those that pass the checks of codebook 1 are ordered by the likelihood of the text under the
    model's own ASR; where none does, the least bad one stays. Cost of best-of-N: N times the AR's
    work, and one ASR pass over the candidates without generation.
    """
    flat = [one for group in groups for one in group]
    scores = text_scores(
        models.lm, [one.utterance.text for one in flat], [one.transcribed for one in flat]
    )
    failures = evaluate(models, flat, sampling)
    ranked = iter(
        [
            (severity(failure), -score, replace(one, score=score))
            for one, score, failure in zip(flat, scores, failures, strict=True)
        ]
    )
    kept = []
    for group in groups:
        ordered = sorted((next(ranked) for _ in group), key=lambda one: one[:2])
        kept.append([one for rank, (bad, _, one) in enumerate(ordered) if not (rank and bad)])
    return kept


def _first_without_failure(
    models: Models, groups: Sequence[list[Attempt]], sampling: SamplingConfig
) -> list[Speech]:
    """Decodes the candidates of each utterance in their order until one passes all checks."""
    best: list[Speech | None] = [None] * len(groups)
    for rank in range(max(map(len, groups), default=0)):
        pending = [
            index
            for index, (speech, group) in enumerate(zip(best, groups, strict=True))
            if rank < len(group) and (speech is None or speech.failure is not None)
        ]
        made = finish(models, [groups[index][rank] for index in pending], sampling)
        failures = evaluate(models, made, sampling)
        for index, one, failure in zip(pending, made, failures, strict=True):
            assert one.wave is not None
            assert one.codes is not None
            speech = Speech(
                wave=one.wave,
                codes=one.codes,
                text=one.utterance.text.original,
                prompt_text=one.utterance.prompt.text,
                failure=failure,
                tries=1,
                seed=one.seed,
                sample_rate=models.codec.sample_rate,
                score=one.score,
            )
            best[index] = _less_severe(best[index], speech)
    return [one for one in best if one is not None]


def _less_severe(before: Speech | None, new: Speech) -> Speech:
    """The one with the less severe failure; the earlier one of equals."""
    worse = before is None or severity(new.failure) < severity(before.failure)
    return new if worse or before is None else before


def finish(models: Models, attempts: Sequence[Attempt], sampling: SamplingConfig) -> list[Attempt]:
    """The attempts with all codebooks and their waves."""
    if not attempts:
        return []
    codes = complete(
        models,
        [one.utterance for one in attempts],
        [one.first for one in attempts],
        [one.seed for one in attempts],
        sampling,
    )
    made = []
    for one, new in zip(attempts, codes, strict=True):
        prompt, wave = _decode(models.codec, one.utterance.prompt.codes, new)
        level = speech_level(prompt, models.codec.sample_rate)
        made.append(replace(one, codes=new, wave=wave, prompt_level=level))
    return made


def evaluate(
    models: Models, attempts: Sequence[Attempt], sampling: SamplingConfig
) -> list[Failure | None]:
    """The first check that each attempt fails; None: it passes all of `sampling.checks`.

    Checks of the codes come first, then those of the wave, then those of the transcript by the
    model's own ASR, in one batch; an attempt that is not decoded yet has only the first.
    """
    lm, checks = models.lm, sampling.checks
    rate = lm.vocabulary.codec.frame_rate
    failures: list[Failure | None] = []
    for one in attempts:
        utterance, prompt, failure = one.utterance, one.utterance.prompt, one.failure
        if one.wave is not None and is_empty(one.wave, models.codec.sample_rate, one.prompt_level):
            failure = "empty"
        elif failure is None and "early" in checks and is_early(
            len(one.first), utterance.bounds, utterance.text.text, prompt.codes.shape[1],
            utterance.prompt_text.text,
        ):  # fmt: skip
            failure = "early"
        if failure is None and "leak" in checks and repeats_codes(one.first, prompt.codes[0], rate):
            failure = "leak"
        if failure is None and one.wave is not None and "silence" in checks:
            silence = longest_silence(one.wave, models.codec.sample_rate)
            failure = "silence" if silence > sampling.silence_seconds else None
        failures.append(failure)

    if not {"early", "leak", "mismatch"} & set(checks) or not can_transcribe(lm):
        return failures
    rows = [
        row
        for row, (one, failure) in enumerate(zip(attempts, failures, strict=True))
        if failure is None and one.wave is not None
    ]
    found = _transcribed(lm, [attempts[row].transcribed for row in rows])
    unmatched: dict[int, str] = {}
    for row, transcript in zip(rows, found, strict=True):
        utterance = attempts[row].utterance
        text, prompt_text = utterance.text.text, utterance.prompt_text.text
        if "leak" in checks and begins_with_prompt(transcript, prompt_text, text):
            failures[row] = "leak"
        elif "early" in checks and lacks_end(transcript, text):
            failures[row] = "early"
        elif "mismatch" in checks and not utterance.text.respelled:
            unmatched[row] = transcript
    for row, failure in _mismatches(models, {row: attempts[row] for row in unmatched}, unmatched):
        failures[row] = failure
    return failures


def _mismatches(
    models: Models, attempts: Mapping[int, Attempt], transcripts: Mapping[int, str]
) -> Iterator[tuple[int, Failure]]:
    """The keys of attempts whose words are not the text's, and their failures.

    Of a short text the wave is transcribed as well, and the mean counts: a word has too few letters
    for one transcript, which the NAR and the codec have no part in.
    """
    wrong = {
        key: share_of_wrong_letters(transcripts[key], one.utterance.text.text)
        for key, one in attempts.items()
    }
    # At 0 and at twice the limit a second transcript hardly changes the decision.
    again = [
        key
        for key, one in attempts.items()
        if 0 < wrong[key] < 2 * MAX_MISMATCH
        and num_letters(one.utterance.text.text) < SHORT_TEXT
        and not one.utterance.prompt.continuation
    ]
    waves = [one.wave for one in (attempts[key] for key in again) if one.wave is not None]
    codes = [one[0] for one in encode(models.codec, waves)] if waves else []
    for key, transcript in zip(again, _transcribed(models.lm, codes), strict=True):
        second = share_of_wrong_letters(transcript, attempts[key].utterance.text.text)
        wrong[key] = (wrong[key] + second) / 2
    suspects = [key for key, share in wrong.items() if share >= MAX_MISMATCH]
    # An ASR that does not recognize the prompt either is not used.
    utterances = [attempts[key].utterance for key in suspects]
    of_prompts = _transcribed(models.lm, [one.prompt.codes[0] for one in utterances])
    for key, one, transcript in zip(suspects, utterances, of_prompts, strict=True):
        if share_of_wrong_letters(transcript, one.prompt_text.text) < MAX_MISMATCH:
            yield key, "mismatch" if has_words(transcripts[key]) else "empty"


def _transcribed(lm: SpeechLM, codes: Sequence[np.ndarray]) -> list[str]:
    """Transcripts in words."""
    return [lm.tokenizer.in_words(text) for text in transcripts(lm, codes)] if codes else []


def complete(
    models: Models,
    utterances: Sequence[Utterance],
    first: Sequence[np.ndarray],
    seeds: Sequence[int],
    sampling: SamplingConfig,
) -> list[np.ndarray]:
    """Codes (Q, T) of new parts from their codebook 1."""
    if models.nar is None:
        return [row[None] for row in first]
    texts = [join_texts(one.prompt_text.tts_form, one.text.tts_form) for one in utterances]
    return models.nar.decode(
        texts,
        [one.prompt.codes for one in utterances],
        first,
        temperature=sampling.nar_temperature,
        seeds=seeds,
    )


def decode(codec: Decoder, prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The wave of the new part (S,); the prompt is decoded with it, as the codec's left context.

    Divided by its peak if that is above 1, as after a loud prompt: a file would clip it.
    """
    return _decode(codec, prompt, new)[1]


@torch.inference_mode()
def _decode(codec: Decoder, prompt: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The waves of the prompt and of the new part, both divided by the new part's peak if that is
    above 1."""
    joined = np.concatenate([prompt, new], axis=1).astype(np.int64)
    if joined.shape[1] == 0:
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    wave = codec.decode(torch.from_numpy(joined)[None].to(codec.device))
    wave = wave[0, 0].float().cpu().numpy()
    start = prompt.shape[1] * codec.hop_length
    peak = float(np.abs(wave[start:]).max(initial=0.0))
    wave = wave / np.float32(peak) if peak > 1.0 else wave
    return wave[:start], wave[start:]
