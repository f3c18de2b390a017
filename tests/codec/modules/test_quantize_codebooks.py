"""Codebooks: defects 1, 2 and 4 of the public code; factorized and gradient-trained ones."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from codec.config import QuantizerConfig
from codec.modules.quantize import (
    Assigned,
    Codebook,
    CodebookOutput,
    FactorizedCodebook,
    SemanticPath,
    SplitVQ,
    Statistics,
    update_codebooks,
)

CONFIG = QuantizerConfig(decay=0.9)
LEARNED = replace(CONFIG, learning="gradient")


def update(codebook: Codebook, vectors: torch.Tensor, codes: torch.Tensor | None = None) -> None:
    codes = codebook.nearest(vectors) if codes is None else codes
    update_codebooks([Assigned(codebook, vectors, codes)])


def train(codebook: Codebook | FactorizedCodebook, residual: torch.Tensor) -> CodebookOutput:
    out = codebook.quantize(residual)
    update_codebooks([out.assigned])
    return out


def test_revived_entries_survive() -> None:
    """Four clusters, 64 entries: the public code leaves 4 in use."""
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 8, generator=generator)
    codebook = Codebook(8, 64, replace(CONFIG, kmeans_samples=16), seed=1).train()
    for _ in range(200):
        chosen = torch.randint(0, 4, (512,), generator=generator)
        vectors = centres[chosen] + 0.1 * torch.randn(512, 8, generator=generator)
        codebook.initialize(vectors)
        update(codebook, vectors)
    used = codebook.nearest(vectors).unique()
    assert len(used) > 55


def test_without_revival_dead_entries_stay_dead() -> None:
    codebook = Codebook(8, 32, replace(CONFIG, revival_ratio=0.0), seed=1).train()
    codebook.initialize(torch.zeros(100, 8) + torch.randn(100, 1))
    codebook.entries[5] = 1000.0
    codebook.entry_sum[5], codebook.cluster_size[5] = 0.0, 0.0
    for _ in range(10):
        update(codebook, torch.zeros(50, 8))
    assert codebook.entries[5, 0] == 1000.0


def test_entries_follow_their_vectors() -> None:
    codebook = Codebook(2, 2, replace(CONFIG, revival_ratio=0.0), seed=1).train()
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
    codebook.initialize(points)
    moved = points + 0.3
    for _ in range(100):
        update(codebook, moved)
    expected = torch.tensor([[0.3, 1.3], [1.3, 0.3]])
    found = codebook.entries[codebook.entries[:, 0].argsort()]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("config", [CONFIG, LEARNED])
def test_vectors_that_are_not_finite_leave_nothing_behind(config: QuantizerConfig) -> None:
    """A training step with such a batch is skipped; the averages are updated before that."""
    codebook = Codebook(2, 4, config, seed=1).train()
    bad = torch.tensor([[torch.nan, 0.0], [torch.inf, 1.0]]).repeat(8, 1)
    for vectors in (bad, torch.randn(16, 2), torch.cat([bad, torch.randn(16, 2)]), bad):
        train(codebook, vectors.T[None])
        assert all(bool(each.isfinite().all()) for each in codebook.state_dict().values())


@pytest.mark.parametrize(
    ("size", "samples", "limit"), [(32, 50_000, 8192 * 32), (16_384, 1000, 8192 * 1024)]
)
def test_kmeans_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch, size: int, samples: int, limit: int
) -> None:
    """Distances are never held for more than one chunk of vectors, fewer where K is large."""
    largest = 0
    argmin = torch.Tensor.argmin

    def spy(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return argmin(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "argmin", spy)
    config = replace(CONFIG, kmeans_samples=samples, kmeans_iterations=1)
    codebook = Codebook(4, size, config, seed=1)
    codebook.initialize(torch.randn(2 * samples, 4))
    assert 0 < largest <= limit


def test_gradient_trained_entries_that_die_are_revived() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 8, generator=generator)
    codebook = Codebook(8, 64, replace(LEARNED, kmeans_iterations=0), seed=1).train()
    vectors = centres[torch.randint(0, 4, (512,), generator=generator)].clone()
    vectors += 0.1 * torch.randn(512, 8, generator=generator)
    # Four clusters far from 64 random entries: hardly any is chosen, and none would learn.
    assert len(codebook.nearest(vectors).unique()) < 10
    for _ in range(50):
        update(codebook, vectors)
    assert len(codebook.nearest(vectors).unique()) > 55


def test_the_first_batch_leaves_gradient_trained_entries_where_they_are() -> None:
    codebook = Codebook(8, 64, replace(LEARNED, kmeans_iterations=0), seed=1).train()
    before = codebook.entries.detach().clone()
    train(codebook, torch.randn(1, 8, 30))
    assert torch.equal(codebook.entries, before)


def test_gradient_trained_entries_move_by_their_loss_alone() -> None:
    torch.manual_seed(0)
    codebook = Codebook(8, 16, replace(LEARNED, kmeans_iterations=0, revival_ratio=0.0), seed=1)
    residual = torch.randn(3, 8, 20, requires_grad=True)
    before = codebook.entries.detach().clone()
    out = train(codebook.train(), residual)
    assert torch.equal(codebook.entries, before)
    out.codebook_loss.sum().backward()
    assert residual.grad is None
    used = codebook.entries.grad.abs().sum(1) > 0
    assert used.tolist() == [index in out.codes.unique() for index in range(16)]
    torch.testing.assert_close(out.codebook_loss, out.commitment)
    (gradient,) = torch.autograd.grad(out.commitment.sum(), residual)
    torch.testing.assert_close(gradient, 2 * (residual - out.value).detach() / (8 * 20))


def test_normalized_lookup_compares_directions() -> None:
    torch.manual_seed(0)
    codebook = Codebook(4, 16, replace(LEARNED, normalize=True), seed=1).eval()
    vectors = torch.randn(50, 4)
    angles = functional.cosine_similarity(vectors[:, None], codebook.entries[None], dim=2)
    assert torch.equal(codebook.nearest(vectors), angles.argmax(1))
    assert torch.equal(codebook.nearest(100 * vectors), angles.argmax(1))
    # What stands for a vector afterwards is the entry as it is.
    out = codebook.quantize(vectors.T[None])
    assert torch.equal(out.value[0].T, codebook.entries[angles.argmax(1)])


@pytest.mark.parametrize("config", [CONFIG, LEARNED], ids=["ema", "gradient"])
def test_factorized_values_have_a_gradient_to_the_residual_and_both_projections(config) -> None:
    torch.manual_seed(0)
    codebook = FactorizedCodebook(8, 3, 16, config, seed=1).train()
    residual = torch.randn(2, 8, 20, requires_grad=True)
    out = codebook.quantize(residual)
    probe = torch.randn(2, 8, 20)
    (gradient,) = torch.autograd.grad((out.value * probe).sum(), residual, retain_graph=True)
    # Past the out: out-projection after in-projection, as if nothing were between them.
    matrices = [each.weight[..., 0] for each in (codebook.project_out, codebook.project_in)]
    torch.testing.assert_close(gradient, (matrices[0] @ matrices[1]).T @ probe)
    (out.value * probe).sum().backward()
    for name, parameter in codebook.named_parameters():
        if not name.endswith("codebook.entries"):
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None


def test_factorized_entries_follow_what_is_projected() -> None:
    torch.manual_seed(0)
    codebook = FactorizedCodebook(8, 3, 2, replace(CONFIG, revival_ratio=0.0), seed=1).train()
    points = torch.randn(2, 8, 1).repeat(1, 1, 25)
    train(codebook, points)
    moved = points + 0.1 * torch.randn(2, 8, 1)
    for _ in range(100):
        out = train(codebook, moved)
    expected = codebook.project_in(moved)[:, :, 0]
    torch.testing.assert_close(codebook.codebook.lookup(out.codes[:, 0]), expected)
    assert not out.codebook_loss.any()
    torch.testing.assert_close(out.commitment, torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "config", [CONFIG, replace(LEARNED, normalize=True)], ids=["ema", "gradient"]
)
def test_factorized_codes_and_values_are_those_of_the_out(config) -> None:
    torch.manual_seed(0)
    codebook, residual = FactorizedCodebook(8, 3, 16, config, seed=1), torch.randn(2, 8, 20)
    train(codebook.train(), residual)
    codebook.eval()
    out = codebook.quantize(residual)
    assert torch.equal(codebook.encode(residual), out.codes)
    torch.testing.assert_close(codebook.decode(out.codes), out.value)


def test_without_kmeans_entries_are_vectors_of_the_first_batch() -> None:
    codebook = Codebook(2, 4, replace(CONFIG, kmeans_iterations=0), seed=1).train()
    vectors = torch.randn(9, 2)
    codebook.initialize(vectors)
    places = (codebook.entries[:, None] == vectors[None]).all(2).nonzero()
    assert len(places[:, 1].unique()) == 4
    assert torch.equal(codebook.cluster_size, torch.ones(4))
    assert torch.equal(codebook.entry_sum, codebook.entries)
    update(codebook, vectors)
    before = codebook.entries.clone()
    codebook.initialize(vectors + 1)
    assert torch.equal(codebook.entries, before)


def test_kmeans_starts_from_repeated_vectors_where_there_are_few() -> None:
    codebook = Codebook(1, 5, replace(CONFIG, kmeans_iterations=3), seed=1)
    codebook.initialize(torch.tensor([[1.0], [5.0]]))
    assert sorted(codebook.entries[:2, 0].tolist()) == [1.0, 5.0]
    assert torch.equal(codebook.entries[2:4], codebook.entries[:2])
    # The lowest of equal entries has the vectors.
    assert codebook.cluster_size.tolist() == [1, 1, 0, 0, 0]


def test_a_step_of_moving_averages_in_numbers() -> None:
    config = QuantizerConfig(decay=0.75, revival_ratio=0.25, kmeans_iterations=2)
    codebook = Codebook(1, 3, config, seed=1)
    codebook.initialize(torch.tensor([[0.0], [4.0], [4.0], [9.0]]))
    order = codebook.entries[:, 0].argsort()
    assert codebook.entries[order, 0].tolist() == [0, 4, 9]
    assert codebook.cluster_size[order].tolist() == [1, 2, 1]
    codes = torch.tensor([order[0], order[1], order[1], order[1]])
    update(codebook, torch.tensor([[1.0], [5.0], [5.0], [5.0]]), codes)
    # 0.75 * 1 + 0.25 * 1, 0.75 * 2 + 0.25 * 3, 0.75 * 1; all above a quarter of their mean.
    assert codebook.cluster_size[order].tolist() == [1, 2.25, 0.75]
    expected = torch.tensor([0.25 * 1, (0.75 * 8 + 0.25 * 15) / 2.25, 9])
    torch.testing.assert_close(codebook.entries[order, 0], expected)
    assert codebook.num_updates == 1
    # 0.75, then a little less than a quarter of the mean of 4, 4 and 0.75, and 0.75 as it is.
    rows = torch.zeros(3, dtype=torch.long)
    for size, is_dead in ((0.727, True), (0.728, False)):
        codebook.cluster_size[order] = torch.tensor([4.0, 4.0, size])
        codebook.entry_sum[order[2]] = 9 * size
        before = codebook.entries[order[2], 0].item()
        joined = Statistics(torch.zeros(3), torch.zeros(3, 1), torch.tensor([[77.0]]), rows)
        codebook._revive(joined)
        assert (codebook.entries[order[2], 0] != before) == is_dead
        if is_dead:
            average = (8 + size) / 3
            assert codebook.entries[order[2], 0] == 77
            assert codebook.cluster_size[order[2]].item() == pytest.approx(average)
            assert codebook.entry_sum[order[2], 0].item() == pytest.approx(77 * average)
            codebook.entries[order[2]] = 9.0


class Ranks:
    """Ranks as threads of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.count, self._here = count, threading.local()
        self.num_reduced = 0
        """Calls of all_reduce by rank 0."""
        self._barrier, self._given = threading.Barrier(count, timeout=60), [None] * count
        for name, value in (
            *(("is_initialized", lambda: True), ("get_world_size", lambda: count)),
            *(("get_rank", lambda: self._here.rank), ("all_reduce", self._all_reduce)),
            ("all_gather", self._all_gather),
        ):
            monkeypatch.setattr(torch.distributed, name, value)

    def _exchange(self, values: torch.Tensor) -> list[torch.Tensor]:
        self._given[self._here.rank] = values.clone()
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given

    def _all_reduce(self, values: torch.Tensor) -> None:
        self.num_reduced += self._here.rank == 0
        values.copy_(sum(self._exchange(values)))

    def _all_gather(
        self, parts: list[torch.Tensor], values: torch.Tensor, group: Any = None
    ) -> None:
        for part, given in zip(parts, self._exchange(values), strict=True):
            part.copy_(given)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """The results of work(rank)."""

        def begin(rank: int) -> Any:
            self._here.rank = rank
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(begin, range(self.count)))


