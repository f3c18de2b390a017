"""Transcripts and text likelihoods by the model's own ASR, for checks and best-of-N."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from numpy import ndarray
from torchaudio.functional import edit_distance

from slm.generation.asr import transcribe
from slm.models.ar import SpeechLM
from slm.models.lm_head import PositionGroup, group_logits, text_ids
from slm.tokenization.text_normalization import NormalizedText

POSITIONS = 8192
"""Padded positions of a pass; bounds the memory."""


def can_transcribe(lm: SpeechLM) -> bool:
    """Whether the model was trained on ASR; older voices all were."""
    try:
        lm.check_task("asr")
    except ValueError:
        return False
    return True


def transcripts(lm: SpeechLM, codes: Sequence[Int[ndarray, " _"]]) -> list[str]:
    """Greedy transcripts of codes of codebook 1, in one batch; empty for speech that is empty or
    too long for the model."""
    texts = [""] * len(codes)
    fitting = [
        index
        for index, one in enumerate(codes)
        if len(one) > 0 and len(lm.format.asr_context(one).ids) < lm.max_positions
    ]
    if fitting:
        made = transcribe(lm, [codes[index] for index in fitting])
        for index, one in zip(fitting, made, strict=True):
            texts[index] = one.text
    return texts


@torch.inference_mode()
def text_scores(
    lm: SpeechLM, texts: Sequence[NormalizedText], codes: Sequence[Int[ndarray, " _"]]
) -> list[float]:
    """Mean log-probability of each text's tokens and end token given its speech (codes of
    codebook 1), over the ids that a transcript may have; -inf for speech that is too long.

    The mean makes texts of different lengths comparable. Cost: one pass over speech and text, with
    the head at the text's positions only; no generation. An interleaved model would need the words'
    ends: its score is minus the character error rate of its own transcript, which is generated.

    Raises:
        ValueError: for a model without ASR.
    """
    lm.check_task("asr")
    if not lm.format.scores_text:
        pairs = zip(texts, transcripts(lm, codes), strict=True)
        return [-_character_error_rate(text.text, transcript) for text, transcript in pairs]
    ids = lm.tokenizer.text_ids("asr", [text.original for text in texts])
    targets = [[*one, lm.vocabulary.eos] for one in ids]
    contexts = [lm.format.asr_context(one).tokens for one in codes]
    rows = [[*c, *t] for c, t in zip(contexts, targets, strict=True)]
    scores = [-float("inf")] * len(texts)
    fitting = [index for index, row in enumerate(rows) if len(row) <= lm.max_positions]
    # By length, so that batches have little padding.
    fitting.sort(key=lambda index: -len(rows[index]))
    while fitting:
        count = max(1, POSITIONS // len(rows[fitting[0]]))
        part, fitting = fitting[:count], fitting[count:]
        found = _scores(lm, [rows[i] for i in part], [len(targets[i]) for i in part])
        for index, score in zip(part, found, strict=True):
            scores[index] = score
    return scores


def _character_error_rate(text: str, transcript: str) -> float:
    return edit_distance(text.lower(), transcript.lower()) / max(1, len(text))


def _scores(lm: SpeechLM, rows: Sequence[Sequence[int]], num_targets: Sequence[int]) -> list[float]:
    """Means over the last `num_targets` tokens of each row."""
    vocabulary = lm.vocabulary
    longest = max(map(len, rows))
    # Padded on the right: under causal attention no mask is needed.
    tokens = torch.full((len(rows), longest), vocabulary.eos)
    positions, labels = [], []
    for index, (row, count) in enumerate(zip(rows, num_targets, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        # Position i predicts token i + 1.
        first = index * longest + len(row) - count - 1
        positions += range(first, first + count)
        labels += row[-count:]
    device = next(lm.parameters()).device
    ids = text_ids(lm.tokenizer, "asr")
    group = PositionGroup(torch.tensor(positions, device=device), ids)
    (logits,) = group_logits(lm.lm, [group], input_ids=tokens.to(device))
    columns = ids.columns(torch.tensor(labels, device=device))
    found = logits.float().log_softmax(-1).gather(1, columns[:, None])[:, 0]
    return [float(part.mean()) for part in found.split(list(num_targets))]
