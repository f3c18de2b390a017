"""Residual and split VQ: defects 3 and 8 of the public code."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from codec.config import QuantizerConfig
from codec.modules.quantize import ResidualVQ, SemanticPath, SplitVQ, codebook_usage, count_codes

CONFIG = QuantizerConfig(num_codebooks=3, codebook_size=32, decay=0.9)


def latents(count: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 8, count, generator=generator)


def test_each_codebook_shrinks_the_residual() -> None:
    quantizer = ResidualVQ(8, CONFIG).train()
    latent = latents(100)
    for _ in range(20):
        quantizer(latent)
    quantizer.eval()
    codes = quantizer.encode(latent)
    errors = [float((latent - quantizer.decode(codes[:, :n])).square().mean()) for n in (1, 2, 3)]
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2]


def test_straight_through_gradient_is_identity_once() -> None:
    quantizer = ResidualVQ(8, CONFIG).train()
    latent = latents(50).requires_grad_()
    quantizer(latent).latent.sum().backward()
    assert torch.equal(latent.grad, torch.ones_like(latent))


def test_commitment_pulls_the_latent_towards_its_entries() -> None:
    quantizer = ResidualVQ(8, CONFIG).train()
    latent = latents(50).requires_grad_()
    out = quantizer(latent)
    out.commitment.backward()
    stepped = latent.detach() - 10 * latent.grad
    quantizer.eval()
    assert quantizer(stepped).commitment < out.commitment


def test_equation_9_of_dm_codec_is_the_commitment_times_codebooks_and_dimensions() -> None:
    quantizer, latent = ResidualVQ(8, CONFIG).train(), latents(50)
    quantizer(latent)
    out = quantizer.eval()(latent)
    residuals = latent
    total = torch.zeros(4, 50)  # Of each vector: the sum over codebooks of |q_i - q_ci|_2^2.
    for book, codes in zip(quantizer.codebooks, out.codes.unbind(1), strict=True):
        entries = book.decode(codes)
        total += torch.linalg.norm(residuals - entries, dim=1) ** 2
        residuals = residuals - entries
    torch.testing.assert_close(3 * 8 * out.commitment, total.mean())


def test_codebooks_are_initialized_in_order_on_the_residual() -> None:
    quantizer = ResidualVQ(8, CONFIG).train()
    first, second, third = quantizer.codebooks
    quantizer(latents(200))
    # Only a second layer that saw the residual has entries near zero.
    scales = [book.entries.norm(dim=1).mean() for book in (first, second, third)]
    assert scales[0] > 1.2 * scales[1] > 1.2 * scales[2]


def test_any_prefix_and_any_suffix_of_codebooks_decodes() -> None:
    quantizer = ResidualVQ(8, CONFIG).train()
    quantizer(latents(200))
    quantizer.eval()
    latent = latents(20)
    codes = quantizer.encode(latent)
    assert torch.equal(quantizer.encode(latent, 2), codes[:, :2])
    parts = quantizer.decode(codes[:, :1]) + quantizer.decode(codes[:, 1:], first_codebook=1)
    torch.testing.assert_close(parts, quantizer.decode(codes))


def test_quantizer_dropout_keeps_first_codebooks_only() -> None:
    torch.manual_seed(0)
    quantizer = ResidualVQ(8, replace(CONFIG, dropout=1.0)).train()
    latent = latents(50)
    quantizer(latent)
    out = quantizer(latent)
    kept = []
    for item in range(4):
        errors = []
        for count in (1, 2, 3):
            partial = sum(
                book.lookup(out.codes[item, index])
                for index, book in enumerate(quantizer.codebooks[:count])
            )
            errors.append(float((out.latent[item].T - partial).abs().max()))
        kept.append(min(range(3), key=errors.__getitem__))
        # The codebooks have moved by one EMA step since, hence the tolerance.
        assert min(errors) < 0.5 * sorted(errors)[1]
    assert len(set(kept)) > 1
    quantizer.eval()
    whole = quantizer(latent)
    torch.testing.assert_close(whole.latent, quantizer.decode(whole.codes))


def test_use_and_perplexity_count_entries() -> None:
    codes = torch.tensor([[[0, 0, 0, 0], [0, 1, 2, 3]]])
    use = codebook_usage(count_codes(codes, 8), (8, 5))
    torch.testing.assert_close(use.share, torch.tensor([1 / 8, 4 / 5]))
    torch.testing.assert_close(use.perplexity, torch.tensor([1.0, 4.0]))


def split(path: SemanticPath, **changes) -> SplitVQ:
    torch.manual_seed(0)
    quantizer = SplitVQ(8, replace(CONFIG, **changes), path).train()
    quantizer(torch.cat([latents(200), latents(200, seed=1)], dim=1))
    return quantizer


FACTORIZED = {"codebook_dimension": 3, "normalize": True, "learning": "gradient"}
FACTORIZED_EMA = {"codebook_dimension": 3}


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        (SemanticPath.DETACHED_RESIDUAL, {}),
        (SemanticPath.RESIDUAL, FACTORIZED),
        (SemanticPath.RESIDUAL, FACTORIZED_EMA),
        (SemanticPath.PARALLEL, {}),
        (SemanticPath.PARALLEL, FACTORIZED),
        (SemanticPath.PARALLEL, FACTORIZED_EMA),
    ],
)
def test_semantic_codes_depend_on_the_semantic_latent_only(path, changes) -> None:
    quantizer = split(path, **changes).eval()
    semantic, acoustic = latents(20), latents(20, seed=1)
    codes = quantizer.encode(torch.cat([semantic, acoustic], dim=1))
    other = quantizer.encode(torch.cat([semantic, acoustic + 1], dim=1))
    assert torch.equal(codes[:, 0], other[:, 0])
    entry = 0 if path is SemanticPath.PARALLEL else quantizer.decode(codes[:, :1])
    assert torch.equal(codes[:, 1:], quantizer.acoustic.encode(acoustic - entry))
    parts = quantizer.decode(codes[:, :1]) + quantizer.decode(codes[:, 1:], first_codebook=1)
    torch.testing.assert_close(parts, quantizer.decode(codes))
    assert torch.equal(quantizer.encode(torch.cat([semantic, acoustic], 1), 1, 1), codes[:, 1:2])


@pytest.mark.parametrize("path", [SemanticPath.DETACHED_RESIDUAL, SemanticPath.PARALLEL])
def test_known_semantic_codes_leave_the_semantic_codebook_unchanged(path: SemanticPath) -> None:
    quantizer = split(path)
    quantizer.semantic.eval()
    quantizer.acoustic.eval()
    semantic, acoustic = latents(20), latents(20, seed=1).requires_grad_()
    whole = quantizer(torch.cat([semantic, acoustic], dim=1))
    before = quantizer.semantic.codebooks[0].entries.clone()
    known = quantizer.with_semantic_codes(whole.codes[:, 0], acoustic)
    assert torch.equal(known.codes, whole.codes)
    torch.testing.assert_close(known.latent, whole.latent)
    assert known.commitments.shape == whole.commitments.shape
    assert known.commitments[0] == 0
    torch.testing.assert_close(known.commitments[1:], whole.commitments[1:])
    known.latent.sum().backward()
    assert torch.equal(acoustic.grad, torch.ones_like(acoustic))
    assert torch.equal(before, quantizer.semantic.codebooks[0].entries)


def test_subtraction_leaves_each_encoder_an_identity_gradient() -> None:
    """With an attached entry the semantic encoder would get no gradient at all."""
    quantizer = split(SemanticPath.DETACHED_RESIDUAL)
    latent = torch.cat([latents(50), latents(50, seed=1)], dim=1).requires_grad_()
    quantizer(latent).latent.sum().backward()
    assert torch.equal(latent.grad, torch.ones_like(latent))


@pytest.mark.parametrize("changes", [FACTORIZED, FACTORIZED_EMA], ids=["gradient", "ema"])
def test_acoustic_losses_reach_the_semantic_encoder_through_projections(changes) -> None:
    quantizer = split(SemanticPath.RESIDUAL, **changes)
    latent = torch.cat([latents(50), latents(50, seed=1)], dim=1).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(latent).commitments[1:].sum(), latent)
    assert all(half.abs().sum() > 0 for half in gradient.chunk(2, dim=1))


@pytest.mark.parametrize(
    ("path", "gain"), [(SemanticPath.DETACHED, 1.0), (SemanticPath.PARALLEL, 2.0)]
)
def test_a_shared_encoder_has_the_identity_gradient_once(path: SemanticPath, gain: float) -> None:
    """If the semantic entry is subtracted; in parallel, once through each half."""
    quantizer = SplitVQ(8, CONFIG, path).train()
    latent = latents(50).requires_grad_()
    quantizer(torch.cat([latent, latent], dim=1)).latent.sum().backward()
    torch.testing.assert_close(latent.grad, torch.full_like(latent, gain))
    # The residual's losses and the semantic entry have their own gradients.
    again = latents(50).requires_grad_()
    out = quantizer(torch.cat([again, again], dim=1))
    for part in (out.commitments[1:].sum(), out.entries[0].sum(), out.entries[2].sum()):
        (gradient,) = torch.autograd.grad(part, again, retain_graph=True)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("changes", [FACTORIZED, FACTORIZED_EMA], ids=["gradient", "ema"])
def test_dropout_leaves_the_semantic_codebook_and_masks_losses(changes) -> None:
    quantizer = split(SemanticPath.PARALLEL, dropout=1.0, **changes)
    again = deepcopy(quantizer)  # Before moving averages move on.
    latent = torch.cat([latents(50), latents(50, seed=1)], dim=1)
    quantizer.acoustic._kept_codebooks = lambda batch, device: torch.tensor([1, 1, 1, 2])
    out = quantizer(latent)
    torch.testing.assert_close(out.latent[0], out.entries[0][0] + out.entries[1][0])
    torch.testing.assert_close(out.latent[3], sum(entry[3] for entry in out.entries))
    # The last codebook counts with one item of four.
    again.acoustic._kept_codebooks = lambda batch, device: torch.tensor([2, 2, 2, 2])
    whole = again(latent)
    assert out.commitments[2] < 0.5 * whole.commitments[2]
    torch.testing.assert_close(out.commitments[:2], whole.commitments[:2])


def test_codebooks_may_differ_in_size_and_width() -> None:
    sizes = {"codebook_sizes": (32, 8, 4), "codebook_dimensions": (2, 3, 4)}
    quantizer = split(SemanticPath.RESIDUAL, learning="gradient", **sizes)
    assert [each.codebook.entries.shape for each in quantizer.acoustic.codebooks] == [
        (8, 3),
        (4, 4),
    ]
    codes = quantizer.eval().encode(torch.randn(2, 16, 30))
    assert all(int(row.max()) < size for row, size in zip(codes.unbind(1), (32, 8, 4), strict=True))
    assert codes[:, 0].max() >= 8


def test_the_input_of_a_distillation_objective() -> None:
    out = ResidualVQ(8, CONFIG).train()(latents(50))
    assert torch.equal(out.part("first"), out.entries[0])
    assert torch.equal(out.part("last"), out.entries[2])
    torch.testing.assert_close(out.part("mean"), sum(out.entries) / 3)
    torch.testing.assert_close(out.commitment, out.commitments.sum() / 3)


def test_dropout_keeps_each_number_of_codebooks_alike() -> None:
    torch.manual_seed(0)
    quantizer = ResidualVQ(8, replace(CONFIG, dropout=0.5)).train()
    kept = quantizer._kept_codebooks(6000, torch.device("cpu")).bincount(minlength=4) / 6000
    torch.testing.assert_close(kept, torch.tensor([0, 1 / 6, 1 / 6, 2 / 3]), atol=0.02, rtol=0)
    assert quantizer.eval()._kept_codebooks(2, torch.device("cpu")).tolist() == [3, 3]


@pytest.mark.parametrize("path", [SemanticPath.DETACHED_RESIDUAL, SemanticPath.PARALLEL])
def test_any_prefix_and_any_suffix_of_a_split_quantizer(path: SemanticPath) -> None:
    quantizer = split(path).eval()
    latent = torch.cat([latents(20), latents(20, seed=1)], dim=1)
    codes = quantizer.encode(latent)
    for count in (1, 2, 3):
        assert torch.equal(quantizer.encode(latent, count), codes[:, :count])
    assert torch.equal(quantizer.encode(latent, first_codebook=1), codes[:, 1:])
    acoustic = latent[:, 8:]
    if path is not SemanticPath.PARALLEL:
        acoustic = acoustic - quantizer.semantic.decode(codes[:, :1])
    assert torch.equal(
        quantizer.encode(latent, first_codebook=2), quantizer.acoustic.encode(acoustic, 1, 1)
    )
    torch.testing.assert_close(
        quantizer.decode(codes[:, 2:], first_codebook=2),
        quantizer.decode(codes) - quantizer.decode(codes[:, :2]),
    )


def test_a_codebook_that_never_occurs_has_no_use() -> None:
    use = codebook_usage(torch.tensor([[0, 0], [2, 0]]), (2, 2))
    torch.testing.assert_close(use.share, torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(use.perplexity, torch.tensor([1.0, 1.0]))
