"""recipes/tools/overfit_check.py."""

from types import SimpleNamespace

import numpy as np
import pytest

from recipes.tools import overfit_check


def test_share_of_equal_codes_counts_missing_and_surplus_frames() -> None:
    target = np.array([[3, 4, 5, 6]])

    def share(predicted: list[int]) -> float:
        return overfit_check.share_of_equal([np.array([predicted])], [target])

    assert share([3, 4, 5, 6]) == 1.0
    assert share([3, 4, 0, 0]) == 0.5
    assert share([3, 4]) == 0.5
    assert share([3, 4, 5, 6, 7, 8, 9, 9]) == 0.5
    two = np.array([[1, 1, 1, 1], [2, 2, 2, 2]])
    assert overfit_check.share_of_equal([np.array([[1, 1, 1, 1], [2, 2, 0, 0]])], [two]) == 0.75


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_overfit_check_uses_a_gpu_if_there_is_one(
    available: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_path: str, *, device: str) -> None:
        raise ValueError(f"loaded on {device}")

    monkeypatch.setattr(overfit_check.torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(overfit_check, "Voice", SimpleNamespace(from_pretrained=load))
    with pytest.raises(ValueError, match=f"loaded on {device}"):
        overfit_check.main([])
