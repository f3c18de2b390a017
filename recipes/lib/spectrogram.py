"""Pictures of spectrograms."""

from pathlib import Path

import torch

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
