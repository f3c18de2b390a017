"""Long recordings in pieces: which frames a piece holds and which of them count."""

from collections.abc import Iterator
from typing import NamedTuple

# Longer recordings are coded in pieces of this length, each with CONTEXT on both sides, and with as
# many frames at least: LM-SPT's released convolutions reach 27 frames far, 2.2 s. There and in the
# frame-rate networks the pieces change nothing; SEANet's LSTMs and LM-SPT's Transformers look
# further, and what that changes is measured in the tests.
CHUNK_SECONDS = 30.0
CONTEXT_SECONDS = 2.0
CONTEXT_FRAMES = 32


class Piece(NamedTuple):
    """A stretch of frames [start, stop) and which of its frames are kept."""

    start: int
    stop: int
    keep: slice


def pieces_of(frames: int, chunk: int, context: int) -> Iterator[Piece]:
    """Stretches of `chunk` frames each, with up to `context` frames on both sides."""
    for first in range(0, frames, chunk):
        last = min(first + chunk, frames)
        start, stop = max(first - context, 0), min(last + context, frames)
        yield Piece(start, stop, slice(first - start, last - start))
