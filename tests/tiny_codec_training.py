"""A tiny LM-SPT codec with an auxiliary decoder, its losses, batches and an accelerator of one."""

import contextlib

import torch
from conftest import voiced

from codec import CodecConfig
from codec.config import AuxiliaryConfig, LMSPTConfig, QuantizerConfig, SpectralConfig
from codec.training.config import LossConfig, LossWeights, MelScaleConfig
from codec.training.data import Crops

TINY = CodecConfig(
    family="lmspt",
    spectral=SpectralConfig(
        num_mels=20, encoder_width=8, encoder_depths=(1, 1, 1), decoder_width=8,
        decoder_depths=(1, 1, 1),
    ),
    lmspt=LMSPTConfig(dimension=8, auxiliary=AuxiliaryConfig(width=8)),
    quantizer=QuantizerConfig(num_codebooks=3, codebook_sizes=(16, 8, 4), decay=0.8),
)  # fmt: skip
LOSSES = LossConfig(
    weights=LossWeights(resynthesis=1.0),
    mel_scales=(MelScaleConfig(window=512, hop=128, num_mels=40),),
)


def crops(*seconds: float, rate: int = 16_000, seed: int = 0) -> Crops:
    """A batch as data makes it: zeros beyond the lengths."""
    lengths = torch.tensor([round(each * rate) for each in seconds])
    wave = torch.zeros(len(seconds), 1, int(lengths.max()))
    for row, each in enumerate(seconds):
        wave[row, 0, : lengths[row]] = torch.from_numpy(voiced(each, rate, seed + row))
    ids = tuple(str(row) for row in range(len(seconds)))
    return Crops(wave, lengths, ids, (0.0,) * len(seconds))


class SingleProcess:
    """What a training step uses of an Accelerator, for one process."""

    device, sync_gradients = torch.device("cpu"), True
    process_index, num_processes, is_main_process, trackers = 0, 1, True, ()

    def accumulate(self, *models):
        return contextlib.nullcontext()

    def autocast(self):
        return contextlib.nullcontext()

    def unwrap_model(self, model):
        return model

    def backward(self, loss) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters, norm) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, norm)

    def reduce(self, values):
        return values
