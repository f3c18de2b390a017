"""Voice conversion: codebook 1 of the source, the other codebooks from the NAR in another voice.

Speech that goes on from a recording without a text.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from slm.config import SamplingConfig
from slm.data.sequences import Prompt, continuation_context, join_texts
from slm.generation.asr import cut_at_quiet
from slm.generation.sampling import NEXT_TRY, restrict_speech
from slm.generation.tts import Models, Speech, Utterance, synthesize

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A recording, as far as conversion needs it."""

    first: Int[np.ndarray, " T"]
    """Its codes of codebook 1."""
    levels: Float[np.ndarray, " T"]
    """The energy of each frame's samples."""
    num_samples: int


def listen(codec: Any, blocks: Iterable[Float[np.ndarray, " _"]]) -> Source:
    """Reads a recording that comes in blocks; any length in bounded memory."""
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


def warn_of_no_text(models: Models) -> None:
    """Says so where the NAR gets no text, but never had to do without one."""
    if models.nar is not None and models.nar.config.text_dropout == 0:
        logger.warning(
            "the NAR has no text here, but was always given one in training (nar.text_dropout 0): "
            "the voice may be off"
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
    """The source's codes in the target's voice, and its text where that is known.

    A source that is longer than the training utterances left room for is completed in pieces, cut
    where it is quiet, `batch` at a time. `transcribe` gives the pieces' texts, where there are
    several or none is given; where one of them or the target's is empty, the NAR gets no text at
    all: half of it would be put to the wrong half. Nor does one that takes none.
    """
    nar, lm = models.nar, models.lm
    assert nar is not None
    rate = lm.vocabulary.codec.frame_rate
    room = max(models.coverage.longest_frames - target.codes.shape[1], round(rate))
    pieces = [source.first[cut] for cut in cut_at_quiet(source.levels, room)]
    if source_text is not None and len(pieces) > 1 and nar.takes_texts:
        logger.warning(
            "the source takes %d pieces; the text that was given is of all of it and is not used",
            len(pieces),
        )
        source_text = None
    done, said, given = [], [], True
    for start in range(0, len(pieces), batch):
        part = pieces[start : start + batch]
        heard = [source_text] if source_text is not None else None
        used = nar.takes_texts and target.text
        texts = (heard or transcribe(part)) if used else [""] * len(part)
        said += texts
        given &= all(texts)
        done += nar.decode(
            [lm.tokenizer.spelt(join_texts(target.text, one)) if one else "" for one in texts],
            [target.codes] * len(part),
            part,
            temperature=sampling.nar_temperature,
            seeds=[0] * len(part),
        )
    if not given:
        warn_of_no_text(models)
    text = source_text or " ".join(text for text in said if text)
    return np.concatenate(done, axis=1), text


def go_on(
    models: Models,
    codes: Int[np.ndarray, "Q _"],
    seconds: float,
    sampling: SamplingConfig,
    seed: int,
) -> Speech:
    """What follows `codes`, for at most so many seconds: the model may find an end before.

    Of the checks only those count that need no text. Raises ValueError for a model that was not
    trained for it, and for what does not fit into it.
    """
    lm = models.lm
    if lm.origin.get("tasks", {}).get("continuation", 0.0) == 0:
        raise ValueError(
            "this voice cannot go on with a recording: it was trained without continuation"
        )
    if not isfinite(seconds):
        raise ValueError(f"{seconds} s are no length; say how many seconds at most")
    most = round(seconds * lm.vocabulary.codec.frame_rate)
    if most < 1:
        raise ValueError(f"{seconds:g} s are less than a frame of this codec; ask for more")
    speech = lm.tokenizer.speech_ids("continuation", codes[0])
    context = continuation_context(lm.vocabulary, speech)
    begun = Utterance(
        text="",
        prompt=Prompt(codes=codes, text="", continuation=True),
        context=context,
        bounds=(0, restrict_speech(lm, context, 1, most, "prompt")),
        seed=seed,
    )
    warn_of_no_text(models)
    checks = tuple(check for check in sampling.checks if check in ("loop", "silence"))
    once = replace(sampling, max_attempts=1, num_candidates=1, checks=checks)
    attempt = 0
    while True:
        # The likeliest token fails the same way twice: a retry samples.
        drawn = replace(once, greedy=once.greedy and attempt == 0)
        (made,) = synthesize(models, [replace(begun, seed=seed + NEXT_TRY * attempt)], drawn)
        attempt += 1
        # As long as was asked for is no failure here.
        failure = None if made.failure == "cut" else made.failure
        if failure is None or attempt == sampling.max_attempts:
            return replace(made, tries=attempt, failure=failure)
