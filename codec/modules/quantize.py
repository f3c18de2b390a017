"""Vector quantizers: codebooks (EMA or gradient), the residual VQ, and LM-SPT's split VQ.

Random choices (initial centroids, revived entries) depend only on a codebook's seed and update
counter, and statistics are summed over ranks. So all ranks stay identical to each other and to one
process on the joined batch, and a resumed run repeats the choices.
"""

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from codec.config import QuantizerConfig

# Distances are computed for this many vectors at a time, fewer for a large codebook: 32 MB at most.
DISTANCE_CHUNK = 8192
MAX_DISTANCES = 8192 * 1024


class CodebookOutput(NamedTuple):
    """One codebook's quantization of a residual."""

    value: Float[Tensor, "B D T"]
    """The nearest entries: detached, or with projections differentiable in the residual."""
    codes: Int[Tensor, "B T"]
    commitment: Float[Tensor, " B"]
    """Mean squared distance of each item's vectors to their entries, which are detached."""
    codebook_loss: Float[Tensor, " B"]
    """The same distance with the vectors detached; 0 for EMA codebooks."""


class Codebook(nn.Module):
    """K entries that are updated by moving averages (EMA) or by gradient.

    `seed` determines the random choices. Source: VQ-VAE (arXiv 1711.00937), section 3.2 and
    appendix A.1.
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
        # Entries trained by gradient start with equal usage: with zero usage the first batch would
        # revive all entries that it does not select.
        usage = torch.ones(size) if self.learned else torch.zeros(size)
        self.register_buffer("cluster_size", usage)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def nearest(self, vectors: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
        """Index of the nearest entry (`normalize`: by cosine similarity); the lowest on ties."""
        if self.config.normalize:
            return _nearest(functional.normalize(vectors), functional.normalize(self.entries))
        return _nearest(vectors, self.entries)

    def lookup(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Entries by index."""
        return functional.embedding(codes, self.entries)

    def quantize(self, residual: Float[Tensor, "B D T"]) -> CodebookOutput:
        """The nearest entries; in training mode also initializes and updates the codebook."""
        vectors = rearrange(residual, "b d t -> (b t) d")
        if self.training:
            self.initialize(vectors.detach())
        with torch.no_grad():
            codes = self.nearest(vectors)
        # Looked up before the update: these are the entries that the vectors were compared with.
        looked_up = self.lookup(codes)
        if self.training:
            self.update(vectors.detach(), codes)
        batch = len(residual)
        entry = rearrange(looked_up, "(b t) d -> b d t", b=batch)
        commitment = (residual - entry.detach()).square().mean((1, 2))
        codebook_loss = torch.zeros_like(commitment)
        if self.learned:
            codebook_loss = (residual.detach() - entry).square().mean((1, 2))
        return CodebookOutput(
            entry.detach(), rearrange(codes, "(b t) -> b t", b=batch), commitment, codebook_loss
        )

    def encode(self, residual: Float[Tensor, "B D T"]) -> Int[Tensor, "B T"]:
        """Indices of the nearest entries."""
        flat = self.nearest(rearrange(residual, "b d t -> (b t) d"))
        return rearrange(flat, "(b t) -> b t", b=len(residual))

    def decode(self, codes: Int[Tensor, "B T"]) -> Float[Tensor, "B D T"]:
        """Entries by index."""
        return rearrange(self.lookup(codes), "b t d -> b d t")

    @torch.no_grad()
    def initialize(self, vectors: Float[Tensor, "N D"]) -> None:
        """k-means on the first batch of all ranks; does nothing on later batches."""
        if self.num_updates > 0 or (self.learned and not self.config.kmeans_iterations):
            return
        samples = _gather(vectors)
        samples = samples[samples.isfinite().all(1)]
        if not len(samples):
            return
        samples = samples[self._random_indices(len(samples), self.config.kmeans_samples)]
        size = self.size
        # With fewer vectors than entries, vectors are repeated; revival spreads the copies later.
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
        """One EMA step on the vectors of all ranks, then revival of dead entries.

        For entries trained by gradient only the usage statistics are updated. A vector that is not
        finite counts as its entry: its step is skipped, and must not leave a NaN behind.
        """
        is_finite = vectors.isfinite().all(1, keepdim=True)
        vectors = torch.where(is_finite, vectors, self.entries[codes])
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
        replacement = self._sample(vectors)[dead]
        # The EMA sums must be replaced too, or the next update would restore the dead entry.
        self.cluster_size[dead] = average
        if not self.learned:
            self.entry_sum[dead] = replacement * average
        self.entries[dead] = replacement

    def _sample(self, vectors: Float[Tensor, "N D"]) -> Float[Tensor, "K D"]:
        """K random vectors of the joined batch of all ranks; each rank contributes its own."""
        sizes = _gather_sizes(len(vectors), vectors.device)
        rank = torch.distributed.get_rank() if _world_size() > 1 else 0
        offset = sum(sizes[:rank])
        size = self.size
        chosen = self._random_indices(sum(sizes), size)
        chosen = chosen.repeat(-(-size // len(chosen)))[:size].to(vectors.device) - offset
        own = (chosen >= 0) & (chosen < len(vectors))
        sample = torch.zeros(size, vectors.shape[1], device=vectors.device)
        sample[own] = vectors[chosen[own]]
        _all_reduce(sample)
        return sample

    def _random_indices(self, population: int, count: int) -> Int[Tensor, " n"]:
        """Up to `count` distinct indices below `population`, determined by seed and update."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.num_updates))
        return torch.randperm(population, generator=generator)[:count]


class FactorizedCodebook(nn.Module):
    """A low-dimensional codebook with a projection from and to the latent.

    Source: DAC (arXiv 2306.06546, section 3.2), after 2110.04627. The quantized value has a
    straight-through gradient to the residual, through both projections.
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

    def quantize(self, residual: Float[Tensor, "B D T"]) -> CodebookOutput:
        """The nearest entries; in training mode also initializes and updates the codebook."""
        projected = self.project_in(residual)
        out = self.codebook.quantize(projected)
        return out._replace(value=self.project_out(_straight_through(projected, out.value)))

    def encode(self, residual: Float[Tensor, "B D T"]) -> Int[Tensor, "B T"]:
        """Indices of the nearest entries."""
        return self.codebook.encode(self.project_in(residual))

    def decode(self, codes: Int[Tensor, "B T"]) -> Float[Tensor, "B D T"]:
        """Entries by index, projected to the latent's features."""
        return self.project_out(self.codebook.decode(codes))


class Quantized(NamedTuple):
    """Output of a quantizer for one batch."""

    latent: Float[Tensor, "B D T"]
    """Sum of the selected entries with a straight-through gradient to the encoder's latent (through
    the projections of factorized codebooks)."""
    entries: tuple[Float[Tensor, "B D T"], ...]
    """The selected entry of each codebook, with the same gradient. Quantizer dropout does not mask
    them, so a teacher of the last codebook trains it with every item."""
    codes: Int[Tensor, "B Q T"]
    commitments: Float[Tensor, " Q"]
    """Commitment loss of each codebook: mean squared distance to the detached entries."""
    codebook_losses: Float[Tensor, " Q"]
    """Codebook loss of each codebook (distance to the detached vectors); 0 for EMA codebooks."""

    @property
    def commitment(self) -> Float[Tensor, ""]:
        """Mean over codebooks, as in SpeechTokenizer's released code.

        DM-Codec (arXiv 2410.15017, equation 9) sums over codebooks and dimensions: Q x D times this
        value, 8 x 1024 = 8192 in the published configuration.
        """
        return self.commitments.mean()

    @property
    def codebook_loss(self) -> Float[Tensor, ""]:
        """Mean over codebooks."""
        return self.codebook_losses.mean()

    def part(self, codebooks: str) -> Float[Tensor, "B D T"]:
        """Input of a distillation objective: the `first` or `last` entry, or the `mean` of all."""
        if codebooks == "mean":
            return torch.stack(self.entries).mean(0)
        return self.entries[{"first": 0, "last": -1}[codebooks]]


class ResidualVQ(nn.Module):
    """Residual VQ: each codebook quantizes the residual of those before it (arXiv 2107.03312).

    Has codebooks `first` to `first + count - 1` of the configuration (default: all).
    """

    def __init__(
        self, dimension: int, config: QuantizerConfig, *, first: int = 0, count: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        indices = range(config.num_codebooks)[first:][:count]
        self.codebooks = nn.ModuleList(_codebook(dimension, config, index) for index in indices)
        self.projects = bool(config.dimensions[first])

    def forward(self, latent: Float[Tensor, "B D T"]) -> Quantized:
        """Quantize; in training mode also initialize and update the codebooks."""
        with torch.autocast(latent.device.type, enabled=False):
            return self._quantize(latent.float())

    def _quantize(self, latent: Float[Tensor, "B D T"]) -> Quantized:
        kept = self._kept_codebooks(len(latent), latent.device)
        residual, total = latent, torch.zeros_like(latent)
        values, codes, commitments, losses = [], [], [], []
        for index, codebook in enumerate(self.codebooks):
            assert isinstance(codebook, Codebook | FactorizedCodebook)
            # Codebook `index` is initialized here, on the residual of initialized codebooks.
            out = codebook.quantize(residual)
            inside = index < kept
            commitments.append((out.commitment * inside).mean())
            losses.append((out.codebook_loss * inside).mean())
            codes.append(out.codes)
            total = total + out.value * inside.view(-1, 1, 1)
            values.append(out.value)
            residual = residual - out.value
        if not self.projects:
            # Detached entries have no gradient: straight-through, once over the sum.
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
        """Number of codebooks that each item keeps: all, or a random number (quantizer dropout)."""
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
        """Codes of `num_codebooks` codebooks (default: all the rest) from `first_codebook` on.

        The first of them quantizes the latent itself: entries of earlier codebooks are not
        subtracted.
        """
        residual, codes = latent.float(), []
        for codebook in list(self.codebooks)[first_codebook:][:num_codebooks]:
            assert isinstance(codebook, Codebook | FactorizedCodebook)
            codes.append(codebook.encode(residual))
            residual = residual - codebook.decode(codes[-1])
        return torch.stack(codes, dim=1)

    def decode(
        self, codes: Int[Tensor, "B q T"], first_codebook: int = 0
    ) -> Float[Tensor, "B D T"]:
        """Sum of the entries of codebooks `first_codebook`, `first_codebook + 1`, ..."""
        entries = []
        for index, row in enumerate(codes.unbind(1)):
            codebook = self.codebooks[first_codebook + index]
            assert isinstance(codebook, Codebook | FactorizedCodebook)
            entries.append(codebook.decode(row))
        return torch.stack(entries).sum(0)


class SemanticPath(Enum):
    """Input of the acoustic codebooks of LM-SPT, and the gradient of the semantic entry."""

    PARALLEL = auto()
    """The acoustic codebooks quantize the acoustic latent (first version of the paper, after Mimi,
    arXiv 2410.00037); the entry has a gradient in the decoder's input."""
    RESIDUAL = auto()
    """They quantize the acoustic latent less the entry, and the acoustic losses have a gradient to
    the semantic encoder through its codebook's projections (released code, arXiv 2506.16738)."""
    DETACHED_RESIDUAL = auto()
    """The same with the entry detached: without projections its straight-through gradient would
    cancel the one of the decoder's input."""
    DETACHED = auto()
    """The entry is detached in the decoder's input too: a shared encoder gets the straight-through
    gradient once, through the acoustic half."""


class SplitVQ(nn.Module):
    """LM-SPT's quantizer: one semantic codebook, and a residual VQ of acoustic codebooks.

    The latent has 2D channels, those of the semantic encoder first. The decoder's input is the sum
    of all entries. Quantizer dropout applies to the acoustic codebooks only.
    """

    def __init__(self, dimension: int, config: QuantizerConfig, path: SemanticPath) -> None:
        super().__init__()
        self.path = path
        self.semantic = ResidualVQ(dimension, replace(config, dropout=0.0), count=1)
        self.acoustic = ResidualVQ(dimension, config, first=1)

    def forward(self, latent: Float[Tensor, "B E T"]) -> Quantized:
        """Quantize; in training mode also initialize and update the codebooks."""
        semantic_latent, acoustic_latent = latent.chunk(2, dim=1)
        return self._joined(self.semantic(semantic_latent), acoustic_latent)

    def with_semantic_codes(
        self, codes: Int[Tensor, "B T"], acoustic_latent: Float[Tensor, "B D T"]
    ) -> Quantized:
        """`forward` with known semantic codes: no gradient or update of the semantic codebook."""
        with torch.no_grad():
            latent = self.semantic.decode(codes[:, None])
        zero = latent.new_zeros(1)
        semantic = Quantized(latent, (latent,), codes[:, None], zero, zero)
        return self._joined(semantic, acoustic_latent)

    def _joined(self, semantic: Quantized, acoustic_latent: Float[Tensor, "B D T"]) -> Quantized:
        entry, detached = semantic.latent, semantic.latent.detach()
        if self.path is SemanticPath.DETACHED:
            entry = detached
        if self.path is not SemanticPath.PARALLEL:
            acoustic_latent = acoustic_latent - (
                entry if self.path is SemanticPath.RESIDUAL else detached
            )
        acoustic = self.acoustic(acoustic_latent)
        return Quantized(
            latent=entry + acoustic.latent,
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
        """Codes of `num_codebooks` codebooks (default: all the rest) from `first_codebook` on.

        With `first_codebook` 1 the semantic entry is subtracted as in a full encoding. From 2 on,
        entries of earlier acoustic codebooks are not subtracted.
        """
        semantic_latent, acoustic_latent = latent.float().chunk(2, dim=1)
        remaining = len(self.acoustic.codebooks) + 1 - first_codebook
        count = remaining if num_codebooks is None else num_codebooks
        semantic, codes = self.semantic.encode(semantic_latent), []
        if first_codebook == 0:
            codes.append(semantic)
            count -= 1
        if count:
            if self.path is not SemanticPath.PARALLEL:
                acoustic_latent = acoustic_latent - self.semantic.decode(semantic)
            codes.append(self.acoustic.encode(acoustic_latent, count, max(0, first_codebook - 1)))
        return torch.cat(codes, dim=1)

    def decode(
        self, codes: Int[Tensor, "B q T"], first_codebook: int = 0
    ) -> Float[Tensor, "B D T"]:
        """Sum of the entries of codebooks `first_codebook`, `first_codebook + 1`, ..."""
        if first_codebook > 0:
            return self.acoustic.decode(codes, first_codebook - 1)
        semantic = self.semantic.decode(codes[:, :1])
        return semantic if codes.shape[1] == 1 else semantic + self.acoustic.decode(codes[:, 1:])


class CodebookUsage(NamedTuple):
    """Usage statistics of each codebook."""

    share: Float[Tensor, " Q"]
    """Share of the entries that occur, 0 to 1."""
    perplexity: Float[Tensor, " Q"]
    """exp(entropy) of the entries' frequencies, 1 to K."""


def count_codes(codes: Int[Tensor, "B Q T"], size: int) -> Int[Tensor, "Q K"]:
    """Number of occurrences of each entry; `size` is K of the largest codebook."""
    flat = rearrange(codes, "b q t -> q (b t)")
    counts = torch.zeros(len(flat), size, dtype=torch.long, device=codes.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat))


def codebook_usage(counts: Int[Tensor, "Q K"], sizes: Sequence[int]) -> CodebookUsage:
    """Usage statistics of codebooks of `sizes` entries from the counts of `count_codes`."""
    frequency = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -(frequency * frequency.clamp(min=1e-12).log()).sum(1)
    totals = torch.tensor(sizes, device=counts.device)
    return CodebookUsage(share=(counts > 0).sum(1) / totals, perplexity=entropy.exp())


def _codebook(dimension: int, config: QuantizerConfig, index: int) -> nn.Module:
    size, lookup, seed = config.sizes[index], config.dimensions[index], index + 1
    if lookup:
        return FactorizedCodebook(dimension, lookup, size, config, seed=seed)
    return Codebook(dimension, size, config, seed=seed)


def _straight_through(latent: Tensor, quantized: Tensor) -> Tensor:
    """The quantized value with the identity gradient to the latent."""
    return latent + (quantized - latent).detach()


def _nearest(vectors: Float[Tensor, "N D"], entries: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
    """Indices of the nearest entries, in chunks so that memory is bounded for any N and K."""
    squared = entries.square().sum(1)
    size = max(1, min(DISTANCE_CHUNK, MAX_DISTANCES // len(entries)))
    chunks = [(squared - 2 * chunk @ entries.T).argmin(1) for chunk in vectors.split(size)]
    return torch.cat(chunks)


def _sums(vectors: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Number and sum of the vectors assigned to each entry, (K,) and (K,D)."""
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
    """The vectors of all ranks in rank order; their numbers may differ between ranks."""
    sizes = _gather_sizes(len(vectors), vectors.device)
    if len(sizes) == 1:
        return vectors
    padded = functional.pad(vectors, (0, 0, 0, max(sizes) - len(vectors)))
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
