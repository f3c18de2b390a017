"""Checks of generated speech: pure functions.

Their thresholds were set on natural English speech at 25 Hz with 1,024 codes, which should pass;
the docstrings state the false positives. What they find in short texts is in LOG.md (Short texts).
"""

import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Failure = Literal["silence", "leak", "mismatch", "early", "cut", "loop", "empty"]
SEVERITY: tuple[Failure, ...] = (
    "silence", "leak", "mismatch", "early", "cut", "loop", "empty"
)  # fmt: skip
"""Least severe first: speech with a long pause is complete; an empty wave is worst."""

SILENCE_RMS = 1e-4
"""A wave whose speech is below this level is empty."""
MAX_DROP_DECIBELS = 25.0
"""So is one whose speech is this far below its prompt's."""
SILENCE_DECIBELS = 40.0
"""Level of silence, below the level of the wave's speech."""
WINDOW_SECONDS = 0.02
"""Window of the level measurement."""
EARLY_SHARE = 0.4
"""Minimum length, as a share of the frames that the prompt's speaking rate predicts."""
MIN_LETTERS = 10
"""Minimum letters of prompt and text for an estimate of the speaking rate."""
LEAK_SECONDS = 0.5
MIN_LEAK = 12
"""Minimum code changes within a common substring of speech and prompt: the frames of LEAK_SECONDS,
but at least MIN_LEAK."""
MAX_ERROR_RATE = 0.35
"""Maximum character error rate at which a transcript is trusted."""
MAX_MISMATCH = 0.4
"""Share of wrong letters in the model's own transcript at which speech does not match its text."""
SHORT_TEXT = 20
"""A text with fewer letters is transcribed twice: from the generated codes, and from the wave."""
MISSING_SHARE = 0.2
MIN_MISSING = 10
"""Letters missing at the text's end: MISSING_SHARE of the text, but at least MIN_MISSING."""


def severity(failure: str | None) -> int:
    """Rank of a failure; 0: none."""
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
    """Whether a sequence has a loop at any place where generation checks for one, after each
    `every` tokens and at its end; a loop that ended counts too."""
    ends = [*range(every, len(tokens), every), len(tokens)]
    return any(is_loop(tokens[:end], loop_tokens) for end in ends)


def speech_level(wave: Float[np.ndarray, " _"], sample_rate: int) -> float:
    """Level of a wave's speech in decibels relative to full scale: the 95th percentile of its
    windows' RMS levels, which pauses and clicks do not change; -inf for a wave without samples."""
    levels = _window_levels(wave, sample_rate)
    level = float(np.quantile(levels, 0.95)) if levels.size else 0.0
    return 20 * math.log10(level) if level else -math.inf


def is_empty(
    wave: Float[np.ndarray, " _"], sample_rate: int, prompt_level: float = -math.inf
) -> bool:
    """Whether a wave has no speech by its level.

    Args:
        prompt_level: `speech_level` of the prompt. Of 490 generations of short texts four are
            33 to 37 dB below it, and silent; the others are at most 9 dB below.
    """
    return is_empty_level(speech_level(wave, sample_rate), prompt_level)


def is_empty_level(level: float, prompt_level: float) -> bool:
    """`is_empty` by the `speech_level` of the wave; NaN is empty."""
    return not level >= max(20 * math.log10(SILENCE_RMS), prompt_level - MAX_DROP_DECIBELS)


def longest_silence(wave: Float[np.ndarray, " _"], sample_rate: int) -> float:
    """Seconds of the longest stretch that is SILENCE_DECIBELS below the wave's own level (the 95th
    percentile of its windows), which makes the check independent of the volume.

    Of 800 natural recordings one has more than 2 s, 7 more than 1 s.
    """
    window = _window(sample_rate)
    if len(wave) < window:
        return 0.0
    loudness = _window_levels(wave, sample_rate)
    quiet = loudness < np.quantile(loudness, 0.95) * 10 ** (-SILENCE_DECIBELS / 20)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], quiet.astype(int), [0]])))
    return float((edges[1::2] - edges[::2]).max(initial=0)) * window / sample_rate


def _window(sample_rate: int) -> int:
    return max(1, round(WINDOW_SECONDS * sample_rate))


