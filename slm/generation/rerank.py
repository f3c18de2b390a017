"""What the model's own ASR makes of speech: transcripts, and how likely a text is given it."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from numpy import ndarray
from torchaudio.functional import edit_distance

from slm.data.sequences import asr_context
from slm.generation.asr import hear, num_given
from slm.models.ar import SpeechLM
from slm.models.lm_head import PositionGroup, group_logits, text_ids

POSITIONS = 8192
"""Padded positions that are scored at once: bounds the memory."""


def can_transcribe(lm: SpeechLM) -> bool:
    """Whether the model was trained on ASR (older voices do not say, and were)."""
    try:
        lm.check_task("asr")
    except ValueError:
        return False
    return True


def transcripts(lm: SpeechLM, codes: Sequence[Int[ndarray, " _"]]) -> list[str]:
    """The likeliest transcript of each (codes of codebook 1), in one batch; of speech that is too
    long for the model, or of none, nothing."""
    texts = [""] * len(codes)
    fitting = [
        index
        for index, one in enumerate(codes)
        if len(one) > 0 and num_given(lm.tokenizer, one) < lm.max_positions
    ]
    if fitting:
        made = hear(lm, [codes[index] for index in fitting])
        for index, one in zip(fitting, made, strict=True):
            texts[index] = one.text
    return texts


@torch.inference_mode()
def text_scores(
    lm: SpeechLM, texts: Sequence[str], codes: Sequence[Int[ndarray, " _"]]
) -> list[float]:
    """How likely each text is given its speech (codes of codebook 1): the mean log-probability of
    the transcript's tokens and its end among all that a transcript may have.

    The mean, so that texts of different lengths compare; 0 is certainty. Speech that is too long
    for the model gets -inf. Cost: one pass over the speech and the text, of which the head sees the
    text's positions and rows alone; no generation. A model that hears by stretches
    (ar.text.interleaved) would have to be told which words are over when: of one it is, below 0,
    the share of letters that its own transcript has otherwise, and that must be generated. Raises
    ValueError for a model without ASR.
    """
    lm.check_task("asr")
    tokenizer = lm.tokenizer
    if tokenizer.text.interleaved:
        pairs = zip(texts, transcripts(lm, codes), strict=True)
        return [-_share_wrong(tokenizer.in_words(text), heard) for text, heard in pairs]
    written = tokenizer.text_ids("asr", texts)
    spoken = [tokenizer.speech_ids("asr", one) for one in codes]
    contexts = [asr_context(tokenizer.vocabulary, one) for one in spoken]
    scores = [-float("inf")] * len(texts)
    targets = [[*ids, tokenizer.vocabulary.eos] for ids in written]
    rows = [[*c, *t] for c, t in zip(contexts, targets, strict=True)]
    fitting = [index for index, row in enumerate(rows) if len(row) <= lm.max_positions]
    # The longest first, so that like lengths are padded together.
    fitting.sort(key=lambda index: -len(rows[index]))
    while fitting:
        count = max(1, POSITIONS // len(rows[fitting[0]]))
        part, fitting = fitting[:count], fitting[count:]
        found = _scores(lm, [rows[i] for i in part], [len(targets[i]) for i in part])
        for index, score in zip(part, found, strict=True):
            scores[index] = score
    return scores


def _share_wrong(text: str, heard: str) -> float:
    return edit_distance(text.lower(), heard.lower()) / max(1, len(text))


def _scores(lm: SpeechLM, rows: Sequence[Sequence[int]], num_targets: Sequence[int]) -> list[float]:
    """Means over the last `num_targets` tokens of each row."""
    vocabulary = lm.vocabulary
    longest = max(map(len, rows))
    # Padded behind: what comes later is not seen, so that nothing needs a mask.
    tokens = torch.full((len(rows), longest), vocabulary.eos)
    where, labels = [], []
    for index, (row, count) in enumerate(zip(rows, num_targets, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        # Each position foretells the next one.
        first = index * longest + len(row) - count - 1
        where += range(first, first + count)
        labels += row[-count:]
    device = next(lm.parameters()).device
    chosen = text_ids(lm.tokenizer, "asr")
    group = PositionGroup(torch.tensor(where, device=device), chosen)
    (logits,) = group_logits(lm.lm, [group], input_ids=tokens.to(device))
    columns = chosen.columns(torch.tensor(labels, device=device))
    told = logits.float().log_softmax(-1).gather(1, columns[:, None])[:, 0]
    return [float(part.mean()) for part in told.split(list(num_targets))]
