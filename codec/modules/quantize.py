"""Residual vector quantisers: of one latent, and LM-SPT's of a semantic and an acoustic one.

Codebooks: tables of entries that are learned, and looked up by the nearest one.

All random choices (first centroids, revived entries) are a function of the codebook's own update
counter, and all statistics are summed over ranks, so that ranks stay identical to each other and
to one process on the joined batch, and a resumed run repeats them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from codec.config import QuantizerConfig

# Distances of this many vectors at a time, or of fewer to a large codebook: at most 32 MB.
DISTANCE_CHUNK = 8192
DISTANCES = 8192 * 1024


class Choice(NamedTuple):
    """What one codebook makes of a residual."""

    value: Float[Tensor, "B D T"]
    """The chosen entries: constants, or through projections with a gradient to the residual."""
    codes: Int[Tensor, "B T"]
    commitment: Float[Tensor, " B"]
    """Squared distance of each item's looked-up vectors to their (constant) entries, its mean."""
    codebook_loss: Float[Tensor, " B"]
    """The same with the gradient to the entries; 0 where they follow moving averages."""


class Codebook(nn.Module):
    """K entries that follow the vectors assigned to them, by moving averages or by gradient.

    `seed` makes the random choices. Source: VQ-VAE (arXiv 1711.00937), section 3.2, appendix A.1.
    """

    entries: Tensor
    cluster_size: Tensor
    entry_sum: Tensor
    num_updates: Tensor

    def __init__(self, dimension: int, size: int, config: QuantizerConfig, *, seed: int) -> None:
        super().__init__()
        self.config, self.seed, self.size = config, seed, size
        self.learned = config.learning == "gradient"
        if self.learned:
            self.entries = nn.Parameter(torch.randn(size, dimension))
        else:
            self.register_buffer("entries", torch.zeros(size, dimension))
            self.register_buffer("entry_sum", torch.zeros(size, dimension))
        # Entries that learn by gradient start with equal use: with none, the first batch would
        # replace all that it does not choose.
        use = torch.ones(size) if self.learned else torch.zeros(size)
        self.register_buffer("cluster_size", use)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def nearest(self, vectors: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
        """Index of the closest entry (normalised: of the smallest angle); the lowest on ties."""
        if self.config.normalize:
            return _nearest(functional.normalize(vectors), functional.normalize(self.entries))
        return _nearest(vectors, self.entries)

    def lookup(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Entries by index."""
        return functional.embedding(codes, self.entries)

    def choose(self, residual: Float[Tensor, "B D T"]) -> Choice:
        """The nearest entries; in training mode the table also learns from the residual."""
        vectors = rearrange(residual, "b d t -> (b t) d")
        if self.training:
            self.initialize(vectors.detach())
        with torch.no_grad():
            codes = self.nearest(vectors)
        # Before the update: what is chosen is what the vectors were compared with.
        looked_up = self.lookup(codes)
        if self.training:
            self.update(vectors.detach(), codes)
        batch = len(residual)
        entry = rearrange(looked_up, "(b t) d -> b d t", b=batch)
        commitment = (residual - entry.detach()).square().mean((1, 2))
        codebook_loss = torch.zeros_like(commitment)
        if self.learned:
            codebook_loss = (residual.detach() - entry).square().mean((1, 2))
        return Choice(
            entry.detach(), rearrange(codes, "(b t) -> b t", b=batch), commitment, codebook_loss
        )

    def codes(self, residual: Float[Tensor, "B D T"]) -> Int[Tensor, "B T"]:
        """Indices of the nearest entries."""
        flat = self.nearest(rearrange(residual, "b d t -> (b t) d"))
        return rearrange(flat, "(b t) -> b t", b=len(residual))

    def values(self, codes: Int[Tensor, "B T"]) -> Float[Tensor, "B D T"]:
        """Entries by index."""
        return rearrange(self.lookup(codes), "b t d -> b d t")

    @torch.no_grad()
    def initialize(self, vectors: Float[Tensor, "N D"]) -> None:
        """k-means on the first batch of all ranks; does nothing once done."""
        if self.num_updates > 0 or (self.learned and not self.config.kmeans_iterations):
            return
        samples = _gather(vectors)
        keep = self._generator_choice(len(samples), self.config.kmeans_samples)
        samples = samples[keep]
        size = self.size
        # Fewer vectors than entries: repeat them; EMA revival spreads the copies later.
        start = torch.arange(size, device=samples.device) % len(samples)
        entries, counts = samples[start].clone(), torch.ones_like(self.cluster_size)
        for _ in range(self.config.kmeans_iterations):
            counts, sums = _sums(samples, _nearest(samples, entries), size)
            filled = counts > 0
            entries[filled] = sums[filled] / counts[filled].unsqueeze(1)
        self.entries.copy_(entries)
        self.cluster_size.copy_(counts)
        if not self.learned:
            self.entry_sum.copy_(entries * counts.unsqueeze(1))

    @torch.no_grad()
    def update(self, vectors: Float[Tensor, "N D"], codes: Int[Tensor, " N"]) -> None:
        """One EMA step on the vectors of all ranks, then revival of hardly used entries.

        Entries that learn by gradient have no sums: only their use is followed.
        """
        counts, sums = _sums(vectors, codes, self.size)
        _all_reduce(counts)
        decay = self.config.decay
        self.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        self.num_updates += 1
        if self.learned:
            self._revive(vectors)
            return
        _all_reduce(sums)
        self.entry_sum.mul_(decay).add_(sums, alpha=1 - decay)
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
        if not self.learned:
            self.entry_sum[dead] = replacement * average
        self.entries[dead] = replacement

    def _draw(self, vectors: Float[Tensor, "N D"]) -> Float[Tensor, "K D"]:
        """K vectors of the joined batch of all ranks, each rank contributing those it holds."""
        sizes = _gather_sizes(len(vectors), vectors.device)
        rank = torch.distributed.get_rank() if _world_size() > 1 else 0
        offset = sum(sizes[:rank])
        size = self.size
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


class FactorisedCodebook(nn.Module):
    """A codebook of few features with a projection into them and one back.

    Source: Descript's codec (arXiv 2306.06546, section 3.2), after 2110.04627. The value has a
    gradient to the residual: through both projections, past the choice (straight-through).
    """

    def __init__(
        self,
        dimension: int,
        lookup_dimension: int,
        size: int,
        config: QuantizerConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.project_in = weight_norm(nn.Conv1d(dimension, lookup_dimension, 1))
        self.project_out = weight_norm(nn.Conv1d(lookup_dimension, dimension, 1))
        self.codebook = Codebook(lookup_dimension, size, config, seed=seed)

    def choose(self, residual: Float[Tensor, "B D T"]) -> Choice:
        """The nearest entries; in training mode the table also learns from the residual."""
        projected = self.project_in(residual)
        choice = self.codebook.choose(projected)
        passed = projected + (choice.value - projected).detach()
        return choice._replace(value=self.project_out(passed))

    def codes(self, residual: Float[Tensor, "B D T"]) -> Int[Tensor, "B T"]:
        """Indices of the nearest entries."""
        return self.codebook.codes(self.project_in(residual))

    def values(self, codes: Int[Tensor, "B T"]) -> Float[Tensor, "B D T"]:
        """Entries by index, projected back."""
        return self.project_out(self.codebook.values(codes))


def _nearest(vectors: Float[Tensor, "N D"], entries: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
    """Closest entries, in chunks so that memory stays bounded for any N and K."""
    squared = entries.square().sum(1)
    size = max(1, min(DISTANCE_CHUNK, DISTANCES // len(entries)))
    chunks = [(squared - 2 * chunk @ entries.T).argmin(1) for chunk in vectors.split(size)]
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


class Quantized(NamedTuple):
    """What the quantiser makes of a latent."""

    latent: Float[Tensor, "B D T"]
    """Sum of the chosen entries; the gradient passes to the encoder's latent unchanged, or through
    the projections of factorised codebooks."""
    entries: tuple[Float[Tensor, "B D T"], ...]
    """The chosen entry of every codebook alone, likewise; quantiser dropout leaves them as they
    are, so that a teacher of the last codebook teaches it with every item."""
    codes: Int[Tensor, "B Q T"]
    commitments: Float[Tensor, " Q"]
    """Squared distance from what each codebook looks up to its (constant) entry, in its mean."""
    codebook_losses: Float[Tensor, " Q"]
    """The same with the gradient to the entry, of codebooks that learn by gradient; else 0."""

    @property
    def commitment(self) -> Float[Tensor, ""]:
        """Mean over codebooks."""
        return self.commitments.mean()

    @property
    def codebook_loss(self) -> Float[Tensor, ""]:
        """Mean over codebooks."""
        return self.codebook_losses.mean()

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


class ResidualVQ(nn.Module):
    """Codebooks that each quantise what the ones before it left over (arXiv 2107.03312).

    They are numbers `first` to `first + count - 1` of the configuration; by default all.
    """

    def __init__(
        self, dimension: int, config: QuantizerConfig, *, first: int = 0, count: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        chosen = range(config.num_codebooks)[first:][:count]
        self.codebooks = nn.ModuleList(_codebook(dimension, config, index) for index in chosen)
        self.projects = bool(config.dimensions[first])

    def forward(self, latent: Float[Tensor, "B D T"]) -> Quantized:
        """Quantise; in training mode also initialise and update the codebooks."""
        with torch.autocast(latent.device.type, enabled=False):
            return self._quantize(latent.float())

    def _quantize(self, latent: Float[Tensor, "B D T"]) -> Quantized:
        kept = self._kept_codebooks(len(latent), latent.device)
        residual, total = latent, torch.zeros_like(latent)
        values, codes, commitments, losses = [], [], [], []
        for index, codebook in enumerate(self.codebooks):
            assert isinstance(codebook, Codebook | FactorisedCodebook)
            # Only here does layer `index` see a residual of initialised layers.
            choice = codebook.choose(residual)
            inside = index < kept
            commitments.append((choice.commitment * inside).mean())
            losses.append((choice.codebook_loss * inside).mean())
            codes.append(choice.codes)
            total = total + choice.value * inside.view(-1, 1, 1)
            values.append(choice.value)
            residual = residual - choice.value
        if not self.projects:
            # Constants have no gradient of their own: the latent's, once over the sum.
            total = _straight_through(latent, total)
            values = [_straight_through(latent, value) for value in values]
        return Quantized(
            latent=total,
            entries=tuple(values),
            codes=torch.stack(codes, dim=1),
            commitments=torch.stack(commitments),
            codebook_losses=torch.stack(losses),
        )

    def _kept_codebooks(self, batch: int, device: torch.device) -> Int[Tensor, " B"]:
        """How many codebooks each item keeps: all, or with quantiser dropout a random number."""
        count = len(self.codebooks)
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
        residual, codes = latent.float(), []
        for codebook in list(self.codebooks)[first_codebook:][:num_codebooks]:
            assert isinstance(codebook, Codebook | FactorisedCodebook)
            codes.append(codebook.codes(residual))
            residual = residual - codebook.values(codes[-1])
        return torch.stack(codes, dim=1)

    def decode(
        self, codes: Int[Tensor, "B q T"], first_codebook: int = 0
    ) -> Float[Tensor, "B D T"]:
        """Sum of the entries of codebooks first_codebook, first_codebook + 1, ... ."""
        entries = []
        for index, row in enumerate(codes.unbind(1)):
            codebook = self.codebooks[first_codebook + index]
            assert isinstance(codebook, Codebook | FactorisedCodebook)
            entries.append(codebook.values(row))
        return torch.stack(entries).sum(0)


class SplitVQ(nn.Module):
    """LM-SPT's quantiser: a semantic codebook and a residual quantiser of acoustic ones.

    The latent has 2D channels, those of the semantic encoder first. With `subtract` the acoustic
    codebooks quantise what the semantic one left over (released code, arXiv 2506.16738); without,
    their encoder's whole latent, in parallel (first form, after Mimi, arXiv 2410.00037). The
    decoder hears the sum. Quantiser dropout is of the acoustic codebooks. `shared`: both halves are
    one encoder's latent.
    """

    def __init__(
        self, dimension: int, config: QuantizerConfig, *, subtract: bool, shared: bool = False
    ) -> None:
        super().__init__()
        self.subtract = subtract
        # As released, the acoustic losses reach the semantic encoder through projections. An
        # unprojected entry is a constant there: its straight-through gradient would cancel the one
        # that the sum gives to the semantic encoder. A shared encoder has the acoustic half's.
        self.constant = not config.dimensions[0]
        self.once = self.constant and shared and subtract
        self.semantic = ResidualVQ(dimension, replace(config, dropout=0.0), count=1)
        self.acoustic = ResidualVQ(dimension, config, first=1)

    def forward(self, latent: Float[Tensor, "B E T"]) -> Quantized:
        """Quantise; in training mode also initialise and update the codebooks."""
        semantic_latent, acoustic_latent = latent.chunk(2, dim=1)
        return self._joined(self.semantic(semantic_latent), acoustic_latent)

    def beside(
        self, codes: Int[Tensor, "B T"], acoustic_latent: Float[Tensor, "B D T"]
    ) -> Quantized:
        """The same where the semantic codes are known: nothing reaches or changes that codebook."""
        with torch.no_grad():
            latent = self.semantic.decode(codes[:, None])
        zero = latent.new_zeros(1)
        semantic = Quantized(latent, (latent,), codes[:, None], zero, zero)
        return self._joined(semantic, acoustic_latent)

    def _joined(self, semantic: Quantized, acoustic_latent: Float[Tensor, "B D T"]) -> Quantized:
        if self.subtract:
            taken = semantic.latent.detach() if self.constant else semantic.latent
            acoustic_latent = acoustic_latent - taken
        acoustic = self.acoustic(acoustic_latent)
        heard = semantic.latent.detach() if self.once else semantic.latent
        return Quantized(
            latent=heard + acoustic.latent,
            entries=semantic.entries + acoustic.entries,
            codes=torch.cat([semantic.codes, acoustic.codes], dim=1),
            commitments=torch.cat([semantic.commitments, acoustic.commitments]),
            codebook_losses=torch.cat([semantic.codebook_losses, acoustic.codebook_losses]),
        )

    @torch.no_grad()
    def encode(
        self,
        latent: Float[Tensor, "B E T"],
        num_codebooks: int | None = None,
        first_codebook: int = 0,
    ) -> Int[Tensor, "B q T"]:
        """Codes of `num_codebooks` codebooks (default all that are left) from first_codebook on.

        From 1 on they are those of the whole: what the semantic codebook took stays subtracted.
        From 2 on, what acoustic codebooks before them would have taken is not.
        """
        semantic_latent, acoustic_latent = latent.float().chunk(2, dim=1)
        wanted = len(self.acoustic.codebooks) + 1 - first_codebook
        count = wanted if num_codebooks is None else num_codebooks
        semantic, codes = self.semantic.encode(semantic_latent), []
        if first_codebook == 0:
            codes.append(semantic)
            count -= 1
        if count:
            if self.subtract:
                acoustic_latent = acoustic_latent - self.semantic.decode(semantic)
            codes.append(self.acoustic.encode(acoustic_latent, count, max(0, first_codebook - 1)))
        return torch.cat(codes, dim=1)

    def decode(
        self, codes: Int[Tensor, "B q T"], first_codebook: int = 0
    ) -> Float[Tensor, "B D T"]:
        """Sum of the entries of codebooks first_codebook, first_codebook + 1, ... ."""
        if first_codebook > 0:
            return self.acoustic.decode(codes, first_codebook - 1)
        semantic = self.semantic.decode(codes[:, :1])
        return semantic if codes.shape[1] == 1 else semantic + self.acoustic.decode(codes[:, 1:])


def count_codes(codes: Int[Tensor, "B Q T"], size: int) -> Int[Tensor, "Q K"]:
    """How often every entry occurs; `size` is that of the largest codebook."""
    flat = rearrange(codes, "b q t -> q (b t)")
    counts = torch.zeros(len(flat), size, dtype=torch.long, device=codes.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat))


def codebook_use(counts: Int[Tensor, "Q K"], sizes: Sequence[int]) -> CodebookUse:
    """Share of used entries and perplexity of codebooks of `sizes`, from `count_codes`."""
    frequency = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -(frequency * frequency.clamp(min=1e-12).log()).sum(1)
    of = torch.tensor(sizes, device=counts.device)
    return CodebookUse(share=(counts > 0).sum(1) / of, perplexity=entropy.exp())


def _codebook(dimension: int, config: QuantizerConfig, index: int) -> nn.Module:
    size, lookup, seed = config.sizes[index], config.dimensions[index], index + 1
    if lookup:
        return FactorisedCodebook(dimension, lookup, size, config, seed=seed)
    return Codebook(dimension, size, config, seed=seed)


def _straight_through(latent: Tensor, quantized: Tensor) -> Tensor:
    """The quantised value with the latent's gradient: identity, once over the sum."""
    return latent + (quantized - latent).detach()
