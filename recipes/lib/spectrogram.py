"""Pictures of spectrograms."""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from codec import read_audio
from codec.training.config import MelScaleConfig
from codec.training.losses import log_mel

SAMPLE_RATE = 16_000


def draw_spectrograms(waves: dict[str, Path], out: Path) -> None:
    """Writes the log-mel spectrograms of recordings, one below the other, as a picture.

    Args:
        waves: recordings by title.
        out: the picture; its suffix decides the format.
    """
    from matplotlib.figure import Figure

    scale = MelScaleConfig(window=1024, hop=160, num_mels=80)
    figure = Figure(figsize=(10, 2.2 * len(waves)))
    axes = figure.subplots(len(waves), squeeze=False)[:, 0]
    for axis, (title, path) in zip(axes, waves.items(), strict=True):
        wave = torch.from_numpy(read_audio(path, SAMPLE_RATE))
        mel = log_mel(wave[None, None], scale, SAMPLE_RATE)[0].numpy()
        extent = (0, len(wave) / SAMPLE_RATE, 0, scale.num_mels)
        axis.imshow(mel, origin="lower", aspect="auto", extent=extent, cmap="magma")
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("mel bin")
    axes[-1].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def spectrogram_picture(
    wave: Float[np.ndarray, " S"], sample_rate: int, *, height: int = 80
) -> bytes:  # fmt: skip
    """Returns the log-mel spectrogram of a wave (S,) as a small WebP picture without axes."""
    from matplotlib.image import imsave

    scale = MelScaleConfig(window=1024, hop=max(256, wave.size // 400), num_mels=height)
    padded = np.pad(wave, (0, max(0, scale.window - wave.size)))
    mel = log_mel(torch.from_numpy(padded)[None, None], scale, sample_rate)[0].numpy()
    peak = float(mel.max())
    floor = max(peak - 9.0, float(mel.min()))  # About 80 dB below.
    file = io.BytesIO()
    settings = {"quality": 60, "method": 4}
    imsave(file, mel, vmin=floor, vmax=peak + 1e-6, cmap="magma", origin="lower", format="webp",
           pil_kwargs=settings)  # fmt: skip
    return file.getvalue()
