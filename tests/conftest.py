"""Tests need no network and no downloaded models."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    import torch

    # Two test processes share the machine, and some tests start processes of their own.
    torch.set_num_threads(1)


def stand_in(kind: type, **attributes: Any) -> Any:
    """An object of this class that has these attributes alone, for arguments with checked types."""
    made = object.__new__(kind)
    vars(made).update(attributes)
    return made


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


def free_port() -> int:
    """A port for a launch: tests run side by side, and all would take the default one."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def kill_all(process: subprocess.Popen) -> None:
    """Kills a program and every process that it started with -9, and waits until they are gone.

    A launcher gives its ranks sessions of their own: a signal to its group does not reach them, and
    they would hold the run folder until they are done.
    """
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in reversed(family):  # The launcher first: it would report the death of its ranks.
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    assert not psutil.wait_procs(family, timeout=60)[1]


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


@pytest.fixture
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`launch("zero2", script, *arguments)` runs a script on two CPU processes with accelerate."""

    def run(config: str, script: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(ROOT / "recipes" / "accelerate" / f"{config}.yaml")),
            *("--num_processes", "2", "--main_process_port", str(free_port())),
            *(str(script), *arguments),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=240
        )

    return run
