"""Pseudo-labels of a speech teacher: k-means centroids of its features, for `distill.speech`.

    python recipes/make_units.py cuts=data/train.jsonl.gz teacher=models/hubert-base \\
        layer=9 num_units=500 frame_rate=50 out=out/units.safetensors

Then train a codec with distill.speech.objective=units distill.speech.units=out/units.safetensors,
and the same teacher and layer. Source: SpeechTokenizer (arXiv 2308.16692), section 3.3.

Not to be confused with acoustic BPE (recipes/train_units.py), which merges codes of a trained codec
into longer pieces for the language model.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from codec.config import at_least
from codec.distillation.feature_cache import FeatureCache
from codec.distillation.objectives import average_over_frames
from codec.distillation.teachers import load_speech_teacher
from codec.io import atomic_file, sha256_of
from codec.program import counted
from codec.training.data import load_cut, read_cuts
from codec.training.run import git_revision
from recipes.lib.run import finished, load_config, run_recipe

if TYPE_CHECKING:
    from lhotse.cut import Cut

logger = logging.getLogger(__name__)

T = TypeVar("T")

BATCH_FRAMES = 4096
"""Frames of a mini-batch of k-means."""
MIN_SHARE = 0.25
"""Minimum share of an utterance's frames in the sample: a long list is sampled by utterances first,
then by frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PseudoLabelConfig:
    """Recordings, teacher and size of one clustering."""

    cuts: Path = Path("out/demo/cuts/train.jsonl.gz")
    """A lhotse list of cuts (recipes/prepare_data.py writes them)."""
    cache: str = ""
    """Folder of this teacher's features (recipes/cache_teachers.py); empty: compute them."""
    teacher: str = "models/whisper-base-transformers"
    """HuBERT, WavLM, wav2vec2 or Whisper, by hub id or folder."""
    layer: str = "mean"
    """Hidden states to cluster: mean of all, last, or one by its number."""
    frame_rate: float = 0.0
    """Hz, of the codec to train; 0: the teacher's own."""
    num_units: int = 500
    """Number of clusters (pseudo-labels)."""
    max_frames: int = 100_000
    """Maximum number of frames to cluster, a random sample; 0.3 GB for 768 features."""
    iterations: int = 50
    """Maximum number of k-means passes over the sample; it stops earlier without improvement."""
    batch_size: int = 8
    """Utterances that the teacher encodes at once."""
    seed: int = 0
    """Seed of the sample and of k-means."""
    out: Path = Path("out/units/units.safetensors")
    """The file to write."""

    def __post_init__(self) -> None:
        for name in ("num_units", "max_frames", "iterations", "batch_size"):
            at_least(1, **{name: getattr(self, name)})
        if self.max_frames < self.num_units:
            raise ValueError(
                f"max_frames={self.max_frames} for num_units={self.num_units}: too few"
            )
        at_least(0, frame_rate=self.frame_rate)
        if self.out.suffix != ".safetensors":
            raise ValueError(f"out={self.out}: name a .safetensors file")


class Clusters(NamedTuple):
    """A k-means clustering of frames."""

    centroids: Float[Tensor, "K D"]
    counts: Int[Tensor, " K"]
    """Frames of each cluster."""
    inertia: float
    """Mean squared distance of a frame to its centroid."""
    iterations: int
    """Passes over the frames."""


class FeatureSource(NamedTuple):
    """A teacher, or a cache of its features."""

    features: Callable[[Sequence["Cut"]], list[Float[Tensor, "_ D"]]]
    """Cuts to their features (T,D); unreadable cuts are left out."""
    frame_rate: float


class Sample(NamedTuple):
    """Features of a random sample of frames."""

    frames: Float[Tensor, "N D"]
    num_utterances: int
    num_skipped: int
    """Utterances that could not be read."""


def main(argv: list[str]) -> None:
    """Clusters a sample of frames and writes the centroids."""
    config = load_config(PseudoLabelConfig, argv, __doc__ or "")
    cuts = list(read_cuts(config.cuts))
    source = _from_cache(config) if config.cache else _from_teacher(config)
    frame_rate = config.frame_rate or source.frame_rate
    sample = sample_frames(cuts, source, config)
    if len(sample.frames) < config.num_units:
        raise ValueError(
            f"{config.cuts}: {len(sample.frames)} frames for {config.num_units} units; lower "
            "num_units or take a longer list"
        )
    clusters = cluster(sample.frames, config.num_units, config.iterations, seed=config.seed)
    facts = {
        "teacher": config.teacher,
        "layer": config.layer,
        "frame_rate": frame_rate,
        "frames": len(sample.frames),
        "utterances": sample.num_utterances,
        "seed": config.seed,
        "inertia": clusters.inertia,
        "iterations": clusters.iterations,
        "cuts": sha256_of(Path(config.cuts), 16),
        "git": git_revision(),
    }
    with atomic_file(config.out) as temporary:
        save_file(
            {"centroids": clusters.centroids.contiguous()},
            temporary,
            {key: str(value) for key, value in facts.items()},
        )
    share = clusters.counts[clusters.counts > 0] / clusters.counts.sum()
    results = {
        "out": str(config.out),
        "units": config.num_units,
        "features": clusters.centroids.shape[1],
        **facts,
        "inertia": round(clusters.inertia, 6),
        "perplexity": round(float((-(share * share.log()).sum()).exp()), 1),
        "skipped": sample.num_skipped,
    }
    print(json.dumps(results))
    finished(
        f"{counted(config.num_units, 'k-means pseudo-label')} of {config.teacher}",
        config.out,
        "accelerate launch recipes/train_codec.py distill.speech.objective=units "
        f"distill.speech.units={config.out} distill.speech.model={config.teacher} "
        f"distill.speech.layer={config.layer} ...",
    )


