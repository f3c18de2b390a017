"""slm/models/lm_head.py: logits equal the LLM's own, and no other rows are multiplied."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_slm import STAMP, quiet, save_base
from torch import nn
from torch.nn import functional

from slm.config import ARConfig, LoRAConfig
from slm.models.ar import SpeechLM, load_base
from slm.models.lm_head import (
    IdRange,
    PositionGroup,
    _gathered,
    check_head,
    group_logits,
    next_logits,
    speech_ids,
    text_ids,
)

pytestmark = quiet()

LORA = LoRAConfig(rank=2)
KINDS = [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False)]


def make(folder: Path, lora: LoRAConfig | None = LORA, **kwargs) -> SpeechLM:
    base = save_base(folder / "base", **kwargs)
    lm = SpeechLM.create(ARConfig(base=str(base), lora=lora), STAMP, seed=0)
    with torch.no_grad():  # As after some training: adapters do something, trained rows differ.
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return lm


def groups_of(lm: SpeechLM) -> list[PositionGroup]:
    where = torch.arange(14).reshape(2, 7)
    return [
        PositionGroup(where[:, 2:5].flatten(), speech_ids(lm.tokenizer)),
        PositionGroup(where[:, 5], text_ids(lm.tokenizer, "text")),
    ]


def ids_of(ids: IdRange) -> torch.Tensor:
    return torch.cat([torch.arange(*span) for span in ids.spans])


TOKENS = torch.randint(0, 290, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "tied"), KINDS)
@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize("eos", [True, False])
def test_logits_and_gradients_equal_those_of_the_full_head(
    tmp_path: Path, kind: str, tied: bool, lora: LoRAConfig | None, eos: bool
) -> None:
    lm = make(tmp_path, lora, kind=kind, tied=tied, eos=eos).eval()
    asked = groups_of(lm)
    parameters = [p for p in lm.parameters() if p.requires_grad]
    some = group_logits(lm.lm, asked, input_ids=TOKENS)
    whole = lm.lm(input_ids=TOKENS).logits.flatten(0, 1)
    expected = [whole[where][:, ids_of(rows)] for where, rows in asked]
    gradients = []
    for logits in (some, expected):
        loss = sum(functional.cross_entropy(each, torch.arange(len(each))) for each in logits)
        gradients.append(torch.autograd.grad(loss, parameters))
    for one, other in zip(some, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [LORA, None])
def test_no_other_row_is_multiplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, lora: LoRAConfig | None
) -> None:
    lm = make(tmp_path, lora, tied=tied)
    products = []
    plain = functional.linear

    def linear(x, weight, bias=None):
        # No other layer is so wide, or as wide as the codes and their end.
        if weight.shape[0] > 128 or weight.shape[0] == STAMP.codebook_sizes[0] + 1:
            products.append((x.shape[-2], weight.shape[0]))
        return plain(x, weight, bias)

    monkeypatch.setattr(functional, "linear", linear)
    group_logits(lm.lm, groups_of(lm), input_ids=TOKENS)
    assert products == [(6, STAMP.codebook_sizes[0] + 1), (2, lm.vocabulary.num_text)]


@pytest.mark.parametrize("lora", [LORA, None])
def test_rows_without_targets_are_in_the_graph(tmp_path: Path, lora: LoRAConfig | None) -> None:
    """Ranks differ in their batches, but must have gradients of the same parameters."""
    lm = make(tmp_path, lora, tied=False)
    nothing = [PositionGroup(each.positions[:0], each.ids) for each in groups_of(lm)]
    sum(each.sum() for each in group_logits(lm.lm, nothing, input_ids=TOKENS)).backward()
    trained = [p for p in lm.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_reach_only_the_rows_in_use(tmp_path: Path, tied: bool) -> None:
    lm = make(tmp_path, None, tied=tied)
    speech, _ = groups_of(lm)
    nothing = PositionGroup(torch.arange(0), text_ids(lm.tokenizer, "text"))
    logits = group_logits(lm.lm, [speech, nothing], input_ids=TOKENS)
    (logits[0].square().sum() + logits[1].sum()).backward()
    gradient = lm.lm.get_output_embeddings().weight.grad
    seen = TOKENS[:, :5].flatten().tolist() if tied else []
    used = {*ids_of(speech.ids).tolist(), *seen}
    assert set(gradient.abs().sum(1).nonzero()[:, 0].tolist()) == used


def test_a_head_with_a_rule_of_its_own_is_refused(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 3

    lm = load_base(save_base(tmp_path)).lm
    check_head(lm, "LLM")
    lm.get_output_embeddings().__class__ = Scaled
    with pytest.raises(ValueError, match="LLM: changes the logits of its head"):
        check_head(lm, "LLM")


def test_a_bias_of_the_head_is_added(tmp_path: Path) -> None:
    lm = make(tmp_path, None, tied=False).eval()
    head = lm.lm.get_output_embeddings()
    head.bias = nn.Parameter(torch.randn(len(head.weight)))
    groups = groups_of(lm)
    full = lm.lm(input_ids=TOKENS).logits.flatten(0, 1)
    found = group_logits(lm.lm, groups, input_ids=TOKENS)
    for logits, (positions, ids) in zip(found, groups, strict=True):
        torch.testing.assert_close(logits, full[positions][:, ids_of(ids)], rtol=1e-5, atol=1e-5)


def tiny(kind: str) -> Any:
    import transformers

    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    name, more = {
        "gemma3": ("Gemma3Text", {"final_logit_softcapping": 0.5}),
        "cohere": ("Cohere", {"logit_scale": 3.0}),
        "granite": ("Granite", {"logits_scaling": 3.0}),
        "hyperclovax": ("HyperCLOVAX", {"logits_scaling": 3.0}),
        "falcon_h1": ("FalconH1", {"lm_head_multiplier": 3.0}),
    }[kind]
    config = getattr(transformers, f"{name}Config")(**sizes, **more)
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        lm.get_output_embeddings().weight.normal_()
    return lm


@pytest.mark.parametrize("kind", ["gemma3", "cohere", "granite", "hyperclovax"])
def test_known_rules_of_logits_are_applied(kind: str) -> None:
    lm = tiny(kind)
    check_head(lm, kind)
    tokens = TOKENS % 40
    full = lm(input_ids=tokens).logits
    ids = IdRange(3, 17, 20)
    rows = [*range(3, 17), 20]
    group = PositionGroup(torch.arange(14), ids)
    (found,) = group_logits(lm, [group], input_ids=tokens)
    torch.testing.assert_close(found, full.flatten(0, 1)[:, rows])
    torch.testing.assert_close(next_logits(lm, ids, input_ids=tokens), full[:, -1, rows])


def test_an_unknown_rule_of_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="falcon: changes the logits of its head"):
        check_head(tiny("falcon_h1"), "falcon")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_the_table_is_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(ValueError, match=f"{target} is the table of tokens"):
        make(tmp_path, LoRAConfig(rank=2, targets=("q_proj", target)))


@torch.no_grad()
def test_threads_share_a_head(tmp_path: Path) -> None:
    lm = make(tmp_path).eval()
    groups = groups_of(lm)
    expected = [group_logits(lm.lm, [one], input_ids=TOKENS)[0] for one in groups]
    last = [next_logits(lm.lm, one.ids, input_ids=TOKENS, use_cache=False) for one in groups]
    start = threading.Barrier(4)

    @torch.no_grad()
    def work(number: int) -> bool:
        group, plain = groups[number % 2], expected[number % 2]
        start.wait()
        for _ in range(25):
            if number < 2:
                made, plain = next_logits(lm.lm, group.ids, input_ids=TOKENS), last[number]
            else:
                (made,) = group_logits(lm.lm, [group], input_ids=TOKENS)
            if made.shape != plain.shape or not torch.equal(made, plain):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_an_end_token_outside_the_range_has_the_last_column() -> None:
    assert IdRange(4, 9, 2).columns(torch.tensor([4, 8, 2])).tolist() == [0, 4, 5]
    assert IdRange(4, 9, 6).columns(torch.tensor([4, 8, 6])).tolist() == [0, 4, 2]
    assert IdRange(4, 9, 2).spans == [(4, 9), (2, 3)]
    assert IdRange(4, 9, None).spans == IdRange(4, 9, 6).spans == [(4, 9)]
    assert IdRange(4, 9, 4).spans == [(4, 9)]
    assert IdRange(4, 9, 9).spans == [(4, 9), (9, 10)]


def test_parameters_that_zero_3_has_partitioned_are_gathered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero")
    status = pytest.importorskip("deepspeed.runtime.zero.partition_parameters").ZeroParamStatus
    asked = []
    monkeypatch.setattr(
        zero, "GatheredParameters", lambda *given, **more: asked.append((given, more))
    )
    head, owner = nn.Linear(2, 3), nn.Linear(1, 1)
    with _gathered(head, owner):
        assert not asked
    head.weight.ds_id, head.weight.ds_status = 1, status.NOT_AVAILABLE
    head.bias.ds_id, head.bias.ds_status = 2, status.AVAILABLE
    _gathered(head, owner)
    head.weight.ds_status = status.AVAILABLE
    _gathered(head, owner)
    first, second = asked
    assert first[0][0][0] is head.weight
    assert (len(first[0][0]), first[1]) == (1, {"fwd_module": owner, "enabled": True})
    assert second == (([],), {"fwd_module": owner, "enabled": False})


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_with_trained_rows_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    lm = make(tmp_path, tied=tied)
    adapter = lm.lm.get_output_embeddings().token_adapter
    monkeypatch.setattr(adapter, "get_merged_weights", lambda _: pytest.fail("it was copied"))
    group_logits(lm.lm, groups_of(lm), input_ids=TOKENS)
