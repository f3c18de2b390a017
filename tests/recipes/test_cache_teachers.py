"""The program that writes a cache: its settings, its summary, and its share over processes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut
from tiny_teachers import EvenTranscriber, save_speech_teacher, save_text_teacher

from codec.distillation.feature_cache import FeatureCache
from codec.io import FileLock
from recipes import cache_teachers
from recipes.cache_teachers import CacheConfig

SCRIPT = Path(cache_teachers.__file__)


def load_even(model: str, *, language: str, **_: object) -> EvenTranscriber:
    """In place of load_transcriber."""
    transcriber = EvenTranscriber()
    transcriber.name, transcriber.language = model, language
    return transcriber


@pytest.fixture
def lists(tmp_path: Path, write_wav: Callable[..., Path]) -> list[Path]:
    """Two lists of two cuts."""
    paths = []
    for name in ("train", "dev"):
        cuts = []
        for number, seconds in enumerate((0.6, 1.1)):
            path = write_wav(tmp_path / "audio" / f"{name}-{number}.wav", seconds, seed=number)
            recording = Recording.from_file(path)
            said = SupervisionSegment(f"s{number}", recording.id, 0.0, seconds, text="the cats")
            cuts.append(
                MonoCut(f"{name}-{number}", 0.0, seconds, 0, recording=recording,
                        supervisions=[said])
            )  # fmt: skip
        paths.append(tmp_path / f"{name}.jsonl.gz")
        CutSet.from_cuts(cuts).to_file(paths[-1])
    return paths


@pytest.fixture
def settings(tmp_path: Path, lists: list[Path]) -> list[str]:
    return [
        f"cuts=[{','.join(map(str, lists))}]",
        f"out={tmp_path / 'cache'}",
        f"speech_model={save_speech_teacher(tmp_path / 'hubert', 'hubert')}",
        "speech_layer=2",
        "half=false",
    ]


def test_a_cache_is_written_and_summarized(
    tmp_path: Path, settings: list[str], capsys, caplog, monkeypatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cache_teachers, "load_transcriber", load_even)
    bert = save_text_teacher(tmp_path / "bert")
    cache_teachers.main([*settings, f"text_model={bert}", "transcriber=models/even"])
    summary = json.loads(capsys.readouterr().out.splitlines()[0])
    shards = list((tmp_path / "cache").glob("*.safetensors"))
    assert summary == {
        "out": str(tmp_path / "cache"),
        "recordings": 4,
        "hours": round(3.4 / 3600, 3),
        "megabytes": round(sum(shard.stat().st_size for shard in shards) / 1e6, 1),
        "skipped": 0,
    }
    assert "MB an hour" in caplog.text
    cache = FeatureCache.open(
        tmp_path / "cache", speech=(str(tmp_path / "hubert"), "2"), text=(bert, "mean")
    )
    assert cache.facts["words"] == {"transcriber": "models/even", "recorded": True}
    assert [word.text for word in cache.text("dev-1").words] == ["the", "cats"]
    assert cache.speech("train-0", 0, 1).shape == (29, 16)


def test_recognised_words_and_speech_alone(
    tmp_path: Path, settings: list[str], capsys, monkeypatch
) -> None:
    cache_teachers.main([*settings, "text_model=null", "transcriber=null"])
    assert FeatureCache.open(tmp_path / "cache").facts["words"] is None
    monkeypatch.setattr(cache_teachers, "load_transcriber", load_even)
    settings[1] = f"out={tmp_path / 'other'}"
    more = ["text_model=null", "speech_model=null", "transcript=recognized"]
    cache_teachers.main([*settings, *more])
    words = FeatureCache.open(tmp_path / "other").text("dev-0").words
    assert [word.text for word in words] == ["the", "mat"]
    assert json.loads(capsys.readouterr().out.splitlines()[1])["recordings"] == 4
    # Another language's words are others.
    with pytest.raises(ValueError, match="'language': 'de'"):
        cache_teachers.main([*settings, *more, "language=de"])


def test_two_processes_share_the_recordings(tmp_path: Path, settings: list[str], launch) -> None:
    done = launch("ddp", SCRIPT, *settings, "text_model=null", "transcriber=null")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["recordings"] == 4
    assert len(list((tmp_path / "cache").glob("features-*.safetensors"))) == 2
    assert "cache:" in done.stderr
    assert "cache:" not in done.stdout
    assert len(FeatureCache.open(tmp_path / "cache")) == 4


def test_two_programs_never_share_a_folder(tmp_path: Path, settings: list[str]) -> None:
    lock = FileLock(tmp_path / "cache")
    with pytest.raises(ValueError, match="another process is running in this folder"):
        cache_teachers.main([*settings, "text_model=null", "transcriber=null"])
    lock.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cuts": ()}, "no list of cuts"),
        ({"transcript": "spoken"}, "recorded or recognized, got 'spoken'"),
        ({"batch_seconds": 0.0}, "batch_seconds must be positive"),
        ({"transcriber": None}, "text_model needs a transcriber"),
        ({"transcriber": None, "text_model": None, "speech_model": None}, "nothing to cache"),
    ],
)
def test_invalid_settings_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**given)
