"""The residual quantiser: defects 1 to 4 and 8 of the public code."""

from dataclasses import replace

import pytest
import torch

from codec.config import QuantizerConfig
from codec.quantize import Codebook, ResidualVQ, codebook_use, count_codes

CONFIG = QuantizerConfig(num_codebooks=3, codebook_size=32, decay=0.9)


def latents(count: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 8, count, generator=generator)


def test_revived_entries_survive() -> None:
    """Four clusters, 64 entries: the public code leaves 4 in use."""
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 8, generator=generator)
    codebook = Codebook(8, replace(CONFIG, codebook_size=64, kmeans_samples=16), seed=1).train()
    for _ in range(200):
        chosen = torch.randint(0, 4, (512,), generator=generator)
        vectors = centres[chosen] + 0.1 * torch.randn(512, 8, generator=generator)
        codebook.initialize(vectors)
        codebook.update(vectors, codebook.nearest(vectors))
    used = codebook.nearest(vectors).unique()
    assert len(used) > 55


def test_without_revival_dead_entries_stay_dead() -> None:
    codebook = Codebook(8, replace(CONFIG, revival_ratio=0.0), seed=1).train()
    codebook.initialize(torch.zeros(100, 8) + torch.randn(100, 1))
    codebook.entries[5] = 1000.0
    codebook.entry_sum[5], codebook.cluster_size[5] = 0.0, 0.0
    for _ in range(10):
        codebook.update(torch.zeros(50, 8), codebook.nearest(torch.zeros(50, 8)))
    assert codebook.entries[5, 0] == 1000.0


def test_entries_follow_their_vectors() -> None:
    codebook = Codebook(2, replace(CONFIG, codebook_size=2, revival_ratio=0.0), seed=1).train()
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
    codebook.initialize(points)
    moved = points + 0.3
    for _ in range(100):
        codebook.update(moved, codebook.nearest(moved))
    expected = torch.tensor([[0.3, 1.3], [1.3, 0.3]])
    found = codebook.entries[codebook.entries[:, 0].argsort()]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


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


def test_layers_initialise_in_order_on_what_is_left_over() -> None:
    quantizer = ResidualVQ(8, CONFIG).train()
    first, second, third = quantizer.codebooks
    quantizer(latents(200))
    # Only a second layer that saw the residual has entries near zero.
    scales = [book.entries.norm(dim=1).mean() for book in (first, second, third)]
    assert scales[0] > 1.2 * scales[1] > 1.2 * scales[2]


def test_kmeans_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances are never held for more than one chunk of vectors."""
    largest = 0
    argmin = torch.Tensor.argmin

    def spy(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return argmin(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "argmin", spy)
    codebook = Codebook(4, replace(CONFIG, kmeans_samples=50_000), seed=1)
    codebook.initialize(torch.randn(100_000, 4))
    assert 0 < largest <= 8192 * 32


def test_any_prefix_and_any_suffix_of_codebooks_decodes() -> None:
    quantizer = ResidualVQ(8, CONFIG).train()
    quantizer(latents(200))
    quantizer.eval()
    latent = latents(20)
    codes = quantizer.encode(latent)
    assert torch.equal(quantizer.encode(latent, 2), codes[:, :2])
    parts = quantizer.decode(codes[:, :1]) + quantizer.decode(codes[:, 1:], first_codebook=1)
    torch.testing.assert_close(parts, quantizer.decode(codes))


def test_quantiser_dropout_keeps_first_codebooks_only() -> None:
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
    use = codebook_use(count_codes(codes, 8))
    assert use.share.tolist() == [1 / 8, 4 / 8]
    torch.testing.assert_close(use.perplexity, torch.tensor([1.0, 4.0]))
