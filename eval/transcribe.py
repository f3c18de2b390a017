"""The ASR that scores: Whisper (arXiv 2212.04356) through faster-whisper, deterministic (beam
search, temperature 0)."""

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from eval.speech import resample_for_scoring

LIBRARIES = ("faster-whisper", "ctranslate2")

SAMPLE_RATE = 16000
SILENCE_PEAK = 1e-4
"""A wave with a lower peak (-80 dBFS) is silence."""
BLOCK_SECONDS = 300.0
"""Maximum length of a wave that is transcribed at once."""
TOKENS_PER_SECOND = 12
"""Upper limit of the output; fast speech has about 6."""
PAUSE_SEARCH_SECONDS = 30.0
"""A block ends at the quietest point of its last seconds."""


class Judge:
    """Transcribes waves with a Whisper model in CTranslate2's format."""

    def __init__(
        self,
        folder: str | Path,
        *,
        num_threads: int = 2,
        device: str = "auto",
        language: str | None = "en",
        beam_size: int = 5,
    ) -> None:
        """
        Args:
            folder: has model.bin.
            device: cpu, cuda or auto.
            language: None: the model detects it.

        Raises:
            ValueError: the folder has no model.bin.
        """
        self.folder = Path(folder)
        if not (self.folder / "model.bin").is_file():
            raise ValueError(
                f"{self.folder} holds no CTranslate2 Whisper model (model.bin); "
                "`make models` makes models/whisper-base"
            )
        self.num_threads = num_threads
        self.language = language
        self.beam_size = beam_size
        self.device = device

    @cached_property
    def compute_type(self) -> str:
        """Arithmetic of CTranslate2: int8 on CPUs, float16 on GPUs."""
        return "int8" if self._device == "cpu" else "float16"

    @cached_property
    def _device(self) -> str:
        if self.device != "auto":
            return self.device
        import ctranslate2

        return "cuda" if ctranslate2.get_cuda_device_count() else "cpu"

    @cached_property
    def model(self) -> Any:
        """The faster-whisper model, loaded at first use.

        Raises:
            ValueError: it cannot be loaded.
        """
        from faster_whisper import WhisperModel

        try:
            return WhisperModel(
                str(self.folder),
                device=self._device,
                compute_type=self.compute_type,
                cpu_threads=self.num_threads,
                local_files_only=True,
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"cannot read the judge in {self.folder}: {error}") from error

    def transcribe(self, wave: Float[np.ndarray, " S"], sample_rate: int) -> str:
        """Returns the transcript of a wave, "" if it is empty or silent. Long waves are split.

        Raises:
            ValueError: the wave is not finite.
        """
        if wave.size and not np.isfinite(wave).all():
            raise ValueError("the wave to transcribe holds NaN or infinite samples")
        if not wave.size or np.abs(wave).max() < SILENCE_PEAK:
            return ""
        wave = resample_for_scoring(np.asarray(wave, np.float32), sample_rate, SAMPLE_RATE)
        texts: list[str] = []
        for block in blocks_at_pauses(wave):
            segments, _ = self.model.transcribe(
                block,
                language=self.language,
                beam_size=self.beam_size,
                temperature=0.0,
                condition_on_previous_text=False,
                max_new_tokens=max_tokens(block.size / SAMPLE_RATE),
            )
            texts += [segment.text.strip() for segment in segments]
        return " ".join(text for text in texts if text)


def max_tokens(seconds: float) -> int:
    """Returns the maximum number of tokens, which bounds hallucinated loops on noise."""
    return min(200, 16 + math.ceil(TOKENS_PER_SECOND * seconds))


def blocks_at_pauses(wave: Float[np.ndarray, " S"]) -> Iterator[Float[np.ndarray, " P"]]:
    """Yields pieces of at most BLOCK_SECONDS of a 16 kHz wave, split at the quietest 0.2 s of each
    piece's last PAUSE_SEARCH_SECONDS."""
    size, search = int(BLOCK_SECONDS * SAMPLE_RATE), int(PAUSE_SEARCH_SECONDS * SAMPLE_RATE)
    window = SAMPLE_RATE // 5
    while wave.size > size:
        tail = np.square(wave[size - search : size], dtype=np.float64)
        energy = tail.reshape(-1, window).sum(1)
        cut = size - search + int(energy.argmin()) * window + window // 2
        yield wave[:cut]
        wave = wave[cut:]
    yield wave
