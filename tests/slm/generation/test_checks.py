"""slm/generation/checks.py: failures are found, and similar good speech passes."""

import numpy as np
import pytest

from slm.config import CHECKS
from slm.generation.checks import (
    SEVERITY,
    begins_with_prompt,
    has_loop,
    is_early,
    is_empty,
    is_loop,
    lacks_end,
    longest_silence,
    prefix_errors,
    repeats_codes,
    severity,
    share_of_wrong_letters,
    speech_level,
)

RATE = 16000
TEXT = "the cat sat on a mat and the dog ran far away from the red hen"


def test_loops() -> None:
    random = np.random.default_rng(0).integers(0, 1000, 100).tolist()
    assert not is_loop(random, 20)
    assert is_loop([*random, *[7] * 20], 20)
    assert not is_loop([*random, *[7] * 19], 20)
    assert is_loop([*random, *[1, 2, 3] * 7], 20)
    # A phrase said twice is none; three times it is.
    assert not is_loop([*random, *range(10), *range(10)], 20)
    assert is_loop([*random, *range(10), *range(10), *range(10)], 20)


def test_a_loop_that_ended_is_found() -> None:
    random = np.random.default_rng(0).integers(0, 1000, 100)
    held = np.full(40, 7)
    left = np.concatenate([random, held, random])
    assert not is_loop(left, 20)
    assert has_loop(left, 20, 16)
    assert has_loop(np.concatenate([random, held[:20]]), 20, 16)  # At the end, wherever that is.
    assert not has_loop(random, 20, 16)
    assert not has_loop(np.concatenate([random, held[:19], random]), 20, 16)
    assert not has_loop(random[:0], 20, 16)


def noise(seconds: float, level: float) -> np.ndarray:
    random = np.random.default_rng(0)
    return (level * random.standard_normal(round(seconds * RATE))).astype(np.float32)


@pytest.mark.parametrize("level", [0.3, 0.003])
def test_silence_is_relative_to_the_level_of_speech(level: float) -> None:
    wave = np.concatenate([noise(1, level), noise(1.5, level / 1000), noise(1, level)])
    assert longest_silence(wave, RATE) == pytest.approx(1.5, abs=0.05)
    # Soft speech is no silence.
    wave = np.concatenate([noise(1, level), noise(1.5, level / 20), noise(1, level)])
    assert longest_silence(wave, RATE) == 0.0
    assert longest_silence(np.concatenate([wave, noise(3, 0)]), RATE) == pytest.approx(3, abs=0.05)


def test_silent_waves_are_empty() -> None:
    assert is_empty(np.zeros(0, np.float32), RATE)
    assert is_empty(noise(1, 1e-5), RATE)
    assert not is_empty(noise(1, 1e-3), RATE)
    # A click in silence is no speech.
    click = np.zeros(RATE, np.float32)
    click[100] = 1.0
    assert is_empty(click, RATE)
    assert longest_silence(np.zeros(3, np.float32), RATE) == 0.0


def test_speech_far_below_its_prompts_level_is_empty() -> None:
    prompt = speech_level(noise(1, 0.1), RATE)
    assert prompt == pytest.approx(-20, abs=0.5)
    # Pauses do not change the level.
    with_pause = np.concatenate([noise(1, 0.1), noise(9, 0)])
    assert speech_level(with_pause, RATE) == pytest.approx(prompt, abs=1)
    assert is_empty(noise(1, 0.1 * 10 ** (-26 / 20)), RATE, prompt)
    assert not is_empty(noise(1, 0.1 * 10 ** (-24 / 20)), RATE, prompt)
    # What is no number is no speech.
    assert is_empty(np.full(RATE, np.nan, np.float32), RATE)
    # Less than a window of samples has a level, too.
    assert not is_empty(noise(0.005, 0.1), RATE, prompt)
    assert is_empty(noise(0.005, 0.001), RATE, prompt)
    assert speech_level(np.zeros(0, np.float32), RATE) == -np.inf