def _window_levels(wave: np.ndarray, sample_rate: int) -> Float[np.ndarray, " _"]:
    """RMS of each complete window; of all samples, if they fill none."""
    window = min(_window(sample_rate), max(1, len(wave)))
    count = len(wave) // window
    return np.sqrt(np.square(wave[: count * window].reshape(count, window)).mean(1))


def is_early(
    num_frames: int, bounds: tuple[int, int], text: str, prompt_frames: int, prompt_text: str
) -> bool:
    """Whether speech is much shorter than its text: no more frames than the lower bound, before
    which it cannot end, or fewer than EARLY_SHARE of what the prompt's letters per frame predict
    (at most the upper bound).

    Of 5,652 pairs of natural recordings of one speaker no ratio is below EARLY_SHARE, and one in a
    thousand is below 0.475. Not checked for prompts without a text, and for very few letters.
    """
    least, most = bounds
    if num_frames <= least:
        return True
    in_prompt, in_text = num_letters(prompt_text), num_letters(text)
    if min(in_prompt, in_text) < MIN_LETTERS:
        return False
    return num_frames < EARLY_SHARE * min(most, in_text * prompt_frames / in_prompt)


def num_letters(text: str) -> int:
    """Number of letters and digits."""
    return len(_letters(text))


def repeats_codes(
    codes: Int[np.ndarray, " _"], prompt: Int[np.ndarray, " _"], frame_rate: float
) -> bool:
    """Whether codes and prompt have a long common substring: the prompt is repeated.

    Code changes are counted, not frames, because runs of one code (such as silence) occur anywhere:
    in 1,412 pairs of natural recordings of one speaker the longest common substring has 10 changes,
    but 36 frames.
    """
    needed = max(MIN_LEAK, round(LEAK_SECONDS * frame_rate))
    codes, prompt = np.asarray(codes), np.asarray(prompt)
    # Changes of the common substring that ends here and at each of the prompt's frames.
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
    """Whether a transcript covers only a prefix of the text.

    The prefix is that with the smallest edit distance to the transcript. Where that distance is
    large, the transcript is wrong, and the check passes: a weak ASR must not reject good speech.
    """
    found, asked = " ".join(words_of(transcript)), " ".join(words_of(text))
    if not found or not asked:
        return False
    errors = prefix_errors(found, asked)
    prefix = len(asked) - int(errors[::-1].argmin())  # Of equals the longest.
    if errors[prefix] > MAX_ERROR_RATE * len(found):
        return False
    return len(asked) - prefix >= max(MIN_MISSING, MISSING_SHARE * len(asked))


def share_of_wrong_letters(transcript: str, text: str) -> float:
    """Character error rate of a transcript, by letters and digits without spaces; above 1 where it
    is longer than the text; 0 for a text without them."""
    found, asked = _letters(transcript), _letters(text)
    return float(prefix_errors(found, asked)[-1]) / len(asked) if asked else 0.0


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def prefix_errors(found: str, asked: str) -> Int[np.ndarray, " _"]:
    """Edit distance between `found` and each prefix of `asked`, from the empty one on."""
    letters = np.array(list(asked))
    steps = np.arange(len(asked) + 1)
    errors = steps.copy()
    for row, letter in enumerate(found, start=1):
        changed = np.concatenate(
            [[row], np.minimum(errors[1:] + 1, errors[:-1] + (letters != letter))]
        )
        # Deletions cost one each: a running minimum over costs minus position.
        errors = np.minimum.accumulate(changed - steps) + steps
    return errors


def begins_with_prompt(transcript: str, prompt_text: str, text: str) -> bool:
    """Whether a transcript begins with words of the prompt: its last two, or any three in a row.
    At least one of them must not be in the text, which may repeat the prompt's words."""
    words, prompt = words_of(transcript), words_of(prompt_text)
    known = set(words_of(text))
    for start in range(len(prompt)):
        length = 0
        while (
            start + length < len(prompt)
            and length < len(words)
            and prompt[start + length] == words[length]
        ):
            length += 1
        at_end = start + length == len(prompt)
        enough = length >= min(2 if at_end else 3, len(prompt))
        if enough and not set(words[:length]) <= known:
            return True
    return False
