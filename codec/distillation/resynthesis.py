"""LM-SPT's resynthesis distillation: Whisper's features of speech decoded from the semantic codes
alone are compared with those of the original.

Source: arXiv 2506.16738, section 3.2. The released code compares 30 s of every crop, most of it
padding (here: `resynthesis.mask`), and clamps the student's log-mel at a floor that the loudest
crop of the batch sets (here: `resynthesis.per_item`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from codec.audio import resample_batch
from codec.config import CodecConfig
from codec.distillation.teachers import (
    WINDOW_SECONDS,
    Features,
    WhisperTeacher,
    load_speech_teacher,
)
from codec.modules.layers import ceil_div
from codec.training.config import ResynthesisConfig
from codec.training.data import Crops


class Resynthesis:
    """A frozen Whisper encoder for originals and for speech resynthesized from semantic codes.

    `sample_rate` is that of the resynthesized speech.

    Raises:
        ValueError: the model cannot be loaded or is not a Whisper.
    """

    def __init__(
        self, config: ResynthesisConfig, codec: CodecConfig, device: str | torch.device
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.codec_rate = self.sample_rate = codec.sample_rate
        if config.decoder == "auxiliary":
            self.sample_rate = codec.lmspt.auxiliary.sample_rate
        teacher = load_speech_teacher(
            config.model, layer=config.layer, device=device, half=config.bfloat16
        )
        if not isinstance(teacher, WhisperTeacher):
            raise ValueError(f"resynthesis.model: {config.model} is not a Whisper; name one")
        self.teacher = self.student_teacher = teacher
        if not config.per_item:
            self.student_teacher = WhisperTeacher(
                teacher.network, name=teacher.name, layer=teacher.layer, per_item=False
            )

    @torch.no_grad()
    def encode_originals(self, crops: Crops) -> "OriginalFeatures":
        """Whisper's features of a batch, to compare resynthesized speech with."""
        samples = crops.wave.shape[-1]
        features = self._encode(self.teacher, crops.wave, self.codec_rate, crops.lengths, samples)
        return OriginalFeatures(self, features, crops.lengths, samples)

    def _encode(
        self,
        teacher: WhisperTeacher,
        wave: Float[Tensor, "B 1 S"],
        rate: int,
        lengths: Int[Tensor, " B"],
        samples: int,
    ) -> Features:
        """Features of `wave` at `rate`; `lengths` and `samples` (with padding) are at the codec's
        rate. In float32, also under autocast."""
        size = ceil_div(samples * teacher.sample_rate, self.codec_rate)
        with torch.autocast(self.device.type, enabled=False):
            wave = wave.to(self.device).float()
            if self.config.mask:
                # Resampling filters reach beyond an item's end: zero the padding first.
                inside = ceil_div(lengths * rate, self.codec_rate).to(self.device)
                positions = torch.arange(wave.shape[-1], device=self.device)
                wave = wave * (positions < inside[:, None, None])
            wave = resample_batch(wave, rate, teacher.sample_rate)
            wave = functional.pad(wave, (0, size - wave.shape[-1]))
            if self.config.mask:
                return teacher(wave, ceil_div(lengths * teacher.sample_rate, self.codec_rate))
            window = WINDOW_SECONDS * teacher.sample_rate
            return teacher(functional.pad(wave, (0, max(0, window - size))))


@dataclass(frozen=True, slots=True)
class OriginalFeatures:
    """Whisper's features of a batch of original crops."""

    encoder: Resynthesis
    features: Features
    lengths: Int[Tensor, " B"]
    """Samples of each crop without padding, at the codec's rate."""
    samples: int
    """Samples of each crop with padding, at the codec's rate."""

    def distance(self, speech: Float[Tensor, "B 1 s"]) -> Float[Tensor, ""]:
        """MSE or L1 between the features of `speech` and these: mean over an item, then over items.

        `speech` is at `Resynthesis.sample_rate`; it gets a gradient through the frozen encoder.
        """
        encoder = self.encoder
        found = encoder._encode(
            encoder.student_teacher, speech, encoder.sample_rate, self.lengths, self.samples
        )
        difference = found.values - self.features.values
        mse = encoder.config.distance == "mse"
        distance = (difference.square() if mse else difference.abs()).mean(2)  # (B, T)
        counts = self.features.lengths
        counted = torch.arange(distance.shape[1], device=distance.device) < counts.unsqueeze(1)
        return ((distance * counted).sum(1) / counts).mean()
