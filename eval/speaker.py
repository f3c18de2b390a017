"""Speaker similarity: cosine of embeddings of an LSTM encoder trained with the GE2E loss (Wan et
al. 2018, arXiv 1710.10467).

recipes/offline_models.py makes the model folder from Resemblyzer's weights. Features as in
Resemblyzer: 40 Slaney mel bands of the power spectrum (no logarithm), 25 ms windows every 10 ms,
quiet recordings raised to -30 dBFS, embeddings of 1.6 s windows averaged. Resemblyzer's voice
activity detector is left out: trim long silences before embedding.
"""

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from eval.speech import check_scorable, resample_for_scoring

LIBRARIES = ("torch", "torchaudio")

VOLUME_DBFS = -30.0
PARTIALS_PER_SECOND = 1.3
MIN_COVERAGE = 0.75
"""A last window with a smaller share of the recording is left out."""
MIN_SECONDS = 0.4
BATCH_SIZE = 64


class SpeakerEncoder(nn.Module):
    """Embeds a recording of one speaker as a unit vector."""

    bands: Tensor
    window: Tensor

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        num_mels: int = 40,
        window_seconds: float = 0.025,
        hop_seconds: float = 0.01,
        hidden_size: int = 256,
        num_layers: int = 3,
        embedding_size: int = 256,
        partial_frames: int = 160,
    ) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.sample_rate = sample_rate
        self.partial_frames = partial_frames
        self.hop_length = round(hop_seconds * sample_rate)
        self.window_length = round(window_seconds * sample_rate)
        self.lstm = nn.LSTM(num_mels, hidden_size, num_layers, batch_first=True)
        self.linear = nn.Linear(hidden_size, embedding_size)
        bands = melscale_fbanks(
            self.window_length // 2 + 1,
            0.0,
            sample_rate / 2,
            num_mels,
            sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("bands", bands, persistent=False)
        self.register_buffer("window", torch.hann_window(self.window_length), persistent=False)

    @classmethod
    def from_folder(cls, folder: str | Path, device: str = "cpu") -> "SpeakerEncoder":
        """Loads config.json and model.safetensors.

        Raises:
            ValueError: a file is missing or invalid.
        """
        folder = Path(folder)
        config, weights = folder / "config.json", folder / "model.safetensors"
        for path in (config, weights):
            if not path.is_file():
                raise ValueError(f"{path} is missing; `make models` makes the speaker encoder")
        try:
            encoder = cls(**json.loads(config.read_text(encoding="utf-8")))
            encoder.load_state_dict(load_file(weights))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}: no valid speaker encoder: {reason}") from error
        return encoder.eval().to(device)

    def forward(self, mel: Float[Tensor, "B T D"]) -> Float[Tensor, "B E"]:
        """Returns unit vectors of mel windows."""
        _, (hidden, _) = self.lstm(mel)
        return functional.normalize(functional.relu(self.linear(hidden[-1])), dim=1)

    def mel(self, wave: Float[Tensor, " S"]) -> Float[Tensor, "T D"]:
        """Returns power mel bands, a frame per hop, with zero padding at the edges."""
        spectrum = torch.stft(
            wave,
            n_fft=self.window_length,
            hop_length=self.hop_length,
            window=self.window,
            pad_mode="constant",
            return_complex=True,
        )
        return spectrum.abs().square().T @ self.bands

    def partial_starts(self, num_samples: int) -> list[int]:
        """Returns the first frames of the windows that cover a recording, evenly spaced."""
        num_frames = -(-(num_samples + 1) // self.hop_length)
        step = round(self.sample_rate / PARTIALS_PER_SECOND / self.hop_length)
        starts = list(range(0, max(1, num_frames - self.partial_frames + step + 1), step))
        first = starts[-1] * self.hop_length
        coverage = (num_samples - first) / (self.partial_frames * self.hop_length)
        return starts[:-1] if coverage < MIN_COVERAGE and len(starts) > 1 else starts

    @torch.inference_mode()
    def embed(self, wave: Float[np.ndarray, " S"], sample_rate: int) -> Float[np.ndarray, " E"]:
        """Returns the unit vector of a recording.

        Raises:
            ValueError: it is silent, not finite or shorter than 0.4 s.
        """
        check_scorable(wave, "speaker's")
        if wave.size < MIN_SECONDS * sample_rate:
            raise ValueError(
                f"a speaker embedding needs {MIN_SECONDS} s, got {wave.size / sample_rate:.2f} s"
            )
        wave = resample_for_scoring(np.asarray(wave, np.float32), sample_rate, self.sample_rate)
        volume = 10 * np.log10(np.mean(np.square(wave, dtype=np.float64)))
        wave = wave * np.float32(10 ** (max(0.0, VOLUME_DBFS - volume) / 20))
        starts = self.partial_starts(wave.size)
        padding = (starts[-1] + self.partial_frames) * self.hop_length - wave.size
        mel = self.mel(
            functional.pad(torch.from_numpy(wave), (0, max(0, padding))).to(self.bands.device)
        )
        partials = torch.stack([mel[start : start + self.partial_frames] for start in starts])
        vectors = torch.cat([self(batch) for batch in partials.split(BATCH_SIZE)])
        return functional.normalize(vectors.mean(0), dim=0).cpu().numpy()


def similarity(first: Float[np.ndarray, " E"], second: Float[np.ndarray, " E"]) -> float:
    """Returns the cosine of two embeddings, in [-1, 1]."""
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
