"""slm/models/nar.py: convolution, prompt matching and label smoothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_slm import SIZES

from slm.config import NARConfig
from slm.data.nar import nar_batch, text_bytes
from slm.models.nar import NAR, AdaptiveNorm, LocalConv, PromptMatching, smoothed_labels
from tests.slm.models.test_nar import CONFIG, TEXTS, batch, make_nar, random_codes

WITH = replace(CONFIG, conv_kernel=5, prompt_matching=True)


def test_padded_batches_with_convolution_and_prompt_matching(tmp_path: Path) -> None:
    nar = make_nar(WITH).double()
    codes = [random_codes(length, seed) for seed, length in enumerate((9, 14, 5))]
    text = [text_bytes(text) for text in TEXTS]
    together = nar(nar_batch(text, codes, [3, 4, 0], [1, 2])).nll
    alone = [
        nar(nar_batch([t], [c], [p], [1, 2])).nll
        for t, c, p in zip(text, codes, [3, 4, 0], strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone).sum(0), rtol=1e-5, atol=1e-5)
    nar.float().save_pretrained(tmp_path)
    again = NAR.load(tmp_path)
    assert again.config.conv_kernel == 5
    assert torch.equal(
        again.layers[1].nearby.depthwise.weight, nar.layers[1].nearby.depthwise.weight
    )
    assert torch.equal(again.reference.place.weight, nar.reference.place.weight)


def test_prompt_matching_finds_similar_frames() -> None:
    torch.manual_seed(0)
    reference = PromptMatching(width=64, num_heads=2, kernel=0, num_stages=3)
    reference.requires_grad_(False).reset_parameters()
    below, above = torch.randn(1, 8, 64), torch.randn(1, 8, 64)
    below[0, 6] = below[0, 1]  # Behind the prompt, like its second frame.
    prompt = (torch.arange(8) < 4)[None]
    valid = torch.ones(1, 8, dtype=torch.bool)
    shown = reference(below, above, valid, prompt, 1)
    alone = reference.output(reference.value(above[0, 1]))
    assert float(torch.cosine_similarity(shown[0, 6], alone, dim=0)) > 0.95
    for frame, reached in ((1, True), (5, False)):
        other = above.clone()
        other[0, frame] = torch.randn(64)
        moved = not torch.allclose(reference(below, other, valid, prompt, 1)[0, 6], shown[0, 6])
        assert moved == reached


def test_prompt_matching_without_a_prompt_adds_nothing() -> None:
    torch.manual_seed(0)
    reference = PromptMatching(width=64, num_heads=2, kernel=3, num_stages=3)
    reference.reset_parameters()
    below, valid = torch.randn(1, 8, 64), torch.ones(1, 8, dtype=torch.bool)
    shown = reference(below, torch.randn(1, 8, 64), valid, ~valid, 1)
    torch.testing.assert_close(shown, reference.output.bias.expand(1, 8, 64))


def test_prompt_matching_uses_only_visible_codebooks() -> None:
    nar = make_nar(WITH)
    one = batch([1])
    hidden = nar._hidden(one, 1)
    for codebook, frame, seen in ((0, 8, True), (1, 8, False), (2, 8, False), (2, 1, True)):
        codes = one.codes.clone()
        codes[0, codebook, frame] = (codes[0, codebook, frame] + 1) % SIZES[codebook]
        moved = not torch.equal(nar._hidden(one._replace(codes=codes), 1), hidden)
        assert moved == seen


def test_convolution_does_not_cross_text_and_speech() -> None:
    torch.manual_seed(0)
    nearby = LocalConv(8, 3, 2)
    hidden, valid = torch.randn(1, 10, 8), torch.ones(1, 10, dtype=torch.bool)
    before = nearby(hidden, valid, 1, 4)
    for changed, seen in ((3, {2, 3}), (4, {4, 5}), (7, {6, 7, 8})):
        other = hidden.clone()
        other[0, changed] = torch.randn(8)
        after = nearby(other, valid, 1, 4)
        moved = (after - before).abs().sum(-1)[0] > 1e-7
        assert set(moved.nonzero()[:, 0].tolist()) == seen


@pytest.mark.parametrize("wanted", [1.5, 4.0, 20.0])
def test_smoothed_labels_follow_distance(wanted: float) -> None:
    entries = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * 7 + 3
    shares = smoothed_labels(entries, wanted)
    torch.testing.assert_close(shares.sum(1), torch.ones(200))
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(1).mean()
    assert float(entropy.exp()) == pytest.approx(wanted, rel=0.01)
    distances = torch.cdist(entries, entries)
    order = distances.argsort(dim=1)
    sorted_shares = shares.gather(1, order)
    assert bool((sorted_shares[:, 1:] <= sorted_shares[:, :-1] + 1e-6).all())


def test_label_smoothing_only_in_training() -> None:
    entries = [torch.randn(size, 6, generator=torch.Generator().manual_seed(1)) for size in SIZES]
    plain, shared = (
        make_nar(replace(CONFIG, from_codec=True, label_smoothing_neighbors=neighbours))
        for neighbours in (0.0, 3.0)
    )
    for nar in (plain, shared):
        nar.init_from_codec(entries, seed=0)
    one = batch([1, 2])
    assert torch.equal(plain(one).nll, shared(one).nll)
    losses = [nar.train()(one).nll for nar in (plain, shared)]
    assert not torch.allclose(*losses)
    # By hand, of the first stage.
    hidden = shared._hidden(one, 1)
    logits = torch.stack([shared._logits(row, 1) for row in hidden]).log_softmax(-1)
    frames = torch.arange(one.codes.shape[2])
    asked = (frames >= one.prompt_lengths[:, None]) & (frames < one.lengths[:, None])
    shares = smoothed_labels(entries[1], 3.0)[one.codes[:, 1]]
    expected = -(shares * logits).sum(-1)[asked].sum()
    torch.testing.assert_close(losses[1][0], expected)


@pytest.mark.parametrize(
    ("values", "reported"),
    [
        ({"conv_kernel": 4}, r"nar\.conv_kernel must be odd"),
        ({"stage_decay": 0.0}, r"nar\.stage_decay must be within"),
        ({"label_smoothing_neighbors": 5.0}, r"with nar\.from_codec"),
        ({"label_smoothing_neighbors": 0.5, "from_codec": True}, "must be 0, or more than 1"),
    ],
)
def test_invalid_settings_are_refused(values: dict, reported: str) -> None:
    with pytest.raises(ValueError, match=reported):
        NARConfig(**values)


def test_stages_scale_and_shift_in_numbers() -> None:
    norm = AdaptiveNorm(2, 2)
    with torch.no_grad():
        norm.scale[1], norm.shift[1] = torch.tensor([1.0, 3.0]), torch.tensor([0.5, -0.5])
    hidden = torch.tensor([[[-3.0, 3.0]]])
    torch.testing.assert_close(norm(hidden, 0), torch.tensor([[[-1.0, 1.0]]]))
    torch.testing.assert_close(norm(hidden, 1), torch.tensor([[[-1.5, 3.5]]]))


def test_positions_in_numbers() -> None:
    nar = make_nar(CONFIG)
    rates = 10_000 ** -(torch.arange(8) / 8)
    for part in (torch.zeros(1, 400, 16), torch.ones(1, 400, 16)):
        angles = 399 * rates
        expected = part[0, 399] + torch.cat([angles.sin(), angles.cos()])
        torch.testing.assert_close(nar._positioned(part)[0, 399], expected, atol=2e-5, rtol=0)


def test_a_frame_of_zeros_stands_for_no_similar_one() -> None:
    """One of three keys, beside the two frames of the prompt."""
    torch.manual_seed(0)
    reference = PromptMatching(width=4, num_heads=1, kernel=0, num_stages=2).requires_grad_(False)
    below, above = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    prompt = torch.tensor([[True, True, False]])
    found = reference(below, above, torch.ones(1, 3, dtype=torch.bool), prompt, 1)
    place = reference.place(reference.norm(below, 1))[0]
    keys = torch.cat([torch.zeros(1, 4), place[:2]])
    values = torch.cat([torch.zeros(1, 4), reference.value(above)[0, :2]])
    attended = (place @ keys.T / 4**0.5).softmax(1) @ values
    torch.testing.assert_close(found[0], reference.output(attended))


@pytest.mark.parametrize("scale", [1e-3, 0.0])
def test_weak_entries_start_as_strong_as_others(scale: float) -> None:
    nar = make_nar(CONFIG)
    random = torch.Generator().manual_seed(0)
    nar.init_from_codec([scale * torch.randn(size, 6, generator=random) for size in SIZES], seed=0)
    spread = float(nar.codes.weight.detach().std())
    assert spread == pytest.approx(0.5 if scale else 0.0, rel=0.1)
