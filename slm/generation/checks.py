"""What can be wrong with generated speech: pure functions, each with its reasons.

Their figures were set on natural English speech, which should pass: the docstrings say how much of
it, at 25 frames a second with 1,024 codes, does not. How many failures they find is another matter.
"""

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Failure = Literal["silence", "leak", "early", "cut", "loop", "empty"]
SEVERITY: tuple[Failure, ...] = ("silence", "leak", "early", "cut", "loop", "empty")
"""The least bad first: a pause too long is still the whole text; nothing at all is worst."""

SILENCE_RMS = 1e-4
"""A wave below is nothing at all."""
SILENCE_DECIBELS = 40.0
"""Silence is so far below the loudness that speech itself has."""
WINDOW_SECONDS = 0.02
"""Loudness is measured over so long."""
EARLY_SHARE = 0.4
"""Speech of less than this share of the frames that the prompt's rate foretells is too short."""
MIN_LETTERS = 10
"""Fewer letters of a prompt, or of a text, tell nothing of a speaking rate."""
LEAK_SECONDS = 0.5
MIN_LEAK = 12
"""Changes of code within a stretch that the prompt has too: as many as LEAK_SECONDS has frames,
but no fewer than this."""
MISHEARD_SHARE = 0.35
"""A transcript that differs in more of its letters from what it should be proves nothing."""
MISSING_SHARE = 0.2
MIN_MISSING = 10
"""Letters at the text's end that a transcript must lack: this share, but no fewer than this."""


def severity(failure: str | None) -> int:
    """0 for none; the worse the higher."""
    return 0 if failure is None else 1 + SEVERITY.index(failure)  # type: ignore[arg-type]


def is_loop(tokens: Sequence[int] | Int[np.ndarray, " _"], loop_tokens: int) -> bool:
    """Whether the end of a sequence repeats one pattern for `loop_tokens` tokens or longer.

    A pattern must come three times, so periods up to half of `loop_tokens` count. Repetitions must
    be exact: of 2,974 natural recordings 8 have such a stretch of 2 s, 12 have one that repeats
    itself in 90 % of its frames or more, and 25 one in 80 %, so that to look for nearly repeated
    stretches as well would refuse more good speech.
    """
    if len(tokens) < loop_tokens:
        return False
    tail = np.asarray(tokens)
    for period in range(1, loop_tokens // 2 + 1):
        length = max(loop_tokens, 3 * period)
        if len(tail) < length:
            continue
        stretch = tail[-length:]
        if np.array_equal(stretch[period:], stretch[:-period]):
            return True
    return False


def has_loop(tokens: Int[np.ndarray, " _"], loop_tokens: int, every: int) -> bool:
    """Whether a finished sequence held a loop at any place where one is looked for while it grows:
    behind each `every` tokens, and at its end.

    A loop that generation got out of is a fault all the same.
    """
    ends = [*range(every, len(tokens), every), len(tokens)]
    return any(is_loop(tokens[:end], loop_tokens) for end in ends)


def is_empty(wave: Float[np.ndarray, " _"]) -> bool:
    """Whether a wave has no sound at all."""
    return wave.size == 0 or float(np.sqrt(np.mean(wave**2))) < SILENCE_RMS


def longest_silence(wave: Float[np.ndarray, " _"], sample_rate: int) -> float:
    """Seconds of the longest stretch that is SILENCE_DECIBELS below the wave's own loud parts (the
    95th percentile of its windows' loudness), so that quiet recordings are judged like loud ones.

    Of 800 natural recordings one has more than 2 s, 7 more than 1 s.
    """
    window = max(1, round(WINDOW_SECONDS * sample_rate))
    count = len(wave) // window
    if count == 0:
        return 0.0
    loudness = np.sqrt(np.square(wave[: count * window].reshape(count, window)).mean(1))
    quiet = loudness < np.quantile(loudness, 0.95) * 10 ** (-SILENCE_DECIBELS / 20)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], quiet.astype(int), [0]])))
    return float((edges[1::2] - edges[::2]).max(initial=0)) * window / sample_rate