def _from_teacher(config: PseudoLabelConfig) -> FeatureSource:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_speech_teacher(config.teacher, layer=config.layer, device=device)

    @torch.no_grad()
    def features(cuts: Sequence["Cut"]) -> list[Float[Tensor, "_ D"]]:
        waves = list(_readable(cuts, lambda cut: load_cut(cut, teacher.sample_rate)))
        if not waves:
            return []
        lengths = torch.tensor([len(wave) for wave in waves], device=device)
        batch = pad_sequence(list(map(torch.from_numpy, waves)), batch_first=True)
        values, frames = teacher(batch.unsqueeze(1).to(device), lengths)
        return [row[:count].cpu() for row, count in zip(values, frames.tolist(), strict=True)]

    return FeatureSource(features, teacher.frame_rate)


def _from_cache(config: PseudoLabelConfig) -> FeatureSource:
    cache = FeatureCache.open(config.cache, speech=(config.teacher, config.layer))

    def features(cuts: Sequence["Cut"]) -> list[Float[Tensor, "_ D"]]:
        found = _readable(cuts, lambda cut: cache.speech(cut.id, 0, cut.duration))
        return [values.float() for values in found]

    return FeatureSource(features, cache.facts["speech"]["frame_rate"])


def _readable(cuts: Sequence["Cut"], read: Callable[["Cut"], T]) -> Iterator[T]:
    for cut in cuts:
        try:
            yield read(cut)
        except ValueError as error:
            logger.warning("skipped: %s", error)


def sample_frames(
    cuts: Sequence["Cut"], source: FeatureSource, config: PseudoLabelConfig
) -> Sample:
    """Returns a random sample of the cuts' features, at the configured frame rate.

    Utterances are taken in random order until there are `max_frames`; unreadable ones are skipped.

    Raises:
        ValueError: no utterance can be read.
    """
    generator = np.random.default_rng(config.seed)
    frame_rate = config.frame_rate or source.frame_rate
    expected = sum(cut.duration for cut in cuts) * frame_rate
    share = min(1.0, max(MIN_SHARE, config.max_frames / expected))
    order = [cuts[index] for index in generator.permutation(len(cuts))]
    kept: list[Tensor] = []
    num_frames = num_skipped = 0
    with tqdm(total=config.max_frames, desc="features", unit="frame", unit_scale=True) as bar:
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            found = source.features(batch)
            num_skipped += len(batch) - len(found)
            for features in found:
                features = _resampled(features, source.frame_rate, frame_rate)
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


def _resampled(features: Float[Tensor, "T D"], source: float, rate: float) -> Float[Tensor, "t D"]:
    frames = max(1, round(len(features) * rate / source))
    lengths = torch.tensor([len(features)])
    target = average_over_frames(features[None], lengths, source, frames, rate)
    return target.values[target.mask]


def cluster(
    vectors: Float[Tensor, "N D"], num_units: int, iterations: int = 50, *, seed: int = 0
) -> Clusters:
    """Returns a mini-batch k-means clustering (scikit-learn's), initialized by k-means++.

    Raises:
        ValueError: there are fewer vectors than clusters.
    """
    if not 1 <= num_units <= len(vectors):
        raise ValueError(f"{len(vectors)} vectors for {num_units} units; there must be as many")
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(
        num_units,
        batch_size=BATCH_FRAMES,
        max_iter=iterations,
        n_init=3,  # pyright: ignore[reportArgumentType]  # Its type is inferred from "auto".
        random_state=seed,
    ).fit(vectors.float().numpy())
    return Clusters(
        centroids=torch.from_numpy(kmeans.cluster_centers_),
        counts=torch.from_numpy(np.bincount(kmeans.labels_, minlength=num_units)),
        inertia=float(kmeans.inertia_) / len(vectors),
        iterations=kmeans.n_iter_,
    )


if __name__ == "__main__":
    run_recipe(main)
