"""Residual vector quantisers: of one latent, and LM-SPT's of a semantic and an acoustic one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec.codebooks import Codebook, FactorisedCodebook
from codec.config import QuantizerConfig


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
