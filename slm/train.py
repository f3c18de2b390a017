"""Training steps of the AR and the NAR for codec/training/supervised.py, and perplexity of plain
text."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from codec.training.loop import Losses
from slm.data.ar import ARBatch
from slm.data.nar import NARBatch
from slm.models.ar import SpeechLM
from slm.models.lm_head import IdRange, PositionGroup, group_logits
from slm.tokenization.tokenizer import SpeechTextTokenizer
from slm.tokenization.vocabulary import encode_texts


def ar_step(model: nn.Module, batch: ARBatch, num_targets: float) -> Losses:
    """Cross-entropy of codebook 1 (tts, continuation) and of text (asr, text), targets only."""
    scores = model(batch)
    return Losses(scores.nll.sum() / num_targets, scores._asdict())


def nar_step(model: nn.Module, batch: NARBatch, num_targets: float) -> Losses:
    """Cross-entropy of codebook 2 and of one codebook of the rest, behind the prompt."""
    scores = model(batch)
    return Losses(scores.nll.sum() / num_targets, scores._asdict())


def gather(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters of a prepared model by name, unpartitioned, on the CPU. All ranks call
    it.

    Only the main process gets them; ZeRO-3 gathers one at a time.
    """
    state: dict[str, Tensor] = {}
    plain: Any = accelerator.unwrap_model(model)
    for name, parameter in plain.named_parameters():
        if not parameter.requires_grad:
            continue
        with _gathered(parameter):
            if accelerator.is_main_process:
                state[name] = parameter.detach().cpu().clone()
    return state


def _gathered(parameter: nn.Parameter) -> Any:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=None)


@torch.inference_mode()
def text_perplexity(
    lm: Any, tokenizer: Any, texts: Sequence[str], *, rows: Literal["text", "all"] = "text",
    window: int = 512, positions: int = 2048,
) -> float:  # fmt: skip
    """exp of the mean negative log-likelihood of the texts' tokens, but the first of each window.

    `lm` is a SpeechLM or a base LLM, `tokenizer` the LLM's own or a SpeechTextTokenizer with it. A
    text is split into independent windows of at most `window` tokens (or the LLM's context length),
    without special tokens. A batch has at most `positions`
    positions, or one window.

    `rows` are the ids of the softmax. "text": those of the tokenizer, so that before training a
    SpeechLM and its base LLM are equal. "all": every row of the table; a SpeechLM has more of them,
    and its perplexity is higher by their probability, even before training.

    Raises:
        ValueError: a window of fewer than 2 tokens, or no text of at least 2.
    """
    if window < 2:
        raise ValueError(f"a window needs at least 2 tokens, got {window}")
    if isinstance(tokenizer, SpeechTextTokenizer):
        tokenizer = tokenizer.text_tokenizer
    model = lm.lm if isinstance(lm, SpeechLM) else lm
    window = min(window, getattr(model.config, "max_position_embeddings", window))
    table = model.get_output_embeddings().weight.shape[0]
    asked = IdRange(0, min(len(tokenizer), table) if rows == "text" else table, None)
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
    """Of windows sorted by length."""
    batch: list[list[int]] = []
    for ids in windows:
        if batch and len(ids) * (len(batch) + 1) > positions:
            yield batch
            batch = []
        batch.append(ids)
    yield batch


def _sum(model: Any, batch: Sequence[list[int]], rows: IdRange) -> float:
    """Negative log-likelihood of all tokens but the first ones."""
    device = next(model.parameters()).device
    longest = max(len(ids) for ids in batch)
    # Padding on the right: causal attention of the other tokens never reads it.
    padded = [ids + ids[:1] * (longest - len(ids)) for ids in batch]
    tokens = torch.tensor(padded, device=device)
    lengths = torch.tensor([len(ids) for ids in batch], device=device)
    known = torch.arange(1, longest + 1, device=device) < lengths[:, None]
    where = known.flatten().nonzero()[:, 0]
    (logits,) = group_logits(model, [PositionGroup(where, rows)], input_ids=tokens)
    following: Tensor = tokens.flatten()[where + 1]
    return (
        functional.cross_entropy(logits.float(), following, reduction="none").double().sum().item()
    )
