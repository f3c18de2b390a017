"""Tests need no network and no downloaded models."""

import gc
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forking import ForkedRun, ForkServer, launch_environments

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    import torch

    # Two test processes share the machine, and some tests start processes of their own.
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    # What is loaded by now stays: the garbage collector need not go through it again and again.
    gc.collect()
    gc.freeze()


def stand_in(kind: type, **attributes: Any) -> Any:
    """An object of this class that has these attributes alone, for arguments with checked types."""
    made = object.__new__(kind)
    vars(made).update(attributes)
    return made


def plain(method: Any) -> Any:
    """A method without jaxtyping's checks: what users run."""
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return method


def voiced(seconds: float, sample_rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Something like speech: harmonics with a wandering pitch and a syllable's envelope, (S,)."""
    generator = np.random.default_rng(seed)
    times = np.arange(round(seconds * sample_rate)) / sample_rate
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * times + generator.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    wave = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 12))
    envelope = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * times)
    noise = 0.01 * generator.standard_normal(len(times))
    return (0.2 * envelope * wave + noise).astype(np.float32)


@pytest.fixture
def write_wav() -> Callable[..., Path]:
    """`write_wav(path, seconds, sample_rate=16000, seed=0)` writes a recording."""
    import soundfile

    def write(path: Path, seconds: float, sample_rate: int = 16_000, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, voiced(seconds, sample_rate, seed), sample_rate)
        return path

    return write


class CountingJudge:
    """An ASR judge that reads the same in every wave."""

    name = "judge@0 none"

    def __init__(self) -> None:
        self.transcript, self.calls = "hello world", 0

    def transcribe(self, _wave: np.ndarray, _rate: int) -> str:
        self.calls += 1
        return self.transcript


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> CountingJudge:
    """The judge of every `--judge`."""
    from recipes.scoring import judges

    counting = CountingJudge()
    monkeypatch.setattr(judges, "load_judge", lambda *_, **__: counting)
    return counting


@pytest.fixture(scope="session")
def tiny_codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved codec of 3 codebooks of 32 entries at 25 Hz, with random weights."""
    import torch

    from codec import Codec, CodecConfig
    from codec.config import QuantizerConfig, SpectralConfig

    torch.manual_seed(0)
    networks = SpectralConfig(
        num_mels=20,
        encoder_width=8,
        encoder_depths=(1, 1, 1),
        dimension=8,
        decoder_width=8,
        decoder_depths=(1, 1, 1),
    )
    quantizer = QuantizerConfig(num_codebooks=3, codebook_size=32)
    codec = Codec(CodecConfig(spectral=networks, quantizer=quantizer))
    wave = torch.from_numpy(np.stack([voiced(2.0, seed=seed) for seed in range(4)]))[:, None]
    codec.train()(wave)  # Fills the codebooks.
    folder = tmp_path_factory.mktemp("codecs") / "tiny"
    codec.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def start(
    fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ForkedRun]]:
    """`start(None, script, *arguments)` runs a program; `start("zero2", ...)` on two CPU ranks."""

    def run(config: str | None, script: str | Path, *arguments: object) -> ForkedRun:
        environments = launch_environments(config, ranks=2) if config else [{}]
        argv = [str(script), *map(str, arguments)]
        begun = ForkedRun(fork_server, argv, environments, tmp_path_factory.mktemp("printed"))
        runs.append(begun)
        return begun

    runs: list[ForkedRun] = []
    yield run
    for begun in runs:
        begun.kill()


@pytest.fixture
def launch(start: Callable[..., ForkedRun]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`launch(config, script, *arguments)`: as `start`, to its end."""
    return lambda *given: start(*given).wait()