def test_the_share_of_wrong_letters() -> None:
    assert share_of_wrong_letters("thec at, sat", "The cat sat.") == 0
    assert share_of_wrong_letters("", "Hello.") == 1
    assert share_of_wrong_letters("abcdefgxxx", "ABCDE fghij") == 0.3
    assert share_of_wrong_letters("bcde", "abcde") == 0.2
    # More than the text's words is wrong, too.
    assert share_of_wrong_letters("the cat sat on", "The cat.") == pytest.approx(5 / 6)
    assert share_of_wrong_letters("anything", "...") == 0


def test_early_is_far_below_the_prompts_rate() -> None:
    prompt = "the cat sat on a mat"  # 15 letters in 30 frames
    assert not is_early(60, (0, 999), TEXT, 30, prompt)
    asked = sum(map(str.isalnum, TEXT)) * 2
    assert is_early(int(0.39 * asked), (0, 999), TEXT, 30, prompt)
    assert not is_early(int(0.41 * asked) + 1, (0, 999), TEXT, 30, prompt)
    # No more can be asked for than the upper bound lets it have.
    assert not is_early(10, (0, 20), TEXT, 30, prompt)
    # What ends as soon as it may would have ended earlier.
    assert is_early(50, (50, 999), TEXT, 10, prompt)
    assert not is_early(51, (50, 999), TEXT, 10, prompt)
    # A few letters tell nothing of a rate; the lower bound always counts.
    assert not is_early(5, (0, 999), TEXT, 30, "hm")
    assert not is_early(5, (0, 999), "oh", 300, prompt)
    assert is_early(5, (6, 999), "oh", 30, "")


def test_repeated_prompt_codes_are_a_leak() -> None:
    random = np.random.default_rng(0)
    prompt, other = random.integers(0, 1000, 75), random.integers(0, 1000, 75)
    assert not repeats_codes(other, prompt, 25.0)
    assert not repeats_codes(np.concatenate([other, prompt[:12]]), prompt, 25.0)
    assert repeats_codes(np.concatenate([other, prompt[20:40], other]), prompt, 25.0)
    # Twice the frame rate asks for twice as much.
    assert not repeats_codes(np.concatenate([other, prompt[20:40], other]), prompt, 50.0)
    # A pause is like any other.
    still = np.full(60, 7)
    assert not repeats_codes(np.concatenate([other, still]), np.concatenate([prompt, still]), 25.0)
    assert not repeats_codes(np.zeros(0, np.int64), prompt, 25.0)


@pytest.mark.parametrize(
    ("transcript", "missing"),
    [
        (TEXT, False),
        (TEXT.upper() + ".", False),
        ("the cat sat on a mat and the", True),
        ("The kat sat on a met.", True),
        # Only the last word, or less, may be misheard.
        ("the cat sat on a mat and the dog ran far away from the", False),
        # In the middle something was left out: no early end.
        ("the cat sat on a mat far away from the red hen", False),
        # Misheard: nothing like the text's beginning.
        ("who is there", False),
        ("", False),
    ],
)
def test_a_transcript_that_lacks_the_end(transcript: str, missing: bool) -> None:
    assert lacks_end(transcript, TEXT) == missing


def test_edit_distance_to_every_prefix() -> None:
    assert prefix_errors("abc", "abcd").tolist() == [3, 2, 1, 0, 1]
    assert prefix_errors("xbc", "abc").tolist() == [3, 3, 2, 1]
    assert prefix_errors("", "abc").tolist() == [0, 1, 2, 3]


def test_a_transcript_that_begins_with_the_prompt() -> None:
    prompt = "It was late, and he went home."
    assert begins_with_prompt("went home the cat sat", prompt, TEXT)
    assert begins_with_prompt("it was late the cat sat", prompt, TEXT)
    assert not begins_with_prompt("home the cat sat", prompt, TEXT)
    assert not begins_with_prompt("it was the cat", prompt, TEXT)
    assert not begins_with_prompt(TEXT, prompt, TEXT)
    assert not begins_with_prompt("went home", prompt, "He went home again.")
    assert begins_with_prompt("hello the cat", "Hello!", TEXT)
    assert not begins_with_prompt("the cat", "", TEXT)


def test_every_failure_has_a_severity() -> None:
    assert {*CHECKS, "cut", "empty"} == set(SEVERITY)
    assert severity(None) < severity("silence") < severity("empty")
