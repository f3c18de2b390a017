"""A tiny LM-SPT configuration of frame-rate networks, and a codec with initialized codebooks."""

from dataclasses import replace

import torch

from codec import Codec, CodecConfig
from codec.config import AuxiliaryConfig, LMSPTConfig, QuantizerConfig, SpectralConfig

QUANTIZER = QuantizerConfig(
    num_codebooks=3, codebook_sizes=(64, 16, 16), codebook_dimension=4, normalize=True,
    learning="gradient",
)  # fmt: skip
SPECTRAL = CodecConfig(
    family="lmspt",
    spectral=SpectralConfig(
        num_mels=20, window=160, hop=40, strides=(2, 2), encoder_width=16,
        encoder_depths=(1, 0, 1), decoder_width=16, decoder_depths=(1, 0, 1),
    ),
    lmspt=LMSPTConfig(
        dimension=12,
        auxiliary=AuxiliaryConfig(width=8, strides=(2, 2), depths=(0, 0, 1), window=160, hop=40),
    ),
    quantizer=replace(QUANTIZER, codebook_dimension=0, learning="ema", normalize=False),
)  # fmt: skip


def made(config: CodecConfig) -> Codec:
    torch.manual_seed(0)
    codec = Codec(config)
    codec.train()(0.3 * torch.randn(2, 1, 40 * config.hop_length))
    return codec.eval()