@pytest.mark.parametrize("config", [CONFIG, replace(LEARNED, kmeans_iterations=2)])
def test_codebooks_of_ranks_are_those_of_the_joined_batch(
    config: QuantizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks with batches of unlike lengths, through initialization, updates and revival."""
    torch.manual_seed(0)
    config = replace(config, revival_ratio=0.5, kmeans_samples=10)
    batches = [torch.randn(1, 2, 24) * (1 + step) for step in range(4)]
    parts = (slice(0, 9), slice(9, 24))
    start = torch.randn(8, 2)

    def trained(share: slice) -> list[torch.Tensor]:
        codebook = Codebook(2, 8, config, seed=1).train()
        if config.learning == "gradient":
            codebook.entries.data = start.clone()
        for batch in batches:
            train(codebook, batch[..., share])
        return list(codebook.state_dict().values())

    expected = trained(slice(None))
    first, other = Ranks(monkeypatch, 2).run(lambda rank: trained(parts[rank]))
    for one, each in zip(expected, first, strict=True):
        torch.testing.assert_close(each, one)
    assert all(torch.equal(one, each) for one, each in zip(first, other, strict=True))


def test_a_step_of_all_codebooks_has_one_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = torch.randn(3, 2, 8, 20, generator=torch.Generator().manual_seed(0))
    config = replace(CONFIG, num_codebooks=3, codebook_size=8, revival_ratio=0.5)

    def trained(share: slice) -> dict[str, torch.Tensor]:
        quantizer = SplitVQ(4, config, SemanticPath.RESIDUAL).train()
        for batch in batches:
            quantizer(batch[share])
        return quantizer.state_dict()

    expected, ranks = trained(slice(None)), Ranks(monkeypatch, 2)
    first, other = ranks.run(lambda rank: trained(slice(rank, rank + 1)))
    assert ranks.num_reduced == len(batches)
    for name, one in expected.items():
        torch.testing.assert_close(first[name], one)
        assert torch.equal(first[name], other[name])


def test_the_number_of_updates_is_in_the_state_dictionary() -> None:
    codebook, other = (Codebook(2, 4, CONFIG, seed=1).train() for _ in range(2))
    train(codebook, torch.randn(1, 2, 9))
    train(codebook, torch.randn(1, 2, 9))
    state = codebook.state_dict()
    assert state["num_updates"] == 2
    other.load_state_dict(state)
    assert other.num_updates == 2
    assert state.keys() == other.state_dict().keys()
    del state["num_updates"]
    with pytest.raises(RuntimeError, match="num_updates"):
        other.load_state_dict(state)
