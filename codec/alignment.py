"""Arithmetic of word times: paths through attention, pauses, and quiet places to cut."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# A pause is no louder than this above the recording's quietest twentieth, within these bounds below
# its loudest 20 ms. Decibels.
ABOVE_FLOOR, PAUSE_BOUNDS = 6.0, (-40.0, -25.0)
MEDIAN_WIDTH = 7  # Frames, as openai/whisper smooths attention.


class Span(NamedTuple):
    """A word and its frames, `stop` excluded."""

    text: str
    start: int
    stop: int


def quiet_cuts(wave: Float[Tensor, " S"], limit: float | int) -> Iterator[tuple[int, int]]:
    """Stretches of at most `limit` samples that end where a piece's last sixth is quietest."""
    start = 0
    while len(wave) - start > limit:
        begin, stop = start + int(limit * 5 / 6), start + int(limit)
        window = max(1, (stop - begin) // 50)
        energy = wave[begin:stop].square().unfold(0, window, max(1, window // 8)).mean(-1)
        cut = begin + int(energy.argmin()) * max(1, window // 8) + window // 2
        yield start, cut
        start = cut
    if start < len(wave):
        yield start, len(wave)


def runs(labels: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Each stretch of one label: the label, its first frame, and the frame after its last."""
    start = 0
    for label, run in groupby(labels):
        stop = start + len(list(run))
        yield label, start, stop
        start = stop


def spelled(labels: Sequence[int], letters: Mapping[int, str], delimiter: int | None) -> list[Span]:
    """The words that a CTC path spells; a word's frames are those of its letters."""
    spans: list[Span] = []
    inside = False
    for label, start, stop in runs(labels):
        if label == delimiter:
            inside = False
        elif label in letters and inside:
            spans[-1] = Span(spans[-1].text + letters[label], spans[-1].start, stop)
        elif label in letters:
            spans.append(Span(letters[label], start, stop))
            inside = True
    return spans


def fill_gaps(spans: Sequence[tuple[int, int] | None], frames: int) -> list[tuple[int, int]]:
    """Words without a time share what lies between their neighbours."""
    filled: list[tuple[int, int]] = []
    before = 0
    for known, group in groupby(spans, key=lambda span: span is not None):
        run = list(group)
        if known:
            filled += [span for span in run if span is not None]
        else:
            following = spans[len(filled) + len(run) :]
            after = following[0][0] if following and following[0] else frames
            edges = np.linspace(before, after, len(run) + 1).round().astype(int).tolist()
            filled += list(pairwise(edges))
        before = filled[-1][1]
    return filled


def follow(weights: Float[Tensor, "H L T"]) -> Float[Tensor, "L T"]:
    """How far each token looks at each frame: normalised over tokens, smoothed, heads averaged."""
    scores = weights - weights.mean(1, keepdim=True)
    scores = scores / weights.std(1, correction=0, keepdim=True).clamp(min=1e-10)
    half = MEDIAN_WIDTH // 2
    if scores.shape[-1] > half:
        padded = nn.functional.pad(scores, (half, half), mode="reflect")
        scores = padded.unfold(-1, MEDIAN_WIDTH, 1).median(-1).values
    return scores.mean(0)


def warp(scores: Float[np.ndarray, "L T"]) -> Int[np.ndarray, " L"]:
    """The first frame of each token on the monotonic path of the highest total score.

    The path leads from the first token and frame to the last ones; a step moves on by one token,
    one frame, or both.
    """
    cost = -scores.astype(np.float64)
    total = np.empty_like(cost)
    total[0] = cost[0].cumsum()
    for row in range(1, len(cost)):
        entry = np.minimum(total[row - 1], np.concatenate([[np.inf], total[row - 1, :-1]]))
        walked = cost[row].cumsum()  # Enter at frame k, then walk: min over k at every frame.
        total[row] = walked + np.minimum.accumulate(entry - walked + cost[row])
    first = np.zeros(len(cost), int)
    frame = cost.shape[1] - 1
    for row in range(len(cost) - 1, 0, -1):
        while frame > 0:
            both, token, stay = (
                total[row - 1, frame - 1],
                total[row - 1, frame],
                total[row, frame - 1],
            )
            if stay > min(both, token):
                break
            frame -= 1
        first[row] = frame
        if frame > 0 and total[row - 1, frame - 1] <= total[row - 1, frame]:
            frame -= 1
    return first


def without_pauses(spans: Sequence[Span], wave: Float[Tensor, " S"], hop_length: int) -> list[Span]:
    """Cuts pauses off words' edges: by cross-attention a word lasts until the next one starts."""
    frames = nn.functional.pad(wave, (0, -len(wave) % hop_length)).view(-1, hop_length)
    power = frames.square().mean(1)
    lowest, highest = (power.max() * 10 ** (bound / 10) for bound in PAUSE_BOUNDS)
    floor = torch.quantile(power, 0.05) * 10 ** (ABOVE_FLOOR / 10)
    loud = (power > floor.clamp(lowest, highest)).cpu().numpy()
    cut = []
    for span in spans:
        heard = span.start + np.flatnonzero(loud[span.start : span.stop])
        if len(heard):
            span = Span(span.text, int(heard[0]), int(heard[-1]) + 1)
        cut.append(span)
    return cut
