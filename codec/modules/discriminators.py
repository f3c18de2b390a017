"""Discriminators: multi-period and multi-scale (HiFi-GAN, arXiv 2010.05646), multi-scale STFT
(EnCodec, 2210.13438) and multi-band STFT (DAC, 2306.06546)."""

from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from codec.training.config import DiscriminatorConfig

SLOPE = 0.1
PERIOD_WIDTHS = (32, 128, 512, 1024, 1024)
# (channels, kernel, stride, groups) of each layer of a scale discriminator.
SCALE_LAYERS = (
    (128, 15, 1, 1),
    (128, 41, 2, 4),
    (256, 41, 2, 16),
    (512, 41, 4, 16),
    (1024, 41, 4, 16),
    (1024, 41, 1, 16),
    (1024, 5, 1, 1),
)
STFT_DILATIONS = (1, 2, 4)
BAND_WIDTH = 64
# Edges of the bands of a multi-band discriminator, as shares of the spectrum.
BAND_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
# (kernel, stride) along frequency of each layer of a band.
BAND_LAYERS = ((9, 1), (9, 2), (9, 2), (9, 2), (3, 1))


class DiscriminatorOutput(NamedTuple):
    """Logits and feature maps of one sub-discriminator.

    Targets of the logits: 1 for real and 0 for generated waves (hinge loss: 1 and -1).
    """

    logits: Tensor
    features: list[Tensor]
    """Output of each layer, the logits last."""


