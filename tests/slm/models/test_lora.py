"""slm/models/lora.py: exact at full rank, the best approximation below."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_slm import quiet, save_base

from slm.config import TextConfig
from slm.data.coverage import Coverage
from slm.models.ar import SpeechLM
from slm.models.lora import as_adapters, factorize, used_rows
from tests.slm.export.test_causal_lm import trained

pytestmark = quiet()

SPELT = TextConfig(tts_form="characters", asr_form="characters", normalize=False)
COVERAGE = Coverage.of(["the cat", "a dog"], 50)


def ids_of(lm: SpeechLM) -> torch.Tensor:
    """Ids of texts of the coverage, and of speech."""
    (text,) = lm.tokenizer.text_ids("tts", ["the cat a dog"])
    return torch.tensor([[*text, *lm.vocabulary.new_ids]])


def test_factors_are_the_best_approximation_of_their_rank() -> None:
    torch.manual_seed(0)
    change = torch.randn(6, 9)
    values = torch.linalg.svdvals(change)
    for rank in (1, 3, 6, 8):
        a, b = factorize(change, rank)
        assert a.shape == (rank, 9)
        assert b.shape == (6, rank)
        left = values[rank:].square().sum().sqrt()
        torch.testing.assert_close((change - b @ a).norm(), left, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.norm(), b.norm())


@pytest.mark.parametrize("tied", [True, False])
def test_at_full_rank_the_logits_are_the_same(tmp_path: Path, tied: bool) -> None:
    lm = trained(tmp_path, lora=False, text=SPELT, tied=tied)
    adapted = as_adapters(lm, tmp_path / "base", 64, COVERAGE)
    adapted.save(tmp_path / "small")
    loaded = SpeechLM.load(tmp_path / "small")
    ids = ids_of(lm)
    rows = used_rows(lm, COVERAGE)
    with torch.no_grad():
        before, after = (one.lm(ids).logits[..., rows] for one in (lm, loaded))
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


def test_a_lower_rank_has_a_larger_error(tmp_path: Path) -> None:
    lm = trained(tmp_path, lora=False, text=SPELT)
    ids, distances = ids_of(lm), []
    for rank in (1, 4, 16):
        adapted = as_adapters(lm, tmp_path / "base", rank, COVERAGE)
        with torch.no_grad():
            change = adapted.lm(ids).logits - lm.lm(ids).logits
        distances.append(change[..., list(lm.vocabulary.new_ids)].norm().item())
    assert distances == sorted(distances, reverse=True)


def test_rows_are_those_of_the_texts_characters(tmp_path: Path) -> None:
    lm = trained(tmp_path, lora=False, text=SPELT)
    rows = used_rows(lm, COVERAGE)
    assert set(lm.vocabulary.new_ids) <= set(rows)
    assert set(lm.tokenizer.text_range("asr")) <= set(rows)
    assert lm.tokenizer.text_tokenizer.convert_tokens_to_ids("at") not in rows
    spoken = replace(SPELT, tts_form="phonemes")
    phonemes = trained(tmp_path / "phonemes", lora=False, text=spoken)
    assert len(used_rows(phonemes, COVERAGE)) > len(rows)
    words = trained(tmp_path / "words", lora=False)
    assert len(used_rows(words, COVERAGE)) == words.vocabulary.num_text + len(
        words.vocabulary.new_ids
    )


def test_models_that_adapters_cannot_represent_are_refused(tmp_path: Path) -> None:
    adapted = trained(tmp_path / "a")
    with pytest.raises(ValueError, match="was trained with LoRA adapters"):
        as_adapters(adapted, tmp_path / "a" / "base", 4, COVERAGE)
    lm = trained(tmp_path / "b", lora=False)
    other = save_base(tmp_path / "other", seed=3)
    with pytest.raises(ValueError, match="not the LLM that the AR was trained from"):
        as_adapters(lm, other, 4, COVERAGE)
    transposed = trained(tmp_path / "c", lora=False, kind="gpt2")
    with pytest.raises(ValueError, match="adapters cannot represent it"):
        as_adapters(transposed, tmp_path / "c" / "base", 4, COVERAGE)
