"""What teaches the semantic codebook."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_semantic import LM_SPT, noise, tiny_semantic

from codec import Codec
from codec.distillation.asr_supervision import (
    SemanticStudent,
    TranscribedBatch,
    greedy_labels,
    transcript_nll,
)
from codec.distillation.ctc_reader import BLANK


def batch_of(*samples: int) -> TranscribedBatch:
    labels = torch.tensor([[2, 3, 1, 2], [3, 2, BLANK, BLANK]])[: len(samples)]
    return TranscribedBatch(noise(len(samples), 1, max(samples)), torch.tensor(samples), labels)


def test_codes_are_trained_at_two_places_and_made_at_one(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    torch.manual_seed(1)
    student = SemanticStudent(codec, "ab")
    batch = batch_of(12 * 640, 5 * 640)
    torch.manual_seed(0)
    once, again = student(batch), student(batch)
    assert not torch.equal(once.features, again.features)
    student.eval()
    assert torch.equal(student(batch).features, student(batch).features)


def test_padding_changes_neither_what_is_read_nor_the_codebook(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    torch.manual_seed(1)
    student = SemanticStudent(codec, "ab").eval()
    batch = batch_of(12 * 640, 5 * 640)
    both = student(batch)
    alone = student(
        TranscribedBatch(batch.wave[1:, :, : 5 * 640], batch.lengths[1:], batch.labels[1:, :2])
    )
    torch.testing.assert_close(both.letters[1, :10], alone.letters[0])
    assert both.codes[12:].tolist() == alone.codes.tolist()
    assert both.codes.numel() == 17
    loud = TranscribedBatch(batch.wave.clone(), batch.lengths, batch.labels)
    loud.wave[1, :, 5 * 640 :] = 1.0
    entries = []
    for one in (batch, loud):
        again = Codec(codec.config)
        again.load_state_dict(codec.state_dict())
        fresh = SemanticStudent(again, "ab")
        fresh.load_state_dict(student.state_dict())
        torch.manual_seed(2)  # Of the places at which Whisper hears them.
        fresh.train()(one)
        entries.append(again.quantizer.semantic.codebooks[0].entries)
    assert torch.equal(*entries)
    assert not torch.equal(entries[0], codec.quantizer.semantic.codebooks[0].entries)


def test_the_spelling_loss_sums_every_path_of_the_transcript(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    student = SemanticStudent(codec, "ab").eval()
    batch = batch_of(3 * 640)._replace(labels=torch.tensor([[2, 2]]))
    output = student(batch)
    probs = output.letters[0].exp()
    total = torch.zeros(())
    for path in product(range(4), repeat=6):
        kept = [a for a, b in zip(path, (None, *path), strict=False) if a != b and a != BLANK]
        if kept == [2, 2]:
            total = total + probs[torch.arange(6), list(path)].prod()
    torch.testing.assert_close(transcript_nll(output, batch, 640)[0], -total.log())


def test_reading_drops_blanks_and_repetitions(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    output = SemanticStudent(codec, "ab")(batch_of(3 * 640))
    best = torch.tensor([[2, 2, 0, 2, 3, 1]])
    letters = torch.nn.functional.one_hot(best, 4).float()
    output = output._replace(letters=letters)
    assert greedy_labels(output, torch.tensor([3 * 640]), 640) == [[2, 2, 3, 1]]
    assert greedy_labels(output, torch.tensor([640]), 640) == [[2]]


def test_a_codec_without_such_an_encoder_is_refused() -> None:
    own = replace(LM_SPT, lmspt=replace(LM_SPT.lmspt, semantic="own"))
    with pytest.raises(ValueError, match=r"needs lmspt\.semantic whisper"):
        SemanticStudent(Codec(own), "ab")
