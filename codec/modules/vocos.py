"""Frame-rate networks: a ConvNeXt encoder of log-mel frames and a Vocos decoder.

All layers run at the mel frame rate or below, so small codecs can be trained on a few CPU cores.
The decoder follows Vocos (arXiv 2306.00814): ConvNeXt blocks, then magnitude and phase of an STFT,
inverted by iSTFT. `mask` zeroes padding before each convolution, which pads with zeros itself.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from codec.audio import mel_filterbank
from codec.config import SpectralConfig
from codec.modules.layers import ChannelNorm, ConvNeXtBlock, Lengths, ceil_div, length_mask

MEL_FLOOR = 1e-5
MAX_LOG_MAGNITUDE = 6.0


class SpectralEncoder(nn.Module):
    """wave (B,1,S) -> latent (B,D,T), T = ceil(S / hop_length)."""

    def __init__(self, config: SpectralConfig, sample_rate: int) -> None:
        super().__init__()
        self.config = config
        width, kernel = config.encoder_width, config.kernel_size
        bank = mel_filterbank(
            sample_rate=sample_rate, num_mels=config.num_mels, window=config.window
        )
        self.register_buffer("mel_bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(config.window), persistent=False)
        self.embed = nn.Conv1d(config.num_mels, width, kernel, padding=kernel // 2)
        self.norm_in = ChannelNorm(width)
        self.stages = _stages(config.encoder_depths, width, kernel)
        self.downs = nn.ModuleList(
            nn.Conv1d(width, width, stride, stride=stride) for stride in config.strides
        )
        self.norm_out = ChannelNorm(width)
        self.project = nn.Conv1d(width, config.dimension, 1)

    def forward(
        self, wave: Float[Tensor, "B 1 S"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B D T"]:
        hop = self.config.hop_length
        if lengths is not None:
            wave = wave * length_mask(lengths, wave.shape[-1])
        wave = functional.pad(wave, (0, -wave.shape[-1] % hop))
        x = self._log_mel(wave.squeeze(1))
        mask = None
        if lengths is not None:
            mask = length_mask(ceil_div(lengths, hop) * (hop // self.config.hop), x.shape[-1])
        x = self.norm_in(self.embed(x if mask is None else x * mask))
        for index, stage in enumerate(self.stages):
            if index > 0:
                x = self.downs[index - 1](x if mask is None else x * mask)
                mask = None if mask is None else mask[..., :: self.config.strides[index - 1]]
            x = _run(stage, x, mask)
        return self.project(self.norm_out(x))

    def _log_mel(self, wave: Float[Tensor, "B S"]) -> Float[Tensor, "B M T"]:
        """Log-mel magnitudes, shifted to about zero mean, with zero padding at both ends."""
        pad = (self.config.window - self.config.hop) // 2
        with torch.autocast(wave.device.type, enabled=False):
            spectrum = torch.stft(
                functional.pad(wave.float(), (pad, pad)), self.config.window, self.config.hop,
                window=self.get_buffer("window"), center=False, return_complex=True,
            )  # fmt: skip
            mel = self.get_buffer("mel_bank").T @ spectrum.abs()
            return mel.clamp(min=MEL_FLOOR).log() * 0.25 + 1.0


class SpectralDecoder(nn.Module):
    """quantized (B,D,T) -> wave (B,1,T * hop_length)."""

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__()
        self.config = config
        width, kernel = config.decoder_width, config.kernel_size
        self.register_buffer("window", torch.hann_window(config.window), persistent=False)
        self.embed = nn.Conv1d(config.dimension, width, kernel, padding=kernel // 2)
        self.norm_in = ChannelNorm(width)
        self.stages = _stages(config.decoder_depths, width, kernel)
        self.ups = nn.ModuleList(
            nn.Linear(width, stride * width) for stride in reversed(config.strides)
        )
        self.norm_out = ChannelNorm(width)
        self.head = nn.Linear(width, config.window + 2)

    def forward(
        self, quantized: Float[Tensor, "B D T"], lengths: Lengths | None = None
    ) -> Float[Tensor, "B 1 S"]:
        mask = None if lengths is None else length_mask(lengths, quantized.shape[-1])
        x = self.norm_in(self.embed(quantized if mask is None else quantized * mask))
        for index, stage in enumerate(self.stages):
            if index > 0:
                stride = self.config.strides[-index]
                x = self.ups[index - 1](x.transpose(1, 2))
                x = rearrange(x, "b t (s c) -> b c (t s)", s=stride)
                mask = None if mask is None else mask.repeat_interleave(stride, dim=-1)
            x = _run(stage, x, mask)
        return self._to_wave(self.head(self.norm_out(x).transpose(1, 2)), mask)

    def _to_wave(
        self, head: Float[Tensor, "B T F"], mask: Float[Tensor, "B 1 T"] | None
    ) -> Float[Tensor, "B 1 S"]:
        """Inverse STFT of magnitude and phase: windowed overlap-add, divided by the envelope."""
        window, hop = self.get_buffer("window"), self.config.hop
        with torch.autocast(head.device.type, enabled=False):
            log_magnitude, phase = head.float().chunk(2, dim=-1)
            magnitude = log_magnitude.clamp(max=MAX_LOG_MAGNITUDE).exp()
            spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
            frames = torch.fft.irfft(spectrum, self.config.window) * window
            envelope = window.square().expand_as(frames)
            if mask is not None:
                frames, envelope = frames * mask.mT, envelope * mask.mT
            wave, envelope = _overlap_add(frames, hop), _overlap_add(envelope, hop)
            trim = (self.config.window - hop) // 2
            return (wave / envelope.clamp(min=1e-8))[..., trim:-trim]


def _overlap_add(frames: Float[Tensor, "B T W"], hop: int) -> Float[Tensor, "B 1 S"]:
    size = (frames.shape[1] - 1) * hop + frames.shape[2]
    folded = functional.fold(
        frames.mT, (1, size), kernel_size=(1, frames.shape[2]), stride=(1, hop)
    )
    return folded.squeeze(2)


def _stages(depths: tuple[int, ...], width: int, kernel: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.ModuleList(
            ConvNeXtBlock(width, kernel=kernel, scale=1.0 / sum(depths)) for _ in range(depth)
        )
        for depth in depths
    )


def _run(stage: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    assert isinstance(stage, nn.ModuleList)
    for block in stage:
        x = block(x, mask)
    return x
