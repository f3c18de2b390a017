"""slm/train.py: a model that has not been trained yet knows text as its base LLM does."""

import math
from pathlib import Path

import pytest
import torch
from tiny_slm import STAMP, WORDS, quiet, save_base
from torch.nn import functional

from slm.config import ARConfig, LoRAConfig
from slm.models.ar import SpeechLM, load_base
from slm.tokenization.vocabulary import encode_texts
from slm.train import text_perplexity

pytestmark = quiet()

TEXTS = [WORDS, "a cat", "", "x", "the hen ran far away, and the dog sat on a mat! " * 4]
KINDS = [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False)]


@pytest.mark.parametrize(("kind", "tied"), KINDS)
@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None])
@pytest.mark.parametrize("eos", [True, False])
def test_before_training_it_is_the_base_llms(
    tmp_path: Path, kind: str, tied: bool, lora: LoRAConfig | None, eos: bool
) -> None:
    folder = save_base(tmp_path / "base", kind=kind, tied=tied, eos=eos)
    base = load_base(folder)
    lm = SpeechLM.create(ARConfig(base=str(folder), lora=lora), STAMP, seed=0)
    before = text_perplexity(base.lm, base.tokenizer, TEXTS)
    assert text_perplexity(lm, lm.tokenizer, TEXTS) == pytest.approx(before, rel=1e-6)
    # The new rows take their share of the probability.
    whole = text_perplexity(base.lm, base.tokenizer, TEXTS, rows="all")
    assert before < whole < text_perplexity(lm, lm.tokenizer, TEXTS, rows="all")


def test_it_is_that_of_plain_logits_whatever_the_batches(tmp_path: Path) -> None:
    base = load_base(save_base(tmp_path, pad_rows=0))
    total, count = 0.0, 0
    for ids in encode_texts(base.tokenizer, TEXTS):
        for start in range(0, len(ids), 20):
            tokens = torch.tensor([ids[start : start + 20]])
            logits = base.lm(input_ids=tokens).logits[0, :-1]
            total += functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
            count += tokens.shape[1] - 1
    for positions in (1, 50, 2048):
        made = text_perplexity(base.lm, base.tokenizer, TEXTS, window=20, positions=positions)
        assert made == pytest.approx(math.exp(total / count), rel=1e-5)
    assert base.lm.train().training
    text_perplexity(base.lm, base.tokenizer, TEXTS)
    assert base.lm.training


def test_no_batch_is_larger_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(save_base(tmp_path))
    shapes = []
    plain = base.lm.base_model.forward

    def forward(input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return plain(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(base.lm.base_model, "forward", forward)
    text_perplexity(base.lm, base.tokenizer, TEXTS * 3, window=16, positions=40)
    assert len(shapes) > 5
    assert all(rows * length <= 40 and length <= 16 for rows, length in shapes)


def test_no_window_is_longer_than_what_the_llm_holds(tmp_path: Path) -> None:
    base = load_base(save_base(tmp_path, kind="gpt2"))
    texts = ["the cat sat on a mat " * 30]
    limit = base.lm.config.max_position_embeddings
    assert len(encode_texts(base.tokenizer, texts)[0]) > limit
    known = text_perplexity(base.lm, base.tokenizer, texts, window=limit)
    assert text_perplexity(base.lm, base.tokenizer, texts) == known


def test_what_has_no_perplexity_is_refused(tmp_path: Path) -> None:
    base = load_base(save_base(tmp_path))
    with pytest.raises(ValueError, match="no text of at least 2 tokens"):
        text_perplexity(base.lm, base.tokenizer, ["x", ""])
    with pytest.raises(ValueError, match="window needs at least 2"):
        text_perplexity(base.lm, base.tokenizer, TEXTS, window=1)


def test_old_tokens_keep_their_ids(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    base = load_base(folder)
    lm = SpeechLM.create(ARConfig(base=str(folder), lora=LoRAConfig(rank=2)), STAMP, seed=0)
    lm.save(tmp_path / "ar")
    for kept in (lm, SpeechLM.load(tmp_path / "ar")):
        tokenizer = kept.tokenizer.text_tokenizer
        assert tokenizer.get_vocab() == base.tokenizer.get_vocab()
        assert encode_texts(tokenizer, TEXTS) == encode_texts(base.tokenizer, TEXTS)
        assert kept.vocabulary.new_ids.start >= len(base.tokenizer)
