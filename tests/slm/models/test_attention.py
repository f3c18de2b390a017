"""attention.py: plain matrix products give what fused attention gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_slm import quiet
from torch.nn import functional

from slm.config import LoRAConfig
from slm.models import attention
from slm.models.ar import SpeechLM
from slm.models.attention import attend
from tests.slm.models.test_ar import make
from tests.slm.models.test_ar_losses import packed_data

pytestmark = quiet()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the rows of each call of fused attention."""
    lengths = []
    plain = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda *args, **options: lengths.append(args[0].shape[2]) or plain(*args, **options),
    )
    return lengths


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None])
@pytest.mark.parametrize("packed", [None, 160])
def test_losses_and_gradients_are_those_of_fused_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: list[int], lora: LoRAConfig | None,
    packed: int | None, kind: str,
) -> None:  # fmt: skip
    lm = make(tmp_path, lora, kind=kind).eval()
    data = packed_data(lm, tmp_path / "a.parquet", packed=packed)
    batch = data.collate([np.array([0]), np.array([8])])
    parameters = [p for p in lm.parameters() if p.requires_grad]
    made = []
    for longest, num_layers in ((attention.MAX_PLAIN_LENGTH, 0), (8, 2)):
        monkeypatch.setattr(attention, "MAX_PLAIN_LENGTH", longest)
        fused.clear()
        nll = lm(batch).nll
        assert len(fused) == num_layers
        made.append((nll, *torch.autograd.grad(nll.sum() / 100, parameters)))
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_training_back_end_is_neither_saved_nor_used_in_inference(
    tmp_path: Path, fused: list[int]
) -> None:
    lm = make(tmp_path, None)
    tokens = torch.zeros(1, 9, dtype=torch.long)
    fused.clear()
    with torch.no_grad():
        lm.lm(input_ids=tokens)
    assert fused == [9, 9]
    lm.save(tmp_path / "ar")
    assert attention.BACKEND not in (tmp_path / "ar" / "config.json").read_text()
    assert SpeechLM.load(tmp_path / "ar").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_equals_fused_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(3, 2, 17, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    valid = torch.arange(17) < torch.tensor([17, 5, 1])[:, None, None, None]
    ours = attend(*parts, valid)
    fused = functional.scaled_dot_product_attention(*parts, attn_mask=valid)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.05}
    torch.testing.assert_close(ours, fused, **tolerance)
    gradient = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, parts, gradient),
        torch.autograd.grad(fused, parts, gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **tolerance)


def test_attend_uses_plain_products_for_short_rows_in_training(fused: list[int]) -> None:
    for length in (512, 513):
        rows = torch.randn(1, 1, length, 2)
        valid = torch.ones(1, 1, 1, length, dtype=torch.bool)
        attend(rows, rows, rows, valid)
        with torch.no_grad():
            attend(rows, rows, rows, valid)
    assert fused == [512, 513, 513]
