"""sampling.py: a static cache holds what a dynamic one holds, in the same memory all along."""

from typing import Any

import pytest
import torch
from tiny_slm import save_base

from slm.generation.sampling import keep_rows, make_cache
from slm.models.ar import load_base


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_base(save_base(tmp_path_factory.mktemp("base"), kind=request.param)).lm.eval()


@torch.inference_mode()
def follow(llm: Any, cache: Any) -> list[torch.Tensor]:
    """Logits over five steps; after two of them the item in the middle leaves."""
    tokens = torch.arange(12).view(3, 4)
    found = []
    for step in range(5):
        found.append(llm(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1])
        tokens = tokens[:, -1:] + 1
        if step == 1:
            keep_rows(cache, [0, 2], torch.device("cpu"))
            tokens = tokens[[0, 2]]
    return found


def test_both_hold_the_same(llm: Any) -> None:
    dynamic, static = (make_cache(kind, llm.config, 8) for kind in ("dynamic", "static"))
    for ours, theirs in zip(follow(llm, static), follow(llm, dynamic), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(static.layers, dynamic.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape == (2, *theirs.keys.shape[1:3], 8)
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)


def test_a_static_cache_stays_where_it_is_and_has_an_end(llm: Any) -> None:
    cache = make_cache("static", llm.config, 6)
    with torch.inference_mode():
        llm(input_ids=torch.arange(4)[None], past_key_values=cache, use_cache=True)
        places = [layer.keys.data_ptr() for layer in cache.layers]
        llm(input_ids=torch.arange(2)[None], past_key_values=cache, use_cache=True)
        assert [layer.keys.data_ptr() for layer in cache.layers] == places
        with pytest.raises(AssertionError, match="7 positions in a cache of 6"):
            llm(input_ids=torch.arange(1)[None], past_key_values=cache, use_cache=True)


def test_layers_of_another_kind_stay_what_they_are() -> None:
    from transformers import MistralConfig

    cache = make_cache("static", MistralConfig(num_hidden_layers=2, sliding_window=4), 100)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer"] * 2
