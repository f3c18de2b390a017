"""Vector quantizers: codebooks (EMA or gradient), the residual VQ, and LM-SPT's split VQ.

Random choices (initial centroids, revived entries) depend only on a codebook's seed and update
counter, and statistics are summed over ranks. So all ranks stay identical to each other and to one
process on the joined batch, and a resumed run repeats the choices. After the first batch a training
step does not wait for the device, and has one all-reduce for all codebooks.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Any, NamedTuple

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
    assigned: "Assigned"
    """What `update_codebooks` takes."""


class Assigned(NamedTuple):
    """Vectors and their nearest entries: the input of a codebook's update."""

    codebook: "Codebook"
    vectors: Float[Tensor, "N D"]
    codes: Int[Tensor, " N"]


class Statistics(NamedTuple):
    """Of a codebook's vectors; summed over ranks, those of the joined batch."""

    counts: Float[Tensor, " K"]
    """Vectors of each entry."""
    sums: Float[Tensor, "K D"] | None
    """Their sums; None for entries trained by gradient."""
    replacements: Float[Tensor, "M D"]
    """Vectors that replace dead entries."""
    rows: Int[Tensor, " K"] | slice
    """The replacement of each entry."""


class Codebook(nn.Module):
    """K entries that are updated by moving averages (EMA) or by gradient.

    `seed` determines the random choices. Source: VQ-VAE (arXiv 1711.00937), section 3.2 and
    appendix A.1.
    """

    entries: Tensor
    cluster_size: Tensor
    entry_sum: Tensor

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
        self.num_updates = 0
        """On the host, as decisions depend on it; a tensor in the state dictionary."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}num_updates"] = torch.tensor(self.num_updates)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name = f"{prefix}num_updates"
        if name in state_dict:
            self.num_updates = int(state_dict.pop(name))
        elif strict:
            missing_keys.append(name)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def nearest(self, vectors: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
        """Index of the nearest entry (`normalize`: by cosine similarity); the lowest on ties."""
        if self.config.normalize:
            return _nearest(functional.normalize(vectors), functional.normalize(self.entries))
        return _nearest(vectors, self.entries)

    def lookup(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Entries by index."""
        return functional.embedding(codes, self.entries)

    def quantize(self, residual: Float[Tensor, "B D T"]) -> CodebookOutput:
        """The nearest entries; in training mode also initializes the codebook. `update_codebooks`
        updates it."""
        vectors = rearrange(residual, "b d t -> (b t) d")
        if self.training:
            self.initialize(vectors.detach())
        with torch.no_grad():
            codes = self.nearest(vectors)
        batch = len(residual)
        entry = rearrange(self.lookup(codes), "(b t) d -> b d t", b=batch)
        commitment = (residual - entry.detach()).square().mean((1, 2))
        codebook_loss = torch.zeros_like(commitment)
        if self.learned:
            codebook_loss = (residual.detach() - entry).square().mean((1, 2))
        return CodebookOutput(
            entry.detach(), rearrange(codes, "(b t) -> b t", b=batch), commitment, codebook_loss,
            Assigned(self, vectors.detach(), codes),
        )  # fmt: skip

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
        chosen = self.random_indices(len(samples), self.config.kmeans_samples)
        samples = samples[chosen.to(samples.device)]
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

    def statistics(
        self, vectors: Float[Tensor, "N D"], codes: Int[Tensor, " N"], rows: Int[Tensor, " K"]
    ) -> Statistics:
        """Of this rank's vectors. One that is not finite counts as its entry: its step is skipped,
        and must not leave a NaN behind.

        Args:
            rows: vectors that replace dead entries; -1: another rank has it.
        """
        is_finite = vectors.isfinite().all(1, keepdim=True)
        vectors = torch.where(is_finite, vectors, self.entries[codes])
        counts, sums = _sums(vectors, codes, self.size)
        return Statistics(counts, None if self.learned else sums, vectors, rows)

    def step(self, joined: Statistics) -> None:
        """One EMA step, then revival of dead entries. For entries trained by gradient only the
        usage statistics are updated."""
        decay = self.config.decay
        self.cluster_size.mul_(decay).add_(joined.counts, alpha=1 - decay)
        if joined.sums is not None:
            self.entry_sum.mul_(decay).add_(joined.sums, alpha=1 - decay)
        self._revive(joined)
        if joined.sums is not None:
            used = self.cluster_size.unsqueeze(1) > 1e-6
            mean = self.entry_sum / self.cluster_size.unsqueeze(1).clamp(min=1e-6)
            self.entries.copy_(torch.where(used, mean, self.entries))

    def _revive(self, joined: Statistics) -> None:
        average = self.cluster_size.mean()
        dead: Bool[Tensor, " K"] = self.cluster_size < self.config.revival_ratio * average
        # On a GPU this would wait for the step; there the work below is cheap.
        if dead.device.type == "cpu" and not dead.any():
            return
        replacements = joined.replacements[joined.rows]
        self.cluster_size.copy_(torch.where(dead, average, self.cluster_size))
        dead = dead.unsqueeze(1)
        # The EMA sums must be replaced too, or the next update would restore the dead entry.
        if joined.sums is not None:
            self.entry_sum.copy_(torch.where(dead, replacements * average, self.entry_sum))
        self.entries.copy_(torch.where(dead, replacements, self.entries))

    def random_indices(self, population: int, count: int) -> Int[Tensor, " n"]:
        """Up to `count` distinct indices below `population`, determined by seed and update. On the
        CPU."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.num_updates)
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
        """The nearest entries; in training mode also initializes the codebook. `update_codebooks`
        updates it."""
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
        quantized, assigned = self.quantize(latent)
        update_codebooks(assigned)
        return quantized

    def quantize(
        self, latent: Float[Tensor, "B D T"]
    ) -> tuple[Quantized, list[Assigned]]:  # fmt: skip
        """Quantize; in training mode also initialize the codebooks.

        Returns the output, and what is assigned to the codebooks in training mode, which are to be
        updated by `update_codebooks`.
        """
        with torch.autocast(latent.device.type, enabled=False):
            return self._quantize(latent.float())

    def _quantize(
        self, latent: Float[Tensor, "B D T"]
    ) -> tuple[Quantized, list[Assigned]]:  # fmt: skip
        kept = self._kept_codebooks(len(latent), latent.device)
        residual, total = latent, torch.zeros_like(latent)
        values, codes, commitments, losses, assigned = [], [], [], [], []
        for index, codebook in enumerate(self.codebooks):
            assert isinstance(codebook, Codebook | FactorizedCodebook)
            # Codebook `index` is initialized here, on the residual of initialized codebooks.
            out = codebook.quantize(residual)
            inside = index < kept
            commitments.append((out.commitment * inside).mean())
            losses.append((out.codebook_loss * inside).mean())
            codes.append(out.codes)
            assigned += [out.assigned] if codebook.training else []
            total = total + out.value * inside.view(-1, 1, 1)
            values.append(out.value)
            residual = residual - out.value
        if not self.projects:
            # Detached entries have no gradient: straight-through, once over the sum.
            total = _straight_through(latent, total)
            values = [_straight_through(latent, value) for value in values]
        quantized = Quantized(
            latent=total,
            entries=tuple(values),
            codes=torch.stack(codes, dim=1),
            commitments=torch.stack(commitments),
            codebook_losses=torch.stack(losses),
        )
        return quantized, assigned

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
        semantic, assigned = self.semantic.quantize(semantic_latent)
        return self._joined(semantic, assigned, acoustic_latent)

    def with_semantic_codes(
        self, codes: Int[Tensor, "B T"], acoustic_latent: Float[Tensor, "B D T"]
    ) -> Quantized:
        """`forward` with known semantic codes: no gradient or update of the semantic codebook."""
        with torch.no_grad():
            latent = self.semantic.decode(codes[:, None])
        zero = latent.new_zeros(1)
        semantic = Quantized(latent, (latent,), codes[:, None], zero, zero)
        return self._joined(semantic, [], acoustic_latent)

    def _joined(
        self, semantic: Quantized, assigned: list[Assigned], acoustic_latent: Float[Tensor, "B D T"]
    ) -> Quantized:
        entry, detached = semantic.latent, semantic.latent.detach()
        if self.path is SemanticPath.DETACHED:
            entry = detached
        if self.path is not SemanticPath.PARALLEL:
            acoustic_latent = acoustic_latent - (
                entry if self.path is SemanticPath.RESIDUAL else detached
            )
        acoustic, more = self.acoustic.quantize(acoustic_latent)
        update_codebooks([*assigned, *more])
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
    counts = vectors.new_zeros(size).index_add_(0, codes, torch.ones_like(vectors[:, 0]))
    return counts, vectors.new_zeros(size, vectors.shape[1]).index_add_(0, codes, vectors)


@torch.no_grad()
def update_codebooks(assigned: Sequence[Assigned]) -> None:
    """One EMA step of each codebook on the vectors of all ranks, then revival of dead entries.

    All codebooks have the same number of vectors N.
    """
    if not assigned:
        return
    for codebook, _, _ in assigned:
        codebook.num_updates += 1
    rows = _replacement_rows(assigned)
    statistics = [
        codebook.statistics(vectors, codes, chosen)
        for (codebook, vectors, codes), chosen in zip(assigned, rows, strict=True)
    ]
    if _world_size() > 1:
        statistics = _joined(statistics)
    for (codebook, _, _), joined in zip(assigned, statistics, strict=True):
        codebook.step(joined)


def _joined(statistics: Sequence[Statistics]) -> list[Statistics]:
    """Sums over ranks, by one collective."""
    own = []
    for counts, sums, vectors, rows in statistics:
        assert isinstance(rows, Tensor)
        # Zeros where another rank has the vector.
        replacements = vectors[rows.clamp(min=0)].masked_fill((rows < 0).unsqueeze(1), 0.0)
        own.append(Statistics(counts, sums, replacements, slice(None)))
    parts = [part for each in own for part in each if isinstance(part, Tensor)]
    flat = torch.cat([part.flatten() for part in parts])
    torch.distributed.all_reduce(flat)
    for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(summed.view_as(part))
    return own


def _replacement_rows(assigned: Sequence[Assigned]) -> Sequence[Int[Tensor, " K"]]:
    """For each codebook K random vectors of the joined batch of all ranks, as indices of this
    rank's vectors; -1: another rank has it."""
    device = assigned[0].vectors.device
    sizes = _gather_sizes(len(assigned[0].vectors), device)
    rank = torch.distributed.get_rank() if _world_size() > 1 else 0
    rows = []
    for codebook, _, _ in assigned:
        chosen = codebook.random_indices(sum(sizes), codebook.size)
        chosen = chosen.repeat(-(-codebook.size // len(chosen)))[: codebook.size]
        chosen -= sum(sizes[:rank])
        rows.append(torch.where((chosen >= 0) & (chosen < sizes[rank]), chosen, -1))
    joined = torch.cat(rows)
    # From pinned memory the copy does not wait for the device.
    joined = joined.pin_memory() if device.type == "cuda" else joined
    return joined.to(device, non_blocking=True).split([len(each) for each in rows])


def _world_size() -> int:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def _gather_sizes(size: int, device: torch.device) -> list[int]:
    """`size` of every rank; exchanged on the host, so that no rank waits for its device."""
    if _world_size() == 1:
        return [size]
    own = torch.tensor([size])
    sizes = [torch.zeros_like(own) for _ in range(_world_size())]
    group = None if device.type == "cpu" else _host_group()
    torch.distributed.all_gather(sizes, own, group=group)
    return [int(each) for each in sizes]


@functools.cache
def _host_group() -> Any:
    """All ranks, with a backend for tensors on the CPU."""
    return torch.distributed.new_group(backend="gloo")


def _gather(vectors: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
    """The vectors of all ranks in rank order; their numbers may differ between ranks."""
    sizes = _gather_sizes(len(vectors), vectors.device)
    if len(sizes) == 1:
        return vectors
    padded = functional.pad(vectors, (0, 0, 0, max(sizes) - len(vectors)))
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded.contiguous())
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
