"""Residual vector quantiser with EMA codebooks, the same on every rank.

All random choices (first centroids, revived entries) are a function of the codebook's own update
counter, and all statistics are summed over ranks, so that ranks stay identical to each other and
to one process on the joined batch, and a resumed run repeats them.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from codec.config import QuantizerConfig

# Distances of this many vectors at a time: 8192 x 1024 float32 are 32 MB.
DISTANCE_CHUNK = 8192


class Quantized(NamedTuple):
    """What the quantiser makes of a latent."""

    latent: Float[Tensor, "B D T"]
    """Sum of the chosen entries; the gradient passes to the encoder's latent unchanged."""
    entries: tuple[Float[Tensor, "B D T"], ...]
    """The chosen entry of every codebook alone, likewise; quantiser dropout leaves them as they
    are, so that a teacher of the last codebook teaches it with every item."""
    codes: Int[Tensor, "B Q T"]
    commitment: Float[Tensor, ""]
    """Mean over codebooks of the squared distance from residual to (constant) entry."""

    def part(self, codebooks: str) -> Float[Tensor, "B D T"]:
        """What a teacher may look at: the `first` entry, the `last`, or the `mean` of all."""
        if codebooks == "mean":
            return torch.stack(self.entries).mean(0)
        return self.entries[{"first": 0, "last": -1}[codebooks]]


class CodebookUse(NamedTuple):
    """How evenly codebooks are used, each (Q,)."""

    share: Float[Tensor, " Q"]
    """Of entries that occur at all."""
    perplexity: Float[Tensor, " Q"]
    """exp(entropy) of the entries' frequencies, 1 to K."""


