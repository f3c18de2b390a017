"""Voice conversion and speech continuation.

Conversion keeps codebook 1 of the source; the NAR predicts the other codebooks with the target
speaker's prompt. Continuation extends a recording without a text.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from slm.config import SamplingConfig
from slm.data.prompts import Prompt
from slm.data.sequences import continuation_context
from slm.generation.asr import cut_at_quiet
from slm.generation.sampling import NEXT_TRY, restrict_speech
from slm.generation.tts import Models, Speech, Utterance, synthesize
from slm.tokenization.text_normalization import NO_TEXT, join_texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Input of voice conversion."""

    first: Int[np.ndarray, " T"]
    """Codes of codebook 1."""
    levels: Float[np.ndarray, " T"]
    """Energy of each frame."""
    num_samples: int


def encode_source(codec: Any, blocks: Iterable[Float[np.ndarray, " _"]]) -> Source:
    """Encodes a recording of any length, given in blocks, in bounded memory."""
    levels: list[np.ndarray] = []
    held, num_samples = np.zeros(0, np.float32), 0

    def measured() -> Iterator[np.ndarray]:
        nonlocal held, num_samples
        for block in blocks:
            num_samples += len(block)
            held = np.concatenate([held, block])
            count = len(held) // codec.hop_length
            frames = held[: count * codec.hop_length].reshape(count, codec.hop_length)
            levels.append(np.square(frames).sum(1))
            held = held[count * codec.hop_length :]
            yield block

    codes = codec.encode_stream(measured(), num_codebooks=1)
    if held.size:
        levels.append(np.square(held).sum(keepdims=True))
    return Source(first=codes[0], levels=np.concatenate(levels), num_samples=num_samples)


def warn_without_text(models: Models) -> None:
    """Logs a warning if the NAR gets no text, but always had one in training."""
    if models.nar is not None and models.nar.config.text_dropout == 0:
        logger.warning(
            "the NAR gets no text, but always had one in training (nar.text_dropout 0): the voice "
            "may differ"
        )


def convert(
    models: Models,
    source: Source,
    target: Prompt,
    transcribe: Callable[[Sequence[np.ndarray]], list[str]],
    sampling: SamplingConfig,
    batch: int = 8,
    source_text: str | None = None,
) -> tuple[Int[np.ndarray, "Q T"], str]:
    """Codes of the source with the target's voice, and the source's text if it is known.

    A source that is too long for one pass is converted in pieces, split at pauses, `batch` at a
    time. If one of the texts is missing, the NAR gets none at all: a text must match its codes.

    Args:
        transcribe: transcripts of pieces (codes of codebook 1), used if the NAR takes texts and
            `source_text` is not given or is of several pieces.
    """
    nar, lm = models.nar, models.lm
    assert nar is not None
    rate = lm.vocabulary.codec.frame_rate
    room = max(models.coverage.longest_frames - target.codes.shape[1], round(rate))
    pieces = [source.first[cut] for cut in cut_at_quiet(source.levels, room)]
    if source_text is not None and len(pieces) > 1 and nar.takes_texts:
        logger.warning(
            "the source is converted in %d pieces; its text is of all of them and is not used",
            len(pieces),
        )
        source_text = None
    target_form = lm.tokenizer.tts_form(target.text) if nar.takes_texts else ""
    done, known, complete = [], [], True
    for start in range(0, len(pieces), batch):
        part = pieces[start : start + batch]
        texts = [""] * len(part)
        if nar.takes_texts and target.text:
            texts = transcribe(part) if source_text is None else [source_text]
        known += texts
        complete &= all(texts)
        done += nar.decode(
            [join_texts(target_form, lm.tokenizer.tts_form(one)) if one else "" for one in texts],
            [target.codes] * len(part),
            part,
            temperature=sampling.nar_temperature,
            seeds=[0] * len(part),
        )
    if not complete:
        warn_without_text(models)
    text = source_text or " ".join(text for text in known if text)
    return np.concatenate(done, axis=1), text


def continue_speech(
    models: Models,
    codes: Int[np.ndarray, "Q _"],
    seconds: float,
    sampling: SamplingConfig,
    seed: int,
) -> Speech:
    """Speech that follows `codes`, for at most `seconds`; the model may end it before.

    Only the checks that need no text apply.

    Raises:
        ValueError: a model that was not trained on continuation, a length that is not positive and
            finite, and a prompt beyond the context length.
    """
    lm = models.lm
    check_continuation(lm.origin.get("tasks", {}))
    if not isfinite(seconds):
        raise ValueError(f"seconds must be finite, got {seconds}")
    most = round(seconds * lm.vocabulary.codec.frame_rate)
    if most < 1:
        raise ValueError(f"{seconds:g} s are less than one frame of this codec; give more seconds")
    context = continuation_context(lm.vocabulary, lm.tokenizer.speech_ids("continuation", codes[0]))
    utterance = Utterance(
        text=NO_TEXT,
        prompt=Prompt(codes=codes, text="", continuation=True),
        prompt_text=NO_TEXT,
        context=context,
        bounds=(0, restrict_speech(lm, context, 1, most, "prompt")),
        seed=seed,
    )
    warn_without_text(models)
    checks = tuple(check for check in sampling.checks if check in ("loop", "silence"))
    once = replace(sampling, max_attempts=1, num_candidates=1, checks=checks)
    attempt = 0
    while True:
        # Greedy decoding would fail the same way again: a retry samples.
        config = replace(once, greedy=once.greedy and attempt == 0)
        (made,) = synthesize(models, [replace(utterance, seed=seed + NEXT_TRY * attempt)], config)
        attempt += 1
        # The maximum length is no failure here.
        failure = None if made.failure == "cut" else made.failure
        if failure is None or attempt == sampling.max_attempts:
            return replace(made, tries=attempt, failure=failure)


def check_continuation(tasks: Mapping[str, float]) -> None:
    """Raises ValueError if the training tasks of a voice do not include continuation."""
    if not tasks.get("continuation", 0.0):
        raise ValueError("this voice was trained without continuation: it cannot continue speech")
