"""Pseudo-labels: the clustering, the file of centroids, and the sample of frames."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet, Recording, SupervisionSegment
from safetensors import safe_open
from transformers import HubertConfig, HubertModel

from codec.audio import write_audio
from codec.distillation.feature_cache import write_cache
from codec.distillation.teachers import load_speech_teacher
from codec.training.data import read_cuts
from recipes import make_units as program
from recipes.make_units import PseudoLabelConfig, cluster


def blobs(num: int, per_blob: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(num, 6, generator=generator)
    noise = 0.1 * torch.randn(num, per_blob, 6, generator=generator)
    vectors = (centres[:, None] + noise).flatten(0, 1)
    return vectors[torch.randperm(len(vectors), generator=generator)]


def test_clusters_are_recovered() -> None:
    vectors = blobs(12, 30)
    clusters = cluster(vectors, 12)
    assert clusters.counts.tolist() == [30] * 12
    assert clusters.inertia == pytest.approx(6 * 0.01, rel=0.2)
    # Each centroid is close to the mean of its vectors.
    nearest = torch.cdist(vectors, clusters.centroids).argmin(1)
    means = torch.stack([vectors[nearest == label].mean(0) for label in range(12)])
    torch.testing.assert_close(clusters.centroids, means, atol=0.05, rtol=0)
    assert torch.equal(cluster(vectors, 12).centroids, clusters.centroids)
    assert not torch.equal(cluster(vectors, 12, seed=1).centroids, clusters.centroids)
    with pytest.raises(ValueError, match="2 vectors for 3 units"):
        cluster(torch.ones(2, 2), 3)


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_kernel=(10, 8),
        conv_stride=(20, 16),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    HubertModel(config).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.fixture
def cuts(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    made = []
    for number in range(4):
        file = tmp_path / f"{number}.wav"
        write_audio(file, 0.1 * generator.standard_normal(16_000).astype("f4"), 16_000)
        recording = Recording.from_file(file)
        words = SupervisionSegment(str(number), recording.id, 0, recording.duration, text="a")
        made.append(recording.to_cut())
        made[-1].supervisions = [words]
    CutSet.from_cuts(made).to_file(tmp_path / "cuts.jsonl.gz")
    return tmp_path / "cuts.jsonl.gz"


def run(
    cuts: Path, teacher: str, out: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> dict[str, object]:
    settings = [f"cuts={cuts}", f"teacher={teacher}", "layer='1'", "num_units=6", f"out={out}"]
    program.main([*settings, *more])
    return json.loads(capsys.readouterr().out.splitlines()[0])


def test_units_are_written_with_what_they_are_of(
    cuts: Path, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "units.safetensors"
    results = run(cuts, teacher, out, capsys, "max_frames=60")
    # Four seconds at 50 Hz: a share of 60 / 200 of each utterance's 50.
    assert (results["frames"], results["utterances"], results["features"]) == (60, 4, 16)
    with safe_open(out, "pt") as opened:
        metadata, centroids = opened.metadata(), opened.get_tensor("centroids")
    assert centroids.shape == (6, 16)
    assert centroids.dtype == torch.float32
    assert (metadata["teacher"], metadata["layer"]) == (teacher, "1")
    assert (metadata["frame_rate"], metadata["frames"]) == ("50.0", "60")
    assert float(metadata["inertia"]) == pytest.approx(results["inertia"], abs=1e-6)
    again = run(cuts, teacher, tmp_path / "b.safetensors", capsys, "max_frames=60", "batch_size=1")
    assert again["inertia"] == pytest.approx(results["inertia"], rel=1e-2)


def test_units_of_a_slower_codec(
    cuts: Path, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(cuts, teacher, tmp_path / "u.safetensors", capsys, "frame_rate=25.0")
    assert results["frames"] == 4 * 25
    assert results["frame_rate"] == 25.0


def test_cached_features_give_the_same_units(
    cuts: Path, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    write_cache(folder, list(read_cuts(cuts)), speech=load_speech_teacher(teacher, layer="1"))
    cached = run(cuts, teacher, tmp_path / "a.safetensors", capsys, f"cache={folder}")
    for number in range(4):
        (tmp_path / f"{number}.wav").unlink()
    again = run(cuts, teacher, tmp_path / "b.safetensors", capsys, f"cache={folder}")
    assert again["inertia"] == cached["inertia"]
    assert (cached["frames"], cached["frame_rate"]) == (200, 50.0)
    with pytest.raises(ValueError, match="layer"):
        run(cuts, teacher, tmp_path / "c.safetensors", capsys, f"cache={folder}", "layer=last")


def test_a_bad_recording_costs_itself(
    cuts: Path, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "u.safetensors"
    (tmp_path / "2.wav").write_bytes(b"no sound")
    results = run(cuts, teacher, out, capsys)
    assert (results["utterances"], results["skipped"]) == (3, 1)
    with pytest.raises(ValueError, match="150 frames for 200 units"):
        run(cuts, teacher, out, capsys, "num_units=200")
    for number in range(4):
        (tmp_path / f"{number}.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match="none of 4 recordings can be read"):
        run(cuts, teacher, out, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_units": 0}, "num_units must be at least 1"),
        ({"num_units": 10, "max_frames": 9}, "too few"),
        ({"frame_rate": -1.0}, "frame_rate must be at least 0"),
        ({"out": Path("units.pt")}, "name a .safetensors file"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PseudoLabelConfig(**change)
