import numpy as np
import pytest
import torch

from codec.distillation.word_alignment import (
    Span,
    fill_gaps,
    follow,
    quiet_cuts,
    runs,
    warp,
    without_pauses,
)


def test_the_path_follows_the_highest_scores() -> None:
    scores = np.full((3, 8), -0.1, np.float32)
    scores[0, :3] = scores[1, 3:5] = scores[2, 5:] = 1
    assert warp(scores).tolist() == [0, 3, 5]


def test_tokens_may_share_a_frame_and_the_first_starts_at_0() -> None:
    scores = np.full((4, 4), -1.0, np.float32)
    scores[0, :2] = scores[1, 2] = scores[2, 2] = scores[3, 3] = 1
    assert warp(scores).tolist() == [0, 2, 2, 3]
    assert warp(np.ones((1, 5), np.float32)).tolist() == [0]
    assert warp(np.ones((3, 1), np.float32)).tolist() == [0, 0, 0]


def test_the_path_has_the_best_score_of_all() -> None:
    def best(scores: np.ndarray) -> float:
        """By the definition, cell by cell."""
        total = np.full((scores.shape[0] + 1, scores.shape[1] + 1), -np.inf)
        total[0, 0] = 0
        for row, column in np.ndindex(scores.shape):
            before = max(total[row, column], total[row, column + 1], total[row + 1, column])
            total[row + 1, column + 1] = scores[row, column] + before
        return float(total[-1, -1])

    generator = np.random.default_rng(0)
    for _ in range(20):
        scores = generator.standard_normal((6, 9)).astype(np.float32)
        starts = warp(scores)
        assert (np.diff(starts) >= 0).all()
        # A token goes on to the frame before the next one's, or shares that one.
        stops = np.append(starts[1:], 8)
        paths = [0.0]
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            shared = scores[row, start : stop + 1].sum()
            alone = scores[row, start:stop].sum() if start < stop and row < 5 else -np.inf
            paths = [paths[0] + max(shared, alone)]
        assert paths[0] == pytest.approx(best(scores), abs=1e-5)


def test_attention_is_normalised_over_tokens_smoothed_and_averaged() -> None:
    weights = torch.zeros(2, 3, 20)
    weights[:, 0, :10] = weights[:, 1, 10:] = 1.0
    weights[1] *= 5  # A louder head counts no more.
    weights[0, 2, 4] = 1.0  # One frame alone is noise.
    scores = follow(weights)
    assert scores.shape == (3, 20)
    high, low = 2 / 2**0.5, -1 / 2**0.5
    assert scores[0, :9].tolist() == pytest.approx([high] * 9)
    assert scores[1, 11:].tolist() == pytest.approx([high] * 9)
    assert scores[2].tolist() == pytest.approx([low] * 20)
    torch.testing.assert_close(follow(weights[1:]), follow(weights[1:] / 5))


def test_few_frames_are_not_smoothed() -> None:
    weights = torch.eye(3)[None]
    assert warp(follow(weights).numpy()).tolist() == [0, 1, 2]


def test_runs_of_a_label_have_frames() -> None:
    assert list(runs([0, 0, 7, 7, 7, 0, 3])) == [(0, 0, 2), (7, 2, 5), (0, 5, 6), (3, 6, 7)]
    assert list(runs([])) == []


def test_words_without_a_time_share_the_gap() -> None:
    assert fill_gaps([None, None, (10, 12), None, (20, 21), None], 31) == [
        (0, 5), (5, 10), (10, 12), (12, 20), (20, 21), (21, 31),
    ]  # fmt: skip
    assert fill_gaps([None, None], 9) == [(0, 4), (4, 9)]
    assert fill_gaps([], 9) == []


def test_pauses_are_cut_off_words() -> None:
    wave = torch.zeros(100)
    wave[20:45] = 1.0  # Frames 2, 3 and half of 4 of ten samples each.
    wave[70:80] = 0.001
    spans = [Span("a", 0, 3), Span("b", 3, 6), Span("c", 6, 10), Span("d", 3, 3)]
    assert without_pauses(spans, wave[:95], 10) == [
        Span("a", 2, 3), Span("b", 3, 5), Span("c", 6, 10), Span("d", 3, 3),
    ]  # fmt: skip


def test_the_noise_of_a_recording_is_a_pause() -> None:
    wave = torch.full((2000,), 0.02)  # 34 dB below: more than the lower bound allows alone.
    wave[500:1500] = 1.0
    assert without_pauses([Span("a", 0, 200)], wave, 10) == [Span("a", 50, 150)]
    wave[:] = 0.5
    wave[500:1500] = 1.0
    assert without_pauses([Span("a", 0, 200)], wave, 10) == [Span("a", 0, 200)]


def test_recordings_are_cut_where_they_are_quiet() -> None:
    wave = torch.ones(1500)
    wave[520:540] = wave[1080:1100] = 0
    stretches = list(quiet_cuts(wave, 600))
    assert [start for start, _ in stretches] == [0, *(stop for _, stop in stretches[:-1])]
    assert stretches[-1][1] == 1500
    assert 520 <= stretches[0][1] <= 540
    assert 1080 <= stretches[1][1] <= 1100
    assert all(stop - start <= 600 for start, stop in stretches)
    assert list(quiet_cuts(wave, float("inf"))) == [(0, 1500)]
    assert list(quiet_cuts(wave, 1500)) == [(0, 1500)]
    assert list(quiet_cuts(wave[:0], 600)) == []