class Codebook(nn.Module):
    """K entries that follow the vectors assigned to them by exponential moving averages.

    Source: VQ-VAE (arXiv 1711.00937), appendix A.1. `seed` makes the random choices.
    """

    entries: Tensor
    cluster_size: Tensor
    entry_sum: Tensor
    num_updates: Tensor

    def __init__(self, dimension: int, config: QuantizerConfig, *, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        size = config.codebook_size
        self.register_buffer("entries", torch.zeros(size, dimension))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("entry_sum", torch.zeros(size, dimension))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def nearest(self, vectors: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
        """Index of the closest entry by Euclidean distance; the lowest on ties."""
        return _nearest(vectors, self.entries)

    def lookup(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Entries by index."""
        return functional.embedding(codes, self.entries)

    @torch.no_grad()
    def initialize(self, vectors: Float[Tensor, "N D"]) -> None:
        """k-means on the first batch of all ranks; does nothing once done."""
        if self.num_updates > 0:
            return
        samples = _gather(vectors)
        keep = self._generator_choice(len(samples), self.config.kmeans_samples)
        samples = samples[keep]
        size = self.config.codebook_size
        # Fewer vectors than entries: repeat them; EMA revival spreads the copies later.
        start = torch.arange(size, device=samples.device) % len(samples)
        entries, counts = samples[start].clone(), torch.ones_like(self.cluster_size)
        for _ in range(self.config.kmeans_iterations):
            counts, sums = _sums(samples, _nearest(samples, entries), size)
            filled = counts > 0
            entries[filled] = sums[filled] / counts[filled].unsqueeze(1)
        self.entries.copy_(entries)
        self.cluster_size.copy_(counts)
        self.entry_sum.copy_(entries * counts.unsqueeze(1))

    @torch.no_grad()
    def update(self, vectors: Float[Tensor, "N D"], codes: Int[Tensor, " N"]) -> None:
        """One EMA step on the vectors of all ranks, then revival of hardly used entries."""
        counts, sums = _sums(vectors, codes, self.config.codebook_size)
        _all_reduce(counts)
        _all_reduce(sums)
        decay = self.config.decay
        self.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        self.entry_sum.mul_(decay).add_(sums, alpha=1 - decay)
        self.num_updates += 1
        self._revive(vectors)
        used = self.cluster_size.unsqueeze(1) > 1e-6
        mean = self.entry_sum / self.cluster_size.unsqueeze(1).clamp(min=1e-6)
        self.entries.copy_(torch.where(used, mean, self.entries))

    def _revive(self, vectors: Tensor) -> None:
        average = self.cluster_size.mean()
        dead: Bool[Tensor, " K"] = self.cluster_size < self.config.revival_ratio * average
        if not dead.any():
            return
        replacement = self._draw(vectors)[dead]
        # The sums must move along, or the next update would restore the dead entry.
        self.cluster_size[dead] = average
        self.entry_sum[dead] = replacement * average
        self.entries[dead] = replacement

    def _draw(self, vectors: Float[Tensor, "N D"]) -> Float[Tensor, "K D"]:
        """K vectors of the joined batch of all ranks, each rank contributing those it holds."""
        sizes = _gather_sizes(len(vectors), vectors.device)
        rank = torch.distributed.get_rank() if _world_size() > 1 else 0
        offset = sum(sizes[:rank])
        size = self.config.codebook_size
        chosen = self._generator_choice(sum(sizes), size)
        chosen = chosen.repeat(-(-size // len(chosen)))[:size].to(vectors.device) - offset
        mine = (chosen >= 0) & (chosen < len(vectors))
        drawn = torch.zeros(size, vectors.shape[1], device=vectors.device)
        drawn[mine] = vectors[chosen[mine]]
        _all_reduce(drawn)
        return drawn

    def _generator_choice(self, population: int, count: int) -> Int[Tensor, " n"]:
        """Up to `count` different numbers below `population`, a function of seed and update."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.num_updates))
        return torch.randperm(population, generator=generator)[:count]


class ResidualVQ(nn.Module):
    """Q codebooks, each quantising what the ones before it left over (arXiv 2107.03312)."""

    def __init__(self, dimension: int, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.codebooks = nn.ModuleList(
            Codebook(dimension, config, seed=index + 1) for index in range(config.num_codebooks)
        )

    def forward(self, latent: Float[Tensor, "B D T"]) -> Quantized:
        """Quantise; in training mode also initialise and update the codebooks."""
        with torch.autocast(latent.device.type, enabled=False):
            return self._quantize(latent.float())

    def _quantize(self, latent: Float[Tensor, "B D T"]) -> Quantized:
        batch = latent.shape[0]
        kept = self._kept_codebooks(batch, latent.device)
        residual, total = latent, torch.zeros_like(latent)
        entries, codes, commitments = [], [], []
        for index, codebook in enumerate(self.codebooks):
            assert isinstance(codebook, Codebook)
            vectors = rearrange(residual.detach(), "b d t -> (b t) d")
            if self.training:
                # Only here does layer `index` see a residual of initialised layers.
                codebook.initialize(vectors)
            flat = codebook.nearest(vectors)
            entry = rearrange(codebook.lookup(flat), "(b t) d -> b d t", b=batch)
            if self.training:
                codebook.update(vectors, flat)
            inside = (index < kept).view(-1, 1, 1)
            commitments.append(
                (functional.mse_loss(residual, entry, reduction="none") * inside).mean()
            )
            codes.append(rearrange(flat, "(b t) -> b t", b=batch))
            total = total + entry * inside
            entries.append(_straight_through(latent, entry))
            residual = residual - entry
        return Quantized(
            latent=_straight_through(latent, total),
            entries=tuple(entries),
            codes=torch.stack(codes, dim=1),
            commitment=torch.stack(commitments).mean(),
        )

    def _kept_codebooks(self, batch: int, device: torch.device) -> Int[Tensor, " B"]:
        """How many codebooks each item keeps: all, or with quantiser dropout a random number."""
        count = self.config.num_codebooks
        if not self.training or self.config.dropout == 0:
            return torch.full((batch,), count, device=device)
        few = torch.randint(1, count + 1, (batch,), device=device)
        return torch.where(torch.rand(batch, device=device) < self.config.dropout, few, count)

    @torch.no_grad()
    def encode(
        self,
        latent: Float[Tensor, "B D T"],
        num_codebooks: int | None = None,
        first_codebook: int = 0,
    ) -> Int[Tensor, "B q T"]:
        """Codes of `num_codebooks` codebooks (default all that are left) from first_codebook on.

        The first of them quantises the latent itself: what codebooks before it would have taken is
        not subtracted.
        """
        residual, codes = rearrange(latent.float(), "b d t -> (b t) d"), []
        for codebook in list(self.codebooks)[first_codebook:][:num_codebooks]:
            assert isinstance(codebook, Codebook)
            flat = codebook.nearest(residual)
            residual = residual - codebook.lookup(flat)
            codes.append(rearrange(flat, "(b t) -> b t", b=latent.shape[0]))
        return torch.stack(codes, dim=1)

    def decode(
        self, codes: Int[Tensor, "B q T"], first_codebook: int = 0
    ) -> Float[Tensor, "B D T"]:
        """Sum of the entries of codebooks first_codebook, first_codebook + 1, ... ."""
        entries = []
        for index, row in enumerate(codes.unbind(1)):
            codebook = self.codebooks[first_codebook + index]
            assert isinstance(codebook, Codebook)
            entries.append(codebook.lookup(row))
        return rearrange(torch.stack(entries).sum(0), "b t d -> b d t")


def count_codes(codes: Int[Tensor, "B Q T"], codebook_size: int) -> Int[Tensor, "Q K"]:
    """How often every entry occurs."""
    flat = rearrange(codes, "b q t -> q (b t)")
    counts = torch.zeros(len(flat), codebook_size, dtype=torch.long, device=codes.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat))


def codebook_use(counts: Int[Tensor, "Q K"]) -> CodebookUse:
    """Share of used entries and perplexity of each codebook, from `count_codes`."""
    frequency = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -(frequency * frequency.clamp(min=1e-12).log()).sum(1)
    return CodebookUse(share=(counts > 0).float().mean(1), perplexity=entropy.exp())


def _straight_through(latent: Tensor, quantized: Tensor) -> Tensor:
    """The quantised value with the latent's gradient: identity, once over the sum."""
    return latent + (quantized - latent).detach()


def _nearest(vectors: Float[Tensor, "N D"], entries: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
    """Closest entries, in chunks so that memory stays bounded for any N."""
    squared = entries.square().sum(1)
    chunks = [
        (squared - 2 * chunk @ entries.T).argmin(1) for chunk in vectors.split(DISTANCE_CHUNK)
    ]
    return torch.cat(chunks)


def _sums(vectors: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(codes, minlength=size).to(vectors.dtype)
    sums = torch.zeros(size, vectors.shape[1], device=vectors.device, dtype=vectors.dtype)
    return counts, sums.index_add_(0, codes, vectors)


def _world_size() -> int:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def _all_reduce(values: Tensor) -> None:
    if _world_size() > 1:
        torch.distributed.all_reduce(values)


def _gather_sizes(size: int, device: torch.device) -> list[int]:
    if _world_size() == 1:
        return [size]
    own = torch.tensor([size], device=device)
    sizes = [torch.zeros_like(own) for _ in range(_world_size())]
    torch.distributed.all_gather(sizes, own)
    return [int(each) for each in sizes]


def _gather(vectors: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
    """The vectors of all ranks in rank order; ranks may hold different numbers of them."""
    sizes = _gather_sizes(len(vectors), vectors.device)
    if len(sizes) == 1:
        return vectors
    padded = functional.pad(vectors, (0, 0, 0, max(sizes) - len(vectors)))
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