class Discriminators(nn.Module):
    """All sub-discriminators of a configuration as one module (one DDP wrapper)."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        divisor = config.width_divisor
        self.normalize_input = config.normalize_input
        self.scale_discriminators = nn.ModuleList(
            ScaleDiscriminator(divisor, norm=spectral_norm if index == 0 else weight_norm)
            for index in range(config.num_scales)
        )
        self.others = nn.ModuleList(
            [
                *(
                    PeriodDiscriminator(period, divisor, extra=config.extra_period)
                    for period in config.periods
                ),
                *(STFTDiscriminator(window, config.stft_filters) for window in config.stft_windows),
                *(BandDiscriminator(window, divisor) for window in config.band_windows),
            ]
        )
        if not len(self.scale_discriminators) + len(self.others):
            raise ValueError(
                "discriminators: there are none; set periods, num_scales, stft_windows or "
                "band_windows, or set losses.weights.adversarial and .feature to 0"
            )

    def forward(self, wave: Float[Tensor, "B 1 S"]) -> list[DiscriminatorOutput]:
        """One output for each sub-discriminator; shapes of logits and feature maps differ."""
        if self.normalize_input:
            wave = wave.float()
            wave = wave - wave.mean(-1, keepdim=True)
            wave = 0.8 * wave / (wave.abs().amax(-1, keepdim=True) + 1e-9)
        outputs = [discriminator(wave) for discriminator in self.others]
        for index, discriminator in enumerate(self.scale_discriminators):
            if index > 0:
                wave = functional.avg_pool1d(wave, 4, stride=2, padding=2)
            outputs.append(discriminator(wave))
        return outputs


class PeriodDiscriminator(nn.Module):
    """2-D convolutions over the wave reshaped into rows of `period` samples.

    The last row is completed by reflection. If it is complete, `extra` adds one more row, as in the
    released code of DAC and LM-SPT.
    """

    def __init__(self, period: int, width_divisor: int = 1, *, extra: bool = False) -> None:
        super().__init__()
        self.period, self.extra = period, extra
        widths = [1, *(max(width // width_divisor, 4) for width in PERIOD_WIDTHS)]
        self.convs = nn.ModuleList(
            weight_norm(
                nn.Conv2d(
                    widths[index],
                    widths[index + 1],
                    (5, 1),
                    stride=(3 if index < len(PERIOD_WIDTHS) - 1 else 1, 1),
                    padding=(2, 0),
                )
            )
            for index in range(len(PERIOD_WIDTHS))
        )
        self.conv_out = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Float[Tensor, "B 1 S"]) -> DiscriminatorOutput:
        missing = -wave.shape[-1] % self.period
        if self.extra and not missing:
            missing = self.period
        padded = functional.pad(wave, (0, missing), mode="reflect")
        x = rearrange(padded, "b c (t p) -> b c t p", p=self.period)
        return _run_convs(self.convs, self.conv_out, x)


class ScaleDiscriminator(nn.Module):
    """Grouped strided 1-D convolutions on the wave at one sample rate."""

    def __init__(self, width_divisor: int = 1, *, norm=weight_norm) -> None:
        super().__init__()
        self.convs, channels_in = nn.ModuleList(), 1
        for channels, kernel, stride, groups in SCALE_LAYERS:
            width = max(channels // width_divisor, 16)
            self.convs.append(
                norm(
                    nn.Conv1d(
                        channels_in, width, kernel, stride, padding=kernel // 2, groups=groups
                    )
                )
            )
            channels_in = width
        self.conv_out = norm(nn.Conv1d(channels_in, 1, 3, padding=1))

    def forward(self, wave: Float[Tensor, "B 1 S"]) -> DiscriminatorOutput:
        return _run_convs(self.convs, self.conv_out, wave)


class STFTDiscriminator(nn.Module):
    """Dilated 2-D convolutions over the real and imaginary parts of an STFT."""

    def __init__(self, window: int, filters: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        layers = [nn.Conv2d(2, filters, (3, 9), padding=(1, 4))]
        for dilation in STFT_DILATIONS:
            layers.append(
                nn.Conv2d(
                    filters,
                    filters,
                    (3, 9),
                    stride=(1, 2),
                    dilation=(dilation, 1),
                    padding=(dilation, 4),
                )
            )
        layers.append(nn.Conv2d(filters, filters, (3, 3), padding=1))
        self.convs = nn.ModuleList(weight_norm(layer) for layer in layers)
        self.conv_out = weight_norm(nn.Conv2d(filters, 1, (3, 3), padding=1))

    @property
    def min_samples(self) -> int:
        """Samples of the shortest wave that fills a window."""
        return len(self.get_buffer("window"))

    def forward(self, wave: Float[Tensor, "B 1 S"]) -> DiscriminatorOutput:
        x = _complex_spectrum(wave, self.get_buffer("window"), normalized=True)
        return _run_convs(self.convs, self.conv_out, x)


class BandDiscriminator(nn.Module):
    """2-D convolutions over the complex STFT, separate for each of five frequency bands.

    One convolution over all bands gives the logits; S samples give ceil(S / hop) frames.
    """

    def __init__(self, window: int, width_divisor: int = 1) -> None:
        super().__init__()
        width, num_bins = max(BAND_WIDTH // width_divisor, 4), window // 2 + 1
        self.hop = window // 4
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        edges = [int(share * num_bins) for share in BAND_EDGES]
        self.bands = list(pairwise(edges))
        self.band_convs = nn.ModuleList(
            nn.ModuleList(
                weight_norm(
                    nn.Conv2d(
                        2 if index == 0 else width,
                        width,
                        (3, kernel),
                        stride=(1, stride),
                        padding=(1, kernel // 2),
                    )
                )
                for index, (kernel, stride) in enumerate(BAND_LAYERS)
            )
            for _ in self.bands
        )
        self.conv_out = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=1))

    @property
    def min_samples(self) -> int:
        """Samples of the shortest wave that can be padded by reflection."""
        window = len(self.get_buffer("window"))
        return (window - self.hop) // 2 + self.hop

    def forward(self, wave: Float[Tensor, "B 1 S"]) -> DiscriminatorOutput:
        window = self.get_buffer("window")
        side = (len(window) - self.hop) // 2
        padded = functional.pad(wave, (side, side + -wave.shape[-1] % self.hop), mode="reflect")
        x = _complex_spectrum(padded, window, normalized=False)
        features, last = [], []
        for (low, high), convs in zip(self.bands, self.band_convs, strict=True):
            assert isinstance(convs, nn.ModuleList)
            layers = _run_layers(convs, x[..., low:high])
            features += layers
            last.append(layers[-1])
        logits = self.conv_out(torch.cat(last, dim=-1))
        return DiscriminatorOutput(logits.float(), [*features, logits])


def _complex_spectrum(
    wave: Float[Tensor, "B 1 S"], window: Float[Tensor, " W"], *, normalized: bool
) -> Float[Tensor, "B 2 T F"]:
    """Real and imaginary parts at a hop of a quarter window, in float32 also under autocast."""
    with torch.autocast(wave.device.type, enabled=False):
        spectrum = torch.stft(
            wave.squeeze(1).float(),
            len(window),
            len(window) // 4,
            window=window,
            normalized=normalized,
            center=False,
            return_complex=True,
        )
    return rearrange(torch.view_as_real(spectrum), "b f t c -> b c t f")


def _run_layers(convs: nn.ModuleList, x: Tensor) -> list[Tensor]:
    features = []
    for conv in convs:
        x = functional.leaky_relu(conv(x), SLOPE)
        features.append(x)
    return features


def _run_convs(convs: nn.ModuleList, conv_out: nn.Module, x: Tensor) -> DiscriminatorOutput:
    features = _run_layers(convs, x)
    logits = conv_out(features[-1])
    return DiscriminatorOutput(logits.float(), [*features, logits])