def is_early(
    num_frames: int, bounds: tuple[int, int], text: str, prompt_frames: int, prompt_text: str
) -> bool:
    """Whether speech is far shorter than its text needs: fewer frames than the lower bound, or than
    EARLY_SHARE of what the prompt took for as many letters (or of the upper bound, if that is
    less).

    Of 5,652 pairs of natural recordings of one speaker none differs so much in its rate, and one in
    a thousand by 0.475. Prompts without a text, and very few letters, tell nothing.
    """
    least, most = bounds
    if num_frames < least:
        return True
    said, asked = num_letters(prompt_text), num_letters(text)
    if min(said, asked) < MIN_LETTERS:
        return False
    return num_frames < EARLY_SHARE * min(most, asked * prompt_frames / said)


def num_letters(text: str) -> int:
    return sum(letter.isalnum() for letter in text)


def repeats_codes(
    codes: Int[np.ndarray, " _"], prompt: Int[np.ndarray, " _"], frame_rate: float
) -> bool:
    """Whether a stretch of the codes is the prompt's own: it says the prompt's words again.

    Counted are its changes of code, because held codes (silence above all) are alike anywhere: in
    1,412 pairs of natural recordings of one speaker the longest common stretch has 10 changes, but
    36 frames.
    """
    needed = max(MIN_LEAK, round(LEAK_SECONDS * frame_rate))
    codes, prompt = np.asarray(codes), np.asarray(prompt)
    # Changes of the common stretch that ends here and at each of the prompt's frames.
    ending = np.zeros(len(prompt) + 1, dtype=np.int64)
    for index, code in enumerate(codes):
        changed = int(index > 0 and code != codes[index - 1])
        before, ending = ending, np.zeros_like(ending)
        equal = np.flatnonzero(prompt == code)
        ending[equal + 1] = np.where(before[equal] > 0, before[equal] + changed, 1)
        if ending.max() > needed:
            return True
    return False


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def lacks_end(transcript: str, text: str) -> bool:
    """Whether a transcript is the text's beginning, and the rest of the text is missing.

    The transcript is compared by letters with every beginning of the text; the likest is what was
    said. Where it is not much like that either, it was misheard, and proves nothing: a weak model's
    ASR must not refuse good speech.
    """
    heard, asked = " ".join(words_of(transcript)), " ".join(words_of(text))
    if not heard or not asked:
        return False
    errors = prefix_errors(heard, asked)
    said = len(asked) - int(errors[::-1].argmin())  # Among equals the longest.
    if errors[said] > MISHEARD_SHARE * len(heard):
        return False
    return len(asked) - said >= max(MIN_MISSING, MISSING_SHARE * len(asked))


def prefix_errors(heard: str, asked: str) -> Int[np.ndarray, " _"]:
    """Edits between `heard` and each beginning of `asked`, the empty one first."""
    letters = np.array(list(asked))
    steps = np.arange(len(asked) + 1)
    errors = steps.copy()
    for row, letter in enumerate(heard, start=1):
        changed = np.concatenate(
            [[row], np.minimum(errors[1:] + 1, errors[:-1] + (letters != letter))]
        )
        # What is left out of `asked` costs one each: a running minimum over costs less distance.
        errors = np.minimum.accumulate(changed - steps) + steps
    return errors


def begins_with_prompt(transcript: str, prompt_text: str, text: str) -> bool:
    """Whether a transcript begins with words of the prompt: with its last two, or any three in a
    row, one of which at least the text does not have, so that a text that takes up the prompt's
    words may say them."""
    heard, prompt = words_of(transcript), words_of(prompt_text)
    known = set(words_of(text))
    for start in range(len(prompt)):
        length = 0
        while (
            start + length < len(prompt)
            and length < len(heard)
            and prompt[start + length] == heard[length]
        ):
            length += 1
        at_end = start + length == len(prompt)
        enough = length >= min(2 if at_end else 3, len(prompt))
        if enough and not set(heard[:length]) <= known:
            return True
    return False
