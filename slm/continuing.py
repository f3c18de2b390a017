"""Speech that goes on from a recording without a text."""

from dataclasses import replace
from math import isfinite

import numpy as np
from jaxtyping import Int

from slm.config import SamplingConfig
from slm.conversion import warn_of_no_text
from slm.generate import NEXT_TRY, restrict_speech
from slm.prompts import Prompt, continuation_context
from slm.speaking import Models, Speech, Utterance, speak


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
    speech = lm.alphabet.speech_ids("continuation", codes[0])
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
    once = replace(sampling, tries=1, candidates=1, checks=checks)
    attempt = 0
    while True:
        # The likeliest token fails the same way twice: a retry samples.
        drawn = replace(once, greedy=once.greedy and attempt == 0)
        (made,) = speak(models, [replace(begun, seed=seed + NEXT_TRY * attempt)], drawn)
        attempt += 1
        # As long as was asked for is no failure here.
        failure = None if made.failure == "cut" else made.failure
        if failure is None or attempt == sampling.tries:
            return replace(made, tries=attempt, failure=failure)
