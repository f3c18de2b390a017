"""Units of a speech teacher: k-means of its features, the pseudo-labels of `distill.speech`.

    python recipes/make_units.py cuts=data/train.jsonl.gz teacher=models/hubert-base \\
        layer=9 num_units=500 frame_rate=50 out=out/units.safetensors

Then distill.speech.objective=units distill.speech.units=out/units.safetensors, with the same
teacher and layer. Source: SpeechTokenizer (arXiv 2308.16692), section 3.3, pseudo-labels.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from codec.distillation.feature_cache import FeatureCache
from codec.distillation.objectives import over_frames
from codec.distillation.teachers import load_speech_teacher
from codec.io import atomic_file
from codec.training.data import load_cut, read_cuts
from eval.benchmark import digest_of
from recipes.lib.run import git_revision, load_config, run_program

logger = logging.getLogger(__name__)

DISTANCE_CHUNK = 8192
"""Frames whose distances are in memory at once: 16 MB for 500 units."""
START_FRAMES = 32
"""Frames a unit among which the first centroids are chosen."""
LEAST_SHARE = 0.25
"""Of an utterance's frames: of a long list only some utterances are heard, but these well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitsConfig:
    cuts: Path = Path("out/demo/cuts/train.jsonl.gz")
    """A lhotse list of cuts (recipes/prepare_data.py makes them)."""
    cache: str = ""
    """A folder of this teacher's features (codec/distillation/feature_cache.py), read in place of
    the sound."""
    teacher: str = "models/whisper-base-transformers"
    """HuBERT, WavLM, wav2vec2 or Whisper, by hub id or folder."""
    layer: str = "mean"
    """Hidden states to cluster: mean of all, last, or one by its number."""
    frame_rate: float = 0.0
    """Hz of the codec that will learn the units; 0: the teacher's own."""
    num_units: int = 500
    """Clusters."""
    max_frames: int = 100_000
    """Frames that are clustered, a random sample of the list's: 0.3 GB for 768 features."""
    iterations: int = 50
    """Of k-means at most; it ends when no frame changes its unit."""
    batch_size: int = 8
    """Utterances that the teacher hears at once."""
    seed: int = 0
    """Of the sample and of the first centroids."""
    out: Path = Path("out/units/units.safetensors")
    """The file to write."""

    def __post_init__(self) -> None:
        for name in ("num_units", "max_frames", "iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_frames < self.num_units:
            raise ValueError(
                f"max_frames={self.max_frames} for num_units={self.num_units}: too few"
            )
        if self.frame_rate < 0:
            raise ValueError(f"frame_rate must not be negative, got {self.frame_rate}")
        if self.out.suffix != ".safetensors":
            raise ValueError(f"out={self.out}: name a .safetensors file")


class Units(NamedTuple):
    """Clusters of frames."""

    centroids: Float[Tensor, "K D"]
    counts: Int[Tensor, " K"]
    """Frames of each unit, at least one."""
    inertia: float
    """Mean squared distance of a frame to its unit."""
    iterations: int


class Source(NamedTuple):
    """Where features come from."""

    hear: Callable[[Sequence[Any]], list[Tensor]]
    """Cuts to their features (T,D); of those that cannot be read there are none."""
    frame_rate: float


class Sample(NamedTuple):
    """Features of some frames of a list."""

    frames: Float[Tensor, "N D"]
    num_heard: int
    """Utterances that they come from."""
    num_skipped: int
    """Utterances that could not be read."""


class _Nearest(NamedTuple):
    units: Int[Tensor, " N"]
    distances: Float[Tensor, " N"]
    """Squared."""


def main(argv: list[str]) -> None:
    """Clusters a sample of the list's frames and writes the centroids."""
    config = load_config(UnitsConfig, argv, __doc__ or "")
    cuts = list(read_cuts(config.cuts))
    source = _cached(config) if config.cache else _taught(config)
    frame_rate = config.frame_rate or source.frame_rate
    sample = sample_frames(cuts, source, config)
    if len(sample.frames) < config.num_units:
        raise ValueError(
            f"{config.cuts}: {len(sample.frames)} frames for {config.num_units} units; lower "
            "num_units or take a longer list"
        )
    units = fit_units(sample.frames, config.num_units, config.iterations, seed=config.seed)
    facts = {
        "teacher": config.teacher,
        "layer": config.layer,
        "frame_rate": frame_rate,
        "frames": len(sample.frames),
        "utterances": sample.num_heard,
        "seed": config.seed,
        "inertia": units.inertia,
        "iterations": units.iterations,
        "cuts": digest_of(config.cuts),
        "git": git_revision(),
    }
    with atomic_file(config.out) as temporary:
        save_file(
            {"centroids": units.centroids.cpu().contiguous()},
            temporary,
            {key: str(value) for key, value in facts.items()},
        )
    share = units.counts / units.counts.sum()
    results = {
        "out": str(config.out),
        "units": config.num_units,
        "features": units.centroids.shape[1],
        **facts,
        "inertia": round(units.inertia, 6),
        "perplexity": round(float((-(share * share.log()).sum()).exp()), 1),
        "skipped": sample.num_skipped,
    }
    print(json.dumps(results))


def _taught(config: UnitsConfig) -> Source:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_speech_teacher(config.teacher, layer=config.layer, device=device)

    @torch.no_grad()
    def hear(cuts: Sequence[Any]) -> list[Tensor]:
        waves = list(_readable(cuts, lambda cut: load_cut(cut, teacher.sample_rate)))
        if not waves:
            return []
        lengths = torch.tensor([len(wave) for wave in waves], device=device)
        batch = pad_sequence(list(map(torch.from_numpy, waves)), batch_first=True)
        values, frames = teacher(batch.unsqueeze(1).to(device), lengths)
        return [row[:count] for row, count in zip(values, frames.tolist(), strict=True)]

    return Source(hear, teacher.frame_rate)


def _cached(config: UnitsConfig) -> Source:
    cache = FeatureCache.open(config.cache, speech=(config.teacher, config.layer))

    def hear(cuts: Sequence[Any]) -> list[Tensor]:
        found = _readable(cuts, lambda cut: cache.speech(cut.id, 0, cut.duration))
        return [features.float() for features in found]

    return Source(hear, cache.facts["speech"]["frame_rate"])


def _readable(cuts: Sequence[Any], read: Callable[[Any], Any]) -> Iterator[Any]:
    for cut in cuts:
        try:
            yield read(cut)
        except ValueError as error:
            logger.warning("skipped: %s", error)


def sample_frames(cuts: Sequence[Any], source: Source, config: UnitsConfig) -> Sample:
    """A random sample of the cuts' features, at the configured frame rate.

    Utterances are heard in random order until there are enough. What cannot be read is skipped.
    """
    generator = np.random.default_rng(config.seed)
    frame_rate = config.frame_rate or source.frame_rate
    expected = sum(cut.duration for cut in cuts) * frame_rate
    share = min(1.0, max(LEAST_SHARE, config.max_frames / expected))
    order = [cuts[index] for index in generator.permutation(len(cuts))]
    kept: list[Tensor] = []
    num_frames = num_skipped = 0
    with tqdm(total=config.max_frames, desc="features", unit="frame", unit_scale=True) as bar:
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            heard = source.hear(batch)
            num_skipped += len(batch) - len(heard)
            for features in heard:
                features = _at_rate(features, source.frame_rate, frame_rate)
                count = max(1, round(share * len(features)))
                count = min(count, config.max_frames - num_frames)
                chosen = generator.permutation(len(features))[:count]
                kept.append(features[torch.from_numpy(np.sort(chosen))])
                num_frames += count
                bar.update(count)
            if num_frames >= config.max_frames:
                break
    if not kept:
        raise ValueError(f"{config.cuts}: none of {len(cuts)} recordings can be read")
    return Sample(torch.cat(kept), sum(len(part) > 0 for part in kept), num_skipped)


def _at_rate(features: Float[Tensor, "T D"], source: float, rate: float) -> Float[Tensor, "t D"]:
    frames = max(1, round(len(features) * rate / source))
    lengths = torch.tensor([len(features)], device=features.device)
    target = over_frames(features[None], lengths, source, frames, rate)
    return target.values[target.mask]


def fit_units(
    vectors: Float[Tensor, "N D"], num_units: int, iterations: int = 50, *, seed: int = 0
) -> Units:
    """k-means from k-means++'s start (Arthur and Vassilvitskii 2007), in bounded memory.

    A unit that lost all its vectors takes the one that is farthest from its own. Ends early when
    nothing changes. Raises ValueError for fewer vectors than units.
    """
    if not 1 <= num_units <= len(vectors):
        raise ValueError(f"{len(vectors)} vectors for {num_units} units; there must be as many")
    centroids = _start(vectors, num_units, torch.Generator().manual_seed(seed))
    before = None
    done = 0
    while done < iterations:
        nearest = _nearest(vectors, centroids)
        if before is not None and torch.equal(nearest.units, before):
            break
        before = _revived(nearest, num_units)
        sums = torch.zeros_like(centroids).index_add_(0, before, vectors)
        centroids = sums / torch.bincount(before, minlength=num_units).unsqueeze(1)
        done += 1
    nearest = _nearest(vectors, centroids)
    return Units(
        centroids=centroids,
        counts=torch.bincount(nearest.units, minlength=num_units),
        inertia=float(nearest.distances.mean()),
        iterations=done,
    )


def _start(
    vectors: Float[Tensor, "N D"], num_units: int, generator: torch.Generator
) -> Float[Tensor, "K D"]:
    """Centroids that are vectors far from each other: each is drawn by its squared distance."""
    few = torch.randperm(len(vectors), generator=generator)[: START_FRAMES * num_units]
    few = vectors[few.to(vectors.device)]
    chosen = [0]
    distances = (few - few[0]).square().sum(1)
    for _ in range(num_units - 1):
        # Where fewer different vectors than units are left, copies: they lose all and are revived.
        weights = distances if float(distances.sum()) > 0 else torch.ones_like(distances)
        chosen.append(int(torch.multinomial(weights.cpu(), 1, generator=generator)))
        distances = torch.minimum(distances, (few - few[chosen[-1]]).square().sum(1))
    return few[chosen].clone()


def _nearest(vectors: Float[Tensor, "N D"], centroids: Float[Tensor, "K D"]) -> _Nearest:
    squared = centroids.square().sum(1)
    units, distances = [], []
    for chunk in vectors.split(DISTANCE_CHUNK):
        least = torch.addmm(squared, chunk, centroids.T, alpha=-2).min(1)
        units.append(least.indices)
        distances.append((least.values + chunk.square().sum(1)).clamp(min=0))
    return _Nearest(torch.cat(units), torch.cat(distances))


def _revived(nearest: _Nearest, num_units: int) -> Int[Tensor, " N"]:
    """Units of the vectors with no unit empty."""
    units = nearest.units.clone()
    counts = torch.bincount(units, minlength=num_units)
    farthest = iter(nearest.distances.argsort(descending=True).tolist())
    for empty in (counts == 0).nonzero().flatten().tolist():
        # The last vector of a unit stays where it is.
        index = next(index for index in farthest if counts[units[index]] > 1)
        counts[units[index]] -= 1
        counts[empty] += 1
        units[index] = empty
    return units


if __name__ == "__main__":
    run_program(main)
