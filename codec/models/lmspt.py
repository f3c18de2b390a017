"""LM-SPT's networks: semantic and acoustic encoder, split quantizer, decoder, auxiliary decoder.

arXiv 2506.16738 has two forms: convolutions and a Transformer with a Vocos decoder (first version),
and convolutions only (released code). Small codecs have frame-rate networks (`modules.vocos`).
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from codec.config import CodecConfig, SpectralConfig
from codec.modules.dac import ConvDecoder, ConvEncoder
from codec.modules.layers import Lengths, Transformer, ceil_div
from codec.modules.quantize import SemanticPath, SplitVQ
from codec.modules.ssl_encoders import WhisperEncoder
from codec.modules.vocos import SpectralDecoder, SpectralEncoder


class Encoder(nn.Module):
    """wave (B,1,S) -> latent (B,D,T), T = ceil(S / hop_length): a network, then a Transformer."""

    def __init__(self, config: CodecConfig, width: int) -> None:
        """`width`: channels of the first convolution; not used by frame-rate networks."""
        super().__init__()
        lmspt = config.lmspt
        self.hop_length = config.hop_length
        if lmspt.encoder == "conv":
            self.network: nn.Module = ConvEncoder(
                width, lmspt.conv.strides, lmspt.dimension,
                dilations=lmspt.conv.dilations, kernel=lmspt.conv.kernel_size, causal=lmspt.causal,
            )  # fmt: skip
        else:
            spectral = replace(config.spectral, dimension=lmspt.dimension)
            self.network = SpectralEncoder(spectral, config.sample_rate)
        self.bottleneck: Transformer | None = None
        if lmspt.transformer.num_layers:
            self.bottleneck = Transformer(
                lmspt.dimension, num_layers=lmspt.transformer.num_layers,
                num_heads=lmspt.transformer.num_heads, context=lmspt.transformer.context,
                causal=lmspt.causal,
            )  # fmt: skip

    def forward(
        self, wave: Float[Tensor, "B 1 S"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B D T"]:
        wave = functional.pad(wave, (0, -wave.shape[-1] % self.hop_length))
        frames = None
        if lengths is not None:
            # Zeros complete the last frame of every item, as for an item on its own.
            inside = torch.arange(wave.shape[-1], device=wave.device) < lengths.unsqueeze(1)
            wave = wave * inside.unsqueeze(1)
            frames = ceil_div(lengths, self.hop_length)
            lengths = frames * self.hop_length
        latent = self.network(wave, lengths)
        return latent if self.bottleneck is None else self.bottleneck(latent, frames)


class DualEncoder(nn.Module):
    """wave (B,1,S) -> both latents in one tensor (B,2D,T), the semantic one first."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        conv = config.lmspt.conv
        if config.lmspt.semantic == "whisper":
            self.semantic: nn.Module = WhisperEncoder(config)
        else:
            self.semantic = Encoder(config, conv.semantic_width or conv.width)
        self.acoustic: Encoder | None = None
        if not config.lmspt.shared_encoder:
            self.acoustic = Encoder(config, conv.width)

    def forward(
        self, wave: Float[Tensor, "B 1 S"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B E T"]:
        semantic = self.semantic(wave, lengths)
        acoustic = semantic if self.acoustic is None else self.acoustic(wave, lengths)
        return torch.cat([semantic, acoustic], dim=1)


def build_quantizer(config: CodecConfig) -> SplitVQ:
    """The split quantizer; see `SemanticPath` for the gradient of the semantic entry."""
    if not config.lmspt.semantic_subtraction:
        path = SemanticPath.PARALLEL
    elif config.quantizer.dimensions[0]:
        path = SemanticPath.RESIDUAL
    else:
        shared = config.lmspt.shared_encoder
        path = SemanticPath.DETACHED if shared else SemanticPath.DETACHED_RESIDUAL
    return SplitVQ(config.dimension, config.quantizer, path)


def build_decoder(config: CodecConfig) -> nn.Module:
    """quantized (B,D,T) -> wave (B,1,T * hop_length)."""
    lmspt = config.lmspt
    if lmspt.decoder == "spectral":
        return SpectralDecoder(replace(config.spectral, dimension=lmspt.dimension))
    return ConvDecoder(
        lmspt.dimension, lmspt.conv.decoder_width, lmspt.conv.upsampling,
        dilations=lmspt.conv.dilations, kernel=lmspt.conv.kernel_size, causal=lmspt.causal,
    )  # fmt: skip


def build_auxiliary(config: CodecConfig) -> nn.Module | None:
    """Semantic entries (B,D,T) -> waves (B,1,S) at lmspt.auxiliary.sample_rate; None for kind
    none."""
    auxiliary, dimension = config.lmspt.auxiliary, config.lmspt.dimension
    if auxiliary.kind == "none":
        return None
    if auxiliary.kind == "conv":
        return ConvDecoder(
            dimension, auxiliary.width, auxiliary.strides,
            dilations=auxiliary.dilations, kernel=auxiliary.kernel_size, causal=auxiliary.causal,
        )  # fmt: skip
    vocos = SpectralConfig(
        window=auxiliary.window,
        hop=auxiliary.hop,
        strides=auxiliary.strides[::-1],
        encoder_depths=(0,) * len(auxiliary.depths),
        dimension=dimension,
        decoder_width=auxiliary.width,
        decoder_depths=auxiliary.depths,
        kernel_size=auxiliary.kernel_size,
    )
    return SpectralDecoder(vocos)
