"""Long recordings in pieces that a model can take."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float

QUIET_SEARCH = 1 / 3
"""A long recording is split at the quietest spot of this last share of a window."""


def split_at_quiet(
    blocks: Iterable[Float[np.ndarray, " _"]], longest: int
) -> Iterator[Float[np.ndarray, " _"]]:
    """Cuts a recording that comes in blocks into pieces of at most `longest` samples."""
    held = np.zeros(0, np.float32)
    window = max(1, longest // 100)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > longest:
            start = longest - int(longest * QUIET_SEARCH)
            count = (longest - start) // window
            tail = held[start : start + count * window].reshape(count, window)
            cut = start + int(np.square(tail).sum(1).argmin()) * window + window // 2
            yield held[:cut]
            held = held[cut:]
    if len(held):
        yield held


def cut_at_quiet(levels: Float[np.ndarray, " T"], longest: int) -> list[slice]:
    """Cuts frames of these energies into stretches of at most `longest`, likewise."""
    cuts, start = [], 0
    while len(levels) - start > longest:
        first = start + longest - int(longest * QUIET_SEARCH)
        stop = first + int(levels[first : start + longest].argmin()) if longest > 2 else first
        cuts.append(slice(start, stop))
        start = stop
    return [*cuts, slice(start, len(levels))]
