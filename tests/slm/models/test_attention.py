"""attention.py: plain products give what fused attention gives, where they take its place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_slm import STAMP, quiet
from torch.nn import functional

from slm.config import ARConfig, LoRAConfig
from slm.models import attention
from slm.models.ar import SpeechLM
from slm.models.attention import attend, attention_of
from tests.slm.models.test_ar import make
from tests.slm.models.test_ar_losses import packed_data

pytestmark = quiet()


@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None])
@pytest.mark.parametrize("packed", [None, 160])
def test_losses_and_gradients_are_those_of_fused_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoRAConfig | None, packed: int | None
) -> None:
    lm = make(tmp_path, lora).eval()
    data = packed_data(lm, tmp_path / "a.parquet", packed=packed)
    batch = data.collate([np.array([0]), np.array([8])])
    parameters = [p for p in lm.parameters() if p.requires_grad]
    used, made = [], []
    forward = lm.lm.forward

    def told(*inputs, **named):
        used.append(lm.config._attn_implementation)
        return forward(*inputs, **named)

    monkeypatch.setattr(lm.lm, "forward", told)
    for longest in (attention.LONGEST_PLAIN, 8):
        monkeypatch.setattr(attention, "LONGEST_PLAIN", longest)
        nll = lm(batch).nll
        made.append((nll, *torch.autograd.grad(nll.sum() / 100, parameters)))
    assert used == ["eager", "sdpa"]
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_only_training_on_a_cpu_takes_plain_products(tmp_path: Path) -> None:
    lm = make(tmp_path, None)

    def inside(tokens: torch.Tensor) -> str:
        with attention_of(lm.lm, tokens):
            return lm.config._attn_implementation

    assert inside(torch.zeros(1, 512, dtype=torch.long)) == "eager"
    assert inside(torch.zeros(1, 513, dtype=torch.long)) == "sdpa"
    assert inside(torch.zeros(1, 9, dtype=torch.long, device="meta")) == "sdpa"
    with torch.no_grad():
        assert inside(torch.zeros(1, 9, dtype=torch.long)) == "sdpa"
    # Activations that are computed again must be those of the first time.
    again = SpeechLM.create(
        ARConfig(base=str(tmp_path / "base"), lora=None, gradient_checkpointing=True), STAMP, seed=0
    )
    with attention_of(again.lm, torch.zeros(1, 9, dtype=torch.long)):
        assert again.config._attn_implementation == "sdpa"
    lm.config.alibi = True  # Whose two ways are not the same in transformers.
    assert inside(torch.zeros(1, 9, dtype=torch.long)) == "sdpa"
    lm.config.alibi = False
    with pytest.raises(RuntimeError), attention_of(lm.lm, torch.zeros(1, 9, dtype=torch.long)):
        raise RuntimeError
    assert lm.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_nars_attention_is_the_fused_one(dtype: torch.dtype) -> None:
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


def test_the_nar_takes_plain_products_in_training_of_short_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused = []
    plain = functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda *a, **k: fused.append(a[0].shape[2]) or plain(*a, **k),
    )
    for length in (512, 513):
        rows = torch.randn(1, 1, length, 2)
        valid = torch.ones(1, 1, 1, length, dtype=torch.bool)
        attend(rows, rows, rows, valid)
        with torch.no_grad():
            attend(rows, rows, rows, valid)
    assert fused == [512, 513, 513]
