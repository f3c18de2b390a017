"""A frozen pretrained Whisper encoder with a trained adapter, as a codec's semantic encoder.

Quantized hidden states of a speech recognizer are supervised semantic tokens (CosyVoice, arXiv
2407.05407, section 2.1; GLM-4-Voice, 2412.02612, section 3.1). Whisper's weights (2212.04356) are
saved with the codec.
"""

from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from codec.config import WHISPER_HOP, CodecConfig, WhisperConfig
from codec.distillation.teachers import WINDOW_SECONDS, WhisperTeacher, load_speech_teacher
from codec.modules.layers import ChannelNorm, ConvNeXtBlock, Lengths, ceil_div, length_mask

KERNEL = 5
"""Kernel size of an adapter block's depthwise convolution, in frames."""


class WhisperEncoder(nn.Module):
    """wave (B,1,S) at 16 kHz -> latent (B,D,T): Whisper's features, stacked per frame, then trained
    ConvNeXt blocks. Each item of a padded batch gets the latent that it gets alone."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        whisper = config.lmspt.whisper
        self.hop_length = config.hop_length
        self.stack = config.hop_length // WHISPER_HOP  # Whisper features per frame.
        self.whisper = WhisperTeacher(_network(whisper), name="whisper", layer="last")
        inside, depth = whisper.adapter_width, whisper.adapter_depth
        self.norm_in = ChannelNorm(self.stack * whisper.width)
        self.embed = nn.Conv1d(self.stack * whisper.width, inside, 1)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(inside, kernel=KERNEL, scale=1 / depth) for _ in range(depth)
        )
        self.norm_out = ChannelNorm(inside)
        self.project = nn.Conv1d(inside, config.lmspt.dimension, 1)

    @torch.no_grad()
    def features(
        self,
        wave: Float[Tensor, "B 1 S"],
        lengths: Lengths | None = None,
        offsets: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B F T"]:
        """Whisper's features, F = stack * width, T = ceil(S / hop_length); zeros in padding.

        `offsets` is the position of each item's first feature in Whisper's 30 s window (default 0),
        see `random_offsets`.
        """
        total = ceil_div(wave.shape[-1], self.hop_length)
        if lengths is None:
            lengths = torch.full((len(wave),), wave.shape[-1], device=wave.device)
        # Whisper has ceil(S / 320) features; silence completes the last frame.
        frames = ceil_div(lengths, self.hop_length)
        wave = wave * length_mask(lengths, wave.shape[-1])
        wave = functional.pad(wave, (0, -wave.shape[-1] % self.hop_length))
        values = self.whisper(wave, frames * self.hop_length, offsets).values
        values = rearrange(values, "b (t s) d -> b (s d) t", s=self.stack)
        return functional.pad(values, (0, total - values.shape[-1]))

    def random_offsets(self, lengths: Lengths) -> Int[Tensor, " B"]:
        """Random `offsets` (on the CPU) at which items of `lengths` samples fit into 30 s.

        Whisper's features encode the absolute position, and codes should not (LOG.md): training
        with random offsets makes them independent of it.
        """
        free = self.whisper.window_frames - ceil_div(lengths, WHISPER_HOP) - self.stack
        free = free.clamp(min=0).cpu()
        return (torch.rand(len(lengths)) * (free + 1)).long().clamp(max=free)

    def forward(
        self, wave: Float[Tensor, "B 1 S"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B D T"]:
        mask = None
        if lengths is not None:
            frames = ceil_div(lengths, self.hop_length)
            mask = length_mask(frames, ceil_div(wave.shape[-1], self.hop_length))
        return self.adapt(self.features(wave, lengths), mask)

    def adapt(
        self, features: Float[Tensor, "B F T"], mask: Float[Tensor, "B 1 T"] | None = None
    ) -> Float[Tensor, "B D T"]:
        """The adapter: features to the latent that is quantized; `mask` is 0 in padding."""
        x = self.embed(self.norm_in(features))
        for block in self.blocks:
            x = block(x, mask)
        return self.project(self.norm_out(x))


def config_for_whisper(model: str, config: CodecConfig) -> CodecConfig:
    """`config` with the semantic encoder's sizes set to those of a Whisper model.

    `model` is a hub id or folder. Raises `ValueError` if it is not a Whisper.
    """
    found = _load_teacher(model).network.config
    whisper = replace(
        config.lmspt.whisper,
        width=found.d_model,
        num_layers=found.encoder_layers,
        num_heads=found.encoder_attention_heads,
        feedforward=found.encoder_ffn_dim,
        num_mels=found.num_mel_bins,
    )
    return replace(config, lmspt=replace(config.lmspt, semantic="whisper", whisper=whisper))


def load_whisper(encoder: WhisperEncoder, model: str) -> None:
    """Loads the weights of a Whisper model (hub id or folder) into the encoder.

    Raises `ValueError` if it is not a Whisper or has other sizes than the configuration.
    """
    network = _load_teacher(model).network
    try:
        encoder.whisper.network.load_state_dict(network.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"{model}: has other sizes than codec.lmspt.whisper; leave those keys out"
        ) from error


def _load_teacher(model: str) -> WhisperTeacher:
    teacher = load_speech_teacher(model, layer="last", half=False)
    if not isinstance(teacher, WhisperTeacher):
        raise ValueError(f"{model}: is not a Whisper model; give a hub id or folder of one")
    return teacher


def _network(config: WhisperConfig) -> nn.Module:
    """Whisper's encoder with random weights, of transformers."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Network

    return Network(
        transformers.WhisperConfig(
            d_model=config.width,
            encoder_layers=config.num_layers,
            encoder_attention_heads=config.num_heads,
            encoder_ffn_dim=config.feedforward,
            num_mel_bins=config.num_mels,
            max_source_positions=WINDOW_SECONDS * 16_000 // WHISPER_HOP,
        )
    )
