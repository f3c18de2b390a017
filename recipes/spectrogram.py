"""Spectrograms as a picture."""

from pathlib import Path

import numpy as np
import torch

from codec import read_audio
from codec.losses import log_mel
from codec.train_config import MelScaleConfig

SAMPLE_RATE = 16_000


def draw(waves: dict[str, Path], out: Path) -> None:
    """A picture of the log-mel spectrograms, one below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scale = MelScaleConfig(window=1024, hop=160, num_mels=80)
    figure, axes = pyplot.subplots(len(waves), 1, figsize=(10, 2.2 * len(waves)))
    for axis, (title, path) in zip(np.atleast_1d(axes), waves.items(), strict=True):
        wave = torch.from_numpy(read_audio(path, SAMPLE_RATE))
        mel = log_mel(wave[None, None], scale, SAMPLE_RATE)[0].numpy()
        extent = (0, len(wave) / SAMPLE_RATE, 0, scale.num_mels)
        axis.imshow(mel, origin="lower", aspect="auto", extent=extent, cmap="magma")
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("mel bin")
    axes[-1].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
