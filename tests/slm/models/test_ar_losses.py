"""slm/models/ar.py: losses and gradients, padded, packed or with gradient checkpointing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_slm import STAMP, quiet, save_base, save_shard

from codec.tokens import TokenShard
from slm.config import ARConfig, BatchConfig, LoRAConfig, TaskConfig, TextConfig
from slm.data.ar import IGNORE, ARBatch, ARData
from slm.data.sequences import ASR, CONTINUATION, TEXT, TTS
from slm.models.ar import SpeechLM
from slm.models.attention import BACKEND
from tests.slm.models.test_ar import batch_of, make

pytestmark = quiet()


def restricted(lm: SpeechLM, logits: torch.Tensor, batch: ARBatch) -> torch.Tensor:
    """Logits of every position with -inf at the ids that its target cannot be."""
    vocabulary = lm.vocabulary
    allowed = torch.zeros(4, vocabulary.size, dtype=torch.bool)
    for task in (TTS, CONTINUATION):
        allowed[task, vocabulary.first_speech :] = allowed[task, vocabulary.speech_end] = True
    for task in (ASR, TEXT):
        allowed[task, : vocabulary.num_text] = allowed[task, vocabulary.eos] = True
    if lm.tokenizer.text.asr_form == "characters":
        names = lm.tokenizer.text_tokenizer.convert_ids_to_tokens(range(vocabulary.num_text))
        allowed[ASR, : vocabulary.num_text] = torch.tensor([len(name) == 1 for name in names])
        allowed[ASR, vocabulary.eos] = True
    return logits.masked_fill(~allowed[batch.tasks], -torch.inf)


@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("written", ["tokens", "characters"])
@pytest.mark.parametrize("items", [(0, 8, 13, 18), (0, 8)])
def test_loss_is_that_of_full_logits_over_the_allowed_ids(
    tmp_path: Path, lora: LoRAConfig | None, eos: bool, written: str, items: tuple[int, ...]
) -> None:
    base = save_base(tmp_path / "base", eos=eos)
    config = ARConfig(base=str(base), lora=lora, text=TextConfig(asr_form=written))
    lm = SpeechLM.create(config, STAMP, seed=0).eval()
    data = packed_data(lm, tmp_path / "a.parquet", packed=None)
    batch = data.collate([np.array([item]) for item in items])
    assert batch.tasks[:, 0].tolist() == [TTS, ASR, CONTINUATION, TEXT][: len(items)]
    parameters = [p for p in lm.parameters() if p.requires_grad]
    scores = lm(batch)
    logits = restricted(lm, lm.lm(input_ids=batch.tokens).logits, batch)
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.labels, ignore_index=IGNORE, reduction="none"
    ).sum(1)
    by_task = [nll[batch.tasks[:, 0] == task].sum() for task in range(4)]
    torch.testing.assert_close(scores.nll, torch.stack(by_task), rtol=1e-5, atol=1e-3)
    correct = ((logits.argmax(-1) == batch.labels) & (batch.labels != IGNORE)).sum()
    assert scores.correct.sum() == correct
    targets = (batch.labels != IGNORE).sum(1)
    assert scores.targets.tolist() == [
        targets[batch.tasks[:, 0] == t].sum().item() for t in range(4)
    ]
    ours, plain = (
        torch.autograd.grad(loss / 100, parameters) for loss in (scores.nll.sum(), nll.sum())
    )
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def packed_data(lm: SpeechLM, path: Path, packed: int | None = 160) -> ARData:
    shard = TokenShard.open(save_shard(path, 6))
    tasks = TaskConfig(continuation=1.0, text=1.0)
    batch = BatchConfig(positions=480, packed=packed)
    return ARData.open(
        shard, lm.tokenizer, tasks, batch, 0, longest=256, texts=["the cat sat on a mat"]
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None])
@pytest.mark.parametrize("attention", ["sdpa", BACKEND])
def test_packed_items_equal_single_items(
    tmp_path: Path, kind: str, lora: LoRAConfig | None, attention: str
) -> None:
    lm = make(tmp_path, lora, kind=kind).eval()
    lm.lm.get_base_model().set_attn_implementation(
        attention
    ) if lora else lm.lm.set_attn_implementation(attention)
    data = packed_data(lm, tmp_path / "a.parquet")
    alone = packed_data(lm, tmp_path / "a.parquet", packed=None)
    rows = [np.array([0, 6, 12]), np.array([18, 1, 7]), np.array([13, 2])]
    parameters = [p for p in lm.parameters() if p.requires_grad]
    packed = lm(data.collate(rows))
    singles = [lm(alone.collate([np.array([item])])) for item in np.concatenate(rows)]
    sums = [torch.stack(part).sum(0) for part in zip(*singles, strict=True)]
    assert packed.targets.tolist() == sums[2].tolist()
    assert (packed.targets > 0).all()
    torch.testing.assert_close(packed.nll, sums[0], rtol=1e-5, atol=1e-3)
    ours, others = (torch.autograd.grad(s.sum() / 100, parameters) for s in (packed.nll, sums[0]))
    for one, other in zip(ours, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_items_are_masked_from_each_other(tmp_path: Path, kind: str) -> None:
    lm = make(tmp_path, kind=kind).eval()
    batch = packed_data(lm, tmp_path / "a.parquet").collate([np.array([0, 12, 1])])
    assert batch.documents is not None
    hidden = batch.documents[0] == 2
    changed = torch.where(hidden, (batch.tokens + 1) % 50, batch.tokens)
    target = batch.labels != IGNORE
    for document in (1, 3):  # Before and behind what changed.
        labels = batch.labels.masked_fill(batch.documents != document, IGNORE)
        nlls = [lm(batch._replace(tokens=t, labels=labels)).nll for t in (batch.tokens, changed)]
        assert torch.equal(*nlls)
    labels = batch.labels.masked_fill(~(target & hidden), IGNORE)
    nlls = [lm(batch._replace(tokens=t, labels=labels)).nll for t in (batch.tokens, changed)]
    assert not torch.equal(*nlls)


def test_padding_longer_than_the_context_length(tmp_path: Path) -> None:
    """A packed row may be longer, and so may be the padding of a short row of its batch."""
    lm = make(tmp_path, kind="gpt2").eval()
    data = packed_data(lm, tmp_path / "a.parquet", packed=480)
    rows = [np.arange(10), np.array([10])]
    batch = data.collate(rows)
    assert data.lengths[10] + lm.max_positions < batch.tokens.shape[1]
    together, apart = lm(batch).nll, [lm(data.collate([row])).nll for row in rows]
    torch.testing.assert_close(together, apart[0] + apart[1], rtol=1e-5, atol=1e-3)


def test_rows_longer_than_a_sliding_window_are_refused(tmp_path: Path) -> None:
    lm = make(tmp_path)
    lm.config.sliding_window = 50
    batch = packed_data(lm, tmp_path / "a.parquet").collate([np.array([0, 12, 1])])
    with pytest.raises(ValueError, match=r"batch\.packed must be at most 50"):
        lm(batch)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None])
def test_gradient_checkpointing_changes_nothing(
    tmp_path: Path, kind: str, lora: LoRAConfig | None
) -> None:
    base = save_base(tmp_path / "base", kind=kind)
    gradients = []
    for saving in (False, True):
        config = ARConfig(base=str(base), lora=lora, gradient_checkpointing=saving)
        lm = SpeechLM.create(config, STAMP, seed=0).train()
        for module in lm.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        data = packed_data(lm, tmp_path / "a.parquet")
        (lm(data.collate([np.array([0, 6, 18])])).nll.sum() / 100).backward()
        gradients.append({n: p.grad for n, p in lm.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    lm = make(tmp_path).eval()
    batch = batch_of(lm, tmp_path / "a.parquet")
    row = 0
    length = int((batch.labels[row] != IGNORE).nonzero().max()) + 2
    alone = lm(ARBatch(*(part[:1, :length] for part in batch[:3]), documents=None))
    padded = lm(ARBatch(*(part[:1] for part in batch[:3]), documents=None))
    torch.testing.assert_close(alone.nll, padded.nll, rtol=1e-5, atol=1e-4)
