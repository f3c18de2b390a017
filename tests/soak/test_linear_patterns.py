"""Regular expressions of the text front end take linear time, whatever is repeated."""

import re
import time

import pytest

from slm.generation import long_form
from slm.tokenization import markup, text_normalization

SINGLE = [*"aAI1 \t\n.,-/_*`#@&<>'\"$%^([{+=~:;!?\\|x0", "\u00b0", "\u00bd", "\u2032", "\u2013"]
SINGLE += ["\u2019", "\u00b2", "\u2022", "\u00e9", "\u02c8"]
SEVERAL = [
    *("a ", "1 ", "a.", "1.", "1,", "1-", "1/", "a/", "a-", "$1", "<a", "</a", "](", "[a", "&a"),
    *("&#", "a_", "/a", "1:", "1'", "M. ", "1 0", " 000", "IX ", "Ab ", "http://", "@a", "1e"),
    *("\n ", "\n-", "*a", "a*", "1 m", '1"', "King I ", "Mon-", "a1", "1%", "-1", "(1", "1)"),
    *("<a ", "~/", "c:\\", "1x", "a,", "St. ", "May 1 ", "1, ", "1st ", "a\n", "<break ", "1 - "),
    *("5!", "...", "No. ", "a@", "[a](", "`a", "__a"),
]
LEAST_SECONDS = 0.004
"""Shorter times are not measured well, and say that nothing is quadratic at this length."""


def patterns() -> dict[str, re.Pattern[str]]:
    """All compiled patterns of the modules, by name."""
    found = {}
    for module in (text_normalization, markup, long_form):
        for name, value in vars(module).items():
            values = value if isinstance(value, list) else [value]
            for index, one in enumerate(values):
                one = one[0] if isinstance(one, tuple) and one else one
                if isinstance(one, re.Pattern):
                    found[f"{module.__name__}.{name}[{index}]"] = one
    # It gets at most `LONGEST_ABBREVIATION` characters.
    del found["slm.generation.long_form._INITIALS[0]"]
    return found


def seconds(pattern: re.Pattern[str], text: str) -> float:
    begin = time.thread_time()
    for _ in pattern.finditer(text):
        pass
    return time.thread_time() - begin


@pytest.mark.parametrize("run", SINGLE + SEVERAL)
def test_twice_the_length_takes_twice_as_long(run: str) -> None:
    for before, after in (("", ""), ("5", "b")):
        short, long = (before + run * (n // len(run)) + after for n in (2000, 4000))
        for name, pattern in patterns().items():
            if seconds(pattern, short) > LEAST_SECONDS:
                once = min(seconds(pattern, short) for _ in range(3))
                twice = min(seconds(pattern, long) for _ in range(3))
                assert twice < 3.2 * once or once < LEAST_SECONDS, name
