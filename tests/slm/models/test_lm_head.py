"""lm_head.py: the logits of what is asked for are the LLM's own, and nothing else is computed."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_slm import STAMP, quiet, save_base
from torch import nn
from torch.nn import functional

from slm.config import ARConfig, LoRAConfig
from slm.models.ar import SpeechLM
from slm.models.lm_head import Asked, Rows, logits_of, next_logits, speech_rows, text_rows

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


def ask(lm: SpeechLM) -> list[Asked]:
    where = torch.arange(14).reshape(2, 7)
    return [
        Asked(where[:, 2:5].flatten(), speech_rows(lm.tokenizer)),
        Asked(where[:, 5], text_rows(lm.tokenizer, "text")),
    ]


def ids_of(rows: Rows) -> torch.Tensor:
    return torch.cat([torch.arange(*span) for span in rows.spans])


TOKENS = torch.randint(0, 290, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "tied"), KINDS)
@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize("eos", [True, False])
def test_logits_and_gradients_are_those_of_the_whole_head(
    tmp_path: Path, kind: str, tied: bool, lora: LoRAConfig | None, eos: bool
) -> None:
    lm = make(tmp_path, lora, kind=kind, tied=tied, eos=eos).eval()
    asked = ask(lm)
    parameters = [p for p in lm.parameters() if p.requires_grad]
    some = logits_of(lm.lm, asked, input_ids=TOKENS)
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
    logits_of(lm.lm, ask(lm), input_ids=TOKENS)
    assert products == [(6, STAMP.codebook_sizes[0] + 1), (2, lm.vocabulary.num_text)]


@pytest.mark.parametrize("lora", [LORA, None])
def test_what_no_target_needs_is_in_the_graph_all_the_same(
    tmp_path: Path, lora: LoRAConfig | None
) -> None:
    """Ranks differ in their batches, but must go back through the same parameters."""
    lm = make(tmp_path, lora, tied=False)
    nothing = [Asked(each.where[:0], each.rows) for each in ask(lm)]
    sum(each.sum() for each in logits_of(lm.lm, nothing, input_ids=TOKENS)).backward()
    trained = [p for p in lm.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_reach_only_the_rows_in_use(tmp_path: Path, tied: bool) -> None:
    lm = make(tmp_path, None, tied=tied)
    speech, _ = ask(lm)
    nothing = Asked(torch.arange(0), text_rows(lm.tokenizer, "text"))
    logits = logits_of(lm.lm, [speech, nothing], input_ids=TOKENS)
    (logits[0].square().sum() + logits[1].sum()).backward()
    gradient = lm.lm.get_output_embeddings().weight.grad
    seen = TOKENS[:, :5].flatten().tolist() if tied else []
    used = {*ids_of(speech.rows).tolist(), *seen}
    assert set(gradient.abs().sum(1).nonzero()[:, 0].tolist()) == used


def test_a_head_of_another_kind_is_computed_whole(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 3

    lm = make(tmp_path, None).eval()
    lm.lm.get_output_embeddings().__class__ = Scaled
    asked = ask(lm)
    whole = lm.lm(input_ids=TOKENS).logits.flatten(0, 1)
    for logits, (where, rows) in zip(logits_of(lm.lm, asked, input_ids=TOKENS), asked, strict=True):
        torch.testing.assert_close(logits, whole[where][:, ids_of(rows)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_the_table_is_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(ValueError, match=f"{target} is the table of tokens"):
        make(tmp_path, LoRAConfig(rank=2, targets=("q_proj", target)))


def test_what_the_llm_does_to_logits_is_done(tmp_path: Path, monkeypatch) -> None:
    lm = make(tmp_path).eval()
    plain = logits_of(lm.lm, ask(lm), input_ids=TOKENS)
    inner = lm.lm.get_base_model()
    before = inner.forward

    def capped(*args, **kwargs):
        out = before(*args, **kwargs)
        out.logits = torch.tanh(out.logits / 5) * 5
        return out

    monkeypatch.setattr(inner, "forward", capped)
    for one, other in zip(logits_of(lm.lm, ask(lm), input_ids=TOKENS), plain, strict=True):
        torch.testing.assert_close(one, torch.tanh(other / 5) * 5)


def test_the_head_is_itself_again(tmp_path: Path) -> None:
    lm = make(tmp_path).eval()
    before = lm.lm(input_ids=TOKENS).logits
    logits_of(lm.lm, ask(lm), input_ids=TOKENS)
    with pytest.raises(IndexError):
        logits_of(lm.lm, ask(lm), input_ids=torch.full((1, 7), 10_000))
    assert torch.equal(lm.lm(input_ids=TOKENS).logits, before)


def test_threads_share_a_head(tmp_path: Path) -> None:
    lm = make(tmp_path).eval()
    groups = ask(lm)
    expected = [logits_of(lm.lm, [one], input_ids=TOKENS)[0] for one in groups]
    last = [next_logits(lm.lm, one.rows, input_ids=TOKENS, use_cache=False) for one in groups]
    start = threading.Barrier(4)

    @torch.no_grad()
    def work(number: int) -> bool:
        group, plain = groups[number % 2], expected[number % 2]
        start.wait()
        for _ in range(25):
            if number < 2:
                made, plain = next_logits(lm.lm, group.rows, input_ids=TOKENS), last[number]
            else:
                (made,) = logits_of(lm.lm, [group], input_ids=TOKENS)
            if made.shape != plain.shape or not torch.equal(made, plain):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    # The lock belongs to the module, but is no part of it.
    copied = copy.deepcopy(lm.lm)
    assert torch.equal(logits_of(copied, groups[:1], input_ids=TOKENS)[0], expected[0])
    pickle.dumps(lm.lm)
    assert "forward" not in vars(lm.lm.get_output_embeddings())


def test_a_pass_inside_a_pass_does_not_wait_for_itself(tmp_path: Path) -> None:
    lm = make(tmp_path).eval()
    (plain,) = logits_of(lm.lm, ask(lm)[:1], input_ids=TOKENS)
    inner: list[torch.Tensor] = []

    def look(*_: object) -> None:
        if not inner:
            inner.append(TOKENS)
            inner[0] = logits_of(lm.lm, ask(lm)[:1], input_ids=TOKENS)[0]

    handle = lm.lm.get_input_embeddings().register_forward_hook(look)
    (outer,) = logits_of(lm.lm, ask(lm)[:1], input_ids=TOKENS)
    handle.remove()
    assert torch.equal(outer, plain)
    assert torch.equal(inner[0], plain)


def test_columns_put_an_end_apart_last() -> None:
    assert Rows(4, 9, 2).columns(torch.tensor([4, 8, 2])).tolist() == [0, 4, 5]
    assert Rows(4, 9, 6).columns(torch.tensor([4, 8, 6])).tolist() == [0, 4, 2]
    assert Rows(4, 9, 2).spans == [(4, 9), (2, 3)]
    assert Rows(4, 9, None).spans == Rows(4, 9, 6).spans == [(4, 9)]
