"""LM-SPT's objective: speech made of semantic codes alone must sound to Whisper like the original.

Source: arXiv 2506.16738, section 3.2. The released code compares 30 s of every crop, most of it
padding, and lets a batch's loudest crop set the student's log-mel floor; `resynthesis.mask` and
`resynthesis.per_item` say which of the two is done.
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
    """A frozen Whisper encoder that hears originals and what is made of their semantic codes.

    `sample_rate` is that of the speech which `Student` makes of the semantic codes. Raises
    `ValueError` when the model cannot be loaded or is no Whisper.
    """

    def __init__(
        self, config: ResynthesisConfig, codec: CodecConfig, device: str | torch.device
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.codec_rate = self.sample_rate = codec.sample_rate
        if config.decoder == "auxiliary":
            self.sample_rate = codec.lmspt.auxiliary.sample_rate
        teacher = load_speech_teacher(
            config.model, layer=config.layer, device=device, half=config.half
        )
        if not isinstance(teacher, WhisperTeacher):
            raise ValueError(f"resynthesis.model: {config.model} is no Whisper; name one")
        self.teacher = self.student_teacher = teacher
        if not config.per_item:
            self.student_teacher = WhisperTeacher(
                teacher.network, name=teacher.name, layer=teacher.layer, per_item=False
            )

    @torch.no_grad()
    def listen(self, crops: Crops) -> "Reference":
        """What Whisper makes of the crops themselves."""
        samples = crops.wave.shape[-1]
        features = self._hear(self.teacher, crops.wave, self.codec_rate, crops.lengths, samples)
        return Reference(self, features, crops.lengths, samples)

    def _hear(
        self,
        teacher: WhisperTeacher,
        wave: Float[Tensor, "B 1 S"],
        rate: int,
        lengths: Int[Tensor, " B"],
        samples: int,
    ) -> Features:
        """`lengths` and `samples` (of the whole crop) count at the codec's rate, `wave` is at
        `rate`; in float32, whatever the run computes in."""
        size = ceil_div(samples * teacher.sample_rate, self.codec_rate)
        with torch.autocast(self.device.type, enabled=False):
            wave = wave.to(self.device).float()
            if self.config.mask:
                # Resampling would smear what lies beyond an item's end into it.
                inside = ceil_div(lengths * rate, self.codec_rate).to(self.device)
                place = torch.arange(wave.shape[-1], device=self.device)
                wave = wave * (place < inside[:, None, None])
            wave = resample_batch(wave, rate, teacher.sample_rate)
            wave = functional.pad(wave, (0, size - wave.shape[-1]))
            if self.config.mask:
                return teacher(wave, ceil_div(lengths * teacher.sample_rate, self.codec_rate))
            whole = WINDOW_SECONDS * teacher.sample_rate
            return teacher(functional.pad(wave, (0, max(0, whole - size))))


@dataclass(frozen=True, slots=True)
class Reference:
    """A batch as Whisper heard it."""

    listener: Resynthesis
    features: Features
    lengths: Int[Tensor, " B"]
    """Samples of each crop that are no padding, at the codec's rate."""
    samples: int
    """Of the whole crops, likewise."""

    def distance(self, speech: Float[Tensor, "B 1 s"]) -> Float[Tensor, ""]:
        """Mean distance of the speech's features to these over features and frames, then items.

        `speech` is at the listener's `sample_rate`; its gradient passes the frozen encoder.
        """
        ear = self.listener
        heard = ear._hear(ear.student_teacher, speech, ear.sample_rate, self.lengths, self.samples)
        apart = heard.values - self.features.values
        apart = apart.square() if ear.config.distance == "mse" else apart.abs()
        counts = self.features.lengths
        counted = torch.arange(apart.shape[1], device=apart.device) < counts.unsqueeze(1)
        return ((apart.mean(2) * counted).sum(1) / counts).mean()
