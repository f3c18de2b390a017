"""Mutual information of codes and texts.

`information_bounds` takes log-likelihoods log q(y | x) of texts y given codes x, such as those of
the CTC probe (eval/text_probe.py), and returns two estimates in nats per utterance:

- vCLUB, SLMTokBench's measure (SpeechTokenizer, arXiv 2308.16692, section 4): with N utterances,
  I = 1/N^2 sum_i sum_j [log q(y_i|x_i) - log q(y_j|x_i)]. An upper bound of the mutual
  information if q is the true conditional distribution, or at least closer to the joint
  distribution than to the product of the marginals (CLUB, arXiv 2006.12013, theorems 3.1 and 3.2).
  It is never a lower bound by construction: its values compare tokenizers, no more.
- InfoNCE (arXiv 1807.03748; with a conditional distribution as the critic: arXiv 1905.06922): the
  mean of log q(y_j|x_j) - log mean_i q(y_j|x_i), where i runs over j itself and K others. In
  expectation a lower bound for any q; it cannot exceed log(K + 1), so good tokenizers tie.

`sequence_information` is LM-SPT's SNMI. It needs no trained model, but a list of sentences that
were read several times.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer


class InformationBounds(NamedTuple):
    """Terms of N utterances in nats; their means are the estimates."""

    vclub: Float[np.ndarray, " N"]
    """Term of each text; NaN where no other utterance has enough frames for it."""
    info_nce: Float[np.ndarray, " N"]
    limit: float
    """log(K + 1), the largest value of a term of `info_nce`."""


class Estimate(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float


class SequenceInformation(NamedTuple):
    """SNMI of a list of repeated sentences."""

    snmi: float
    """I(sentence; bucket) / H(sentence), mean over hash tables."""
    error: float
    """Standard error of that mean, over hash tables."""
    chance: float
    """The same with the sentences permuted at random: above 0, since the list is finite."""
    ceiling: float
    """The same if all recordings of a sentence had the codes of the first of them."""
    n: int
    """Number of recordings whose sentence occurs at least twice."""
    num_sentences: int
    """Number of different sentences among them."""


def information_bounds(
    matching: Float[np.ndarray, " N"], others: Float[np.ndarray, "N K"]
) -> InformationBounds:
    """Returns vCLUB and InfoNCE of texts and codes, a term for each text.

    With all K = N - 1 others the mean of `vclub` is the paper's double sum, in which i = j counts
    too. With a sample of others its pairs stand for all of them. A likelihood of 0 (-inf: more
    labels than frames) would make vCLUB infinite; those pairs are left out of it. They are terms of
    InfoNCE.

    Args:
        matching: log q(y_j|x_j) of each text given its own codes.
        others: log q(y_j|x_i) of each text given the codes of K other utterances.

    Raises:
        ValueError: fewer than two utterances, or a likelihood is NaN or infinite (besides -inf in
            `others`).
    """
    num, num_others = others.shape
    if num < 2 or num_others < 1:
        raise ValueError(f"need two utterances and another for each, got {num} and {num_others}")
    if not np.isfinite(matching).all() or not (others < np.inf).all():
        raise ValueError("a log-likelihood is NaN or infinite")
    possible = np.isfinite(others)
    counts = possible.sum(1)
    sums = np.where(possible, others, 0).sum(1)
    means = np.divide(sums, counts, out=np.full(num, np.nan), where=counts > 0)
    vclub = matching - (matching / num + (1 - 1 / num) * means)
    given = np.concatenate([matching[:, None], others], 1)
    limit = math.log(num_others + 1)
    return InformationBounds(vclub, matching - np.logaddexp.reduce(given, 1) + limit, limit)


def estimate_of(terms: Float[np.ndarray, " N"]) -> Estimate:
    """Returns the mean of the terms that are not NaN, and its standard error.

    The error is that of independent terms. Terms of InformationBounds share codes as negatives, so
    theirs is approximate; it includes the sampling of negatives.

    Raises:
        ValueError: fewer than two terms.
    """
    known = terms[~np.isnan(terms)]
    if known.size < 2:
        raise ValueError(f"{known.size} terms; a standard error needs 2")
    return Estimate(float(known.mean()), float(known.std(ddof=1) / math.sqrt(known.size)))


def sequence_information(
    codes: Sequence[Integer[np.ndarray, "..."]],
    sentences: Sequence[Hashable],
    *,
    num_bits: int | None = None,
    num_tables: int = 32,
    seed: int = 0,
) -> SequenceInformation:
    """Returns the SNMI (Sequence-Normalized Mutual Information) of code sequences and sentences.

    LM-SPT (arXiv 2506.16738, appendix B) extends HuBERT's phone-normalized mutual information,
    I(phone; unit) / H(phone), to sequences: recordings of the same sentences by many speakers
    (VCTK), and buckets of similar sequences, of any length, by locality-sensitive hashing. The
    hash, its size, and the rest here are ours, so the values are not comparable with the paper's.
    The features of a sequence are its counts of single codes and of pairs of neighbors, within
    each codebook and with runs of a code as one, scaled to a norm of 1. Its bucket is `num_bits`
    signs of random projections of them (SimHash), each relative to the median over the list, so
    that bits are balanced.

    Sentences that occur once are left out: their sequences have no other to agree with.

    Args:
        codes: (Q, T) of each recording, or (T,) for one codebook.
        sentences: what was read, normalized; equal values are the same sentence.
        num_bits: default: log2 of the number of sentences, rounded up.
        num_tables: number of independent hash functions.
        seed: of projections and permutations.

    Raises:
        ValueError: fewer than two sentences occur at least twice, a sequence is empty, or the
            numbers of codes and sentences differ.
    """
    if len(codes) != len(sentences):
        raise ValueError(f"{len(codes)} sequences of codes, {len(sentences)} sentences")
    numbers: dict[Hashable, list[int]] = {}
    for index, sentence in enumerate(sentences):
        numbers.setdefault(sentence, []).append(index)
    repeated = [group for group in numbers.values() if len(group) > 1]
    if len(repeated) < 2:
        raise ValueError(f"{len(repeated)} sentences occur at least twice; SNMI needs 2")
    labels = np.repeat(np.arange(len(repeated)), [len(group) for group in repeated])
    kept = [codes[index] for group in repeated for index in group]
    firsts = np.repeat(
        np.cumsum([0, *(len(group) for group in repeated[:-1])]), [len(group) for group in repeated]
    )
    features = _ngram_features(kept)
    bits = num_bits or max(1, math.ceil(math.log2(len(repeated))))
    generator = np.random.default_rng(seed)
    entropy = _entropy(labels)
    own, chance, ceiling = [], [], []
    for _ in range(num_tables):
        directions = generator.standard_normal((features.num_columns, bits))
        weighted = features.values[:, None] * directions[features.columns]
        projected = np.add.reduceat(weighted, features.starts)
        own.append(_mutual_information(labels, _buckets(projected)))
        chance.append(_mutual_information(generator.permutation(labels), _buckets(projected)))
        ceiling.append(_mutual_information(labels, _buckets(projected[firsts])))
    tables = np.array(own) / entropy
    error = float(tables.std(ddof=1) / math.sqrt(num_tables)) if num_tables > 1 else 0.0
    return SequenceInformation(
        snmi=float(tables.mean()),
        error=error,
        chance=float(np.mean(chance) / entropy),
        ceiling=float(np.mean(ceiling) / entropy),
        n=len(labels),
        num_sentences=len(repeated),
    )


class _Features(NamedTuple):
    """Sparse features of sequences."""

    columns: Int[np.ndarray, " M"]
    values: Float[np.ndarray, " M"]
    starts: Int[np.ndarray, " N"]
    """Place of the first value of each sequence."""
    num_columns: int


def _ngram_features(codes: Sequence[np.ndarray]) -> _Features:
    """Counts of codes and of pairs of neighbors of each sequence, without repeats; norm 1."""
    numbers: dict[tuple[int, ...], int] = {}
    columns, values, starts = [], [], []
    for row, sequence in enumerate(codes):
        sequence = np.atleast_2d(np.asarray(sequence).astype(np.int64))
        if not sequence.shape[1]:
            raise ValueError(f"sequence {row} is empty")
        found: Counter[tuple[int, ...]] = Counter()
        for book, line in enumerate(sequence.tolist()):
            runs = [code for code, _ in groupby(line)]
            found.update((book, code) for code in runs)
            found.update((book, *pair) for pair in pairwise(runs))
        starts.append(len(values))
        columns += [numbers.setdefault(gram, len(numbers)) for gram in found]
        norm = math.sqrt(sum(count**2 for count in found.values()))
        values += [count / norm for count in found.values()]
    return _Features(np.array(columns), np.array(values), np.array(starts), len(numbers))


def _buckets(projected: Float[np.ndarray, "N b"]) -> Int[np.ndarray, " N"]:
    """The bucket of each sequence: a bit per projection, set above its median."""
    signs = projected > np.median(projected, axis=0)
    return signs @ (1 << np.arange(signs.shape[1]))


def _mutual_information(first: Int[np.ndarray, " N"], second: Int[np.ndarray, " N"]) -> float:
    """Mutual information in nats of the empirical distribution of pairs."""
    both = np.stack([first, second])
    return _entropy(first) + _entropy(second) - _entropy(both)


def _entropy(labels: Int[np.ndarray, "... N"]) -> float:
    """Entropy in nats of the columns."""
    shares = np.unique(labels, axis=-1, return_counts=True)[1] / labels.shape[-1]
    return float(-(shares * np.log(shares)).sum())
