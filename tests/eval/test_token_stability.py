import numpy as np
import pytest

from eval.token_stability import unchanged_codes


def test_share_per_codebook_over_common_frames() -> None:
    original = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.uint16)
    changed = np.array([[1, 2, 3, 4, 9], [5, 0, 0, 0, 9]], np.int64)
    assert unchanged_codes(original, changed).tolist() == [1, 0.25]
    assert unchanged_codes(changed, original[:, :2]).tolist() == [1, 0.5]


def test_codes_that_cannot_be_compared_are_refused() -> None:
    codes = np.zeros((2, 3), np.int64)
    with pytest.raises(ValueError, match="codes of 2 and of 1 codebooks"):
        unchanged_codes(codes, codes[:1])
    with pytest.raises(ValueError, match="codes without a frame"):
        unchanged_codes(codes, codes[:, :0])
