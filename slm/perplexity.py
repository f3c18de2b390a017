"""Perplexity of plain text: what an LLM knew, and still knows after it has learnt speech."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from slm.alphabet import Alphabet
from slm.ar import SpeechLM
from slm.head import Asked, Rows, logits_of
from slm.vocab import encode_texts


@torch.inference_mode()
def text_perplexity(
    lm: Any, tokenizer: Any, texts: Sequence[str], *, rows: Literal["text", "all"] = "text",
    window: int = 512, positions: int = 2048,
) -> float:  # fmt: skip
    """exp of the mean negative log-likelihood of the texts' tokens, but the first of each window.

    `lm` is a SpeechLM or a base LLM, `tokenizer` the LLM's own or an Alphabet that has it. A text
    is cut into windows of at most `window` tokens (fewer where the LLM holds fewer) that do not see
    each other; nothing is put before or behind it. A batch has at most `positions` positions, or
    one window.

    `rows` says what a token competes with. "text": the ids that the tokenizer knows, so that before
    training a SpeechLM and its base LLM are equal. "all": every row of the table; a SpeechLM has
    more of them, and its perplexity is higher by what it gives to them, even before training.
    """
    if window < 2:
        raise ValueError(f"a window needs at least 2 tokens, got {window}")
    if isinstance(tokenizer, Alphabet):
        tokenizer = tokenizer.tokenizer
    model = lm.lm if isinstance(lm, SpeechLM) else lm
    window = min(window, getattr(model.config, "max_position_embeddings", window))
    table = model.get_output_embeddings().weight.shape[0]
    asked = Rows(0, min(len(tokenizer), table) if rows == "text" else table, None)
    windows = [
        ids[start : start + window]
        for ids in encode_texts(tokenizer, texts)
        for start in range(0, len(ids), window)
    ]
    windows = sorted((ids for ids in windows if len(ids) > 1), key=len)
    if not windows:
        raise ValueError("no text of at least 2 tokens; give longer texts")
    was_training = lm.training
    lm.eval()
    try:
        sums = [_sum(model, batch, asked) for batch in _batches(windows, positions)]
    finally:
        lm.train(was_training)
    return math.exp(math.fsum(sums) / sum(len(ids) - 1 for ids in windows))


def _batches(windows: Sequence[list[int]], positions: int) -> Iterator[list[list[int]]]:
    """Of windows that come by length."""
    batch: list[list[int]] = []
    for ids in windows:
        if batch and len(ids) * (len(batch) + 1) > positions:
            yield batch
            batch = []
        batch.append(ids)
    yield batch


def _sum(model: Any, batch: Sequence[list[int]], rows: Rows) -> float:
    """Negative log-likelihood of all tokens but the first ones."""
    device = next(model.parameters()).device
    longest = max(len(ids) for ids in batch)
    # What pads on the right is seen by no token before it.
    padded = [ids + ids[:1] * (longest - len(ids)) for ids in batch]
    tokens = torch.tensor(padded, device=device)
    lengths = torch.tensor([len(ids) for ids in batch], device=device)
    known = torch.arange(1, longest + 1, device=device) < lengths[:, None]
    where = known.flatten().nonzero()[:, 0]
    (logits,) = logits_of(model, [Asked(where, rows)], input_ids=tokens)
    following: Tensor = tokens.flatten()[where + 1]
    return (
        functional.cross_entropy(logits.float(), following, reduction="none").double().sum().item()
    )
