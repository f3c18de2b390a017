"""Objectives that teach codebooks content: SpeechTokenizer's and DM-Codec's distillation."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from codec.models.codec import Codec
from codec.modules.quantize import Quantized
from codec.training.config import (
    DistillConfig,
    ResynthesisConfig,
    SpeechTeacherConfig,
    TextTeacherConfig,
)

# Of a frame; a little less, as times are rounded.
HALF = 0.499


class Target(NamedTuple):
    """What a teacher says of each frame, and the frames of which it says something."""

    values: Float[Tensor, "B T D"] | Int[Tensor, "B T"]
    """Features, or units of the objective `units`."""
    mask: Bool[Tensor, "B T"]


class StudentOutput(NamedTuple):
    """What a training step needs of one pass."""

    wave: Float[Tensor, "B 1 S"]
    quantized: Quantized
    projections: dict[str, Float[Tensor, "B T _"]]
    """By teacher: its codebooks' entries in its own width (or logits of its units)."""
    resynthesis: Float[Tensor, "B 1 s"] | None = None
    """Speech made of the semantic codes alone; the auxiliary decoder has a rate of its own."""


class Student(nn.Module):
    """A codec in training, with a projection to each teacher's width.

    In the seanet family the codec's own semantic_head serves the speech teacher (or the text
    teacher where it is alone, or both when shared), so that checkpoints hold it as the published
    ones do. Projections of other families are training state and stay behind.
    """

    def __init__(
        self,
        codec: Codec,
        config: DistillConfig | None = None,
        widths: Mapping[str, int] | None = None,
        resynthesis: ResynthesisConfig | None = None,
    ) -> None:
        """`widths` by teacher, "speech" or "text"; `resynthesis` None: nothing speaks the semantic
        codes. Raises `ValueError` where a codec does not fit."""
        super().__init__()
        self.codec, self.resynthesis = codec, resynthesis
        config, widths = config or DistillConfig(), widths or {}
        self.parts = {name: getattr(config, name).codebooks for name in widths}
        names = list(widths)
        if config.shared_head and len(set(widths.values())) > 1:
            raise ValueError(f"distill.shared_head needs teachers of one width, got {dict(widths)}")
        self.head_of = {name: names[0] if config.shared_head else name for name in names}
        self.heads = nn.ModuleDict()
        own = hasattr(codec, "semantic_head")
        for name in sorted(set(self.head_of.values()), key=names.index):
            if own and name == names[0]:
                _check_width(codec, name, widths[name])
            else:
                self.heads[name] = nn.Linear(codec.latent_dimension, widths[name])
        if own:
            # A head that no loss reaches stays as it is.
            codec.semantic_head.requires_grad_(bool(names))
        speaks = resynthesis is not None and resynthesis.decoder == "auxiliary"
        if speaks and codec.auxiliary is None:
            raise ValueError(
                "resynthesis.decoder: this codec has no auxiliary decoder; give it one "
                "(lmspt.auxiliary.kind), or set it to main"
            )
        if codec.auxiliary is not None:
            codec.auxiliary.requires_grad_(speaks)

    def forward(
        self, wave: Float[Tensor, "B 1 S"], codes: Int[Tensor, "B T"] | None = None
    ) -> StudentOutput:
        """Code, decode, project, and speak the semantic codes, which may be known (`codes`)."""
        out = self.codec(wave, codes)
        projections = {
            name: self._head(name)(out.quantized.part(part).mT) for name, part in self.parts.items()
        }
        return StudentOutput(
            out.wave, out.quantized, projections, self._resynthesize(out.quantized)
        )

    def _resynthesize(self, quantized: Quantized) -> Float[Tensor, "B 1 s"] | None:
        if self.resynthesis is None:
            return None
        entry = quantized.part("first")
        if self.resynthesis.stop_gradient:
            entry = entry.detach()
        if self.resynthesis.decoder == "main":
            return self.codec.decoder(entry)
        assert self.codec.auxiliary is not None
        return self.codec.auxiliary(entry)

    def _head(self, name: str) -> nn.Module:
        name = self.head_of[name]
        return self.heads[name] if name in self.heads else self.codec.semantic_head  # noqa: SIM401


def _check_width(codec: Codec, name: str, width: int) -> None:
    expected = codec.config.seanet.semantic_dimension
    if width != expected:
        raise ValueError(
            f"the {name} teacher has {width} features, but codec.seanet.semantic_dimension is "
            f"{expected}: set it to {width}"
        )


def distill_losses(
    projections: Mapping[str, Tensor], targets: Mapping[str, Target], config: DistillConfig
) -> dict[str, Float[Tensor, ""]]:
    """Each teacher's loss as distill_speech or distill_text, and their weighted sum as distill.

    With two teachers the sum is halved (2410.15017, equation 11). Raises `ValueError` where
    a teacher's frames do not fit the codec's.
    """
    parts = {}
    for name, target in targets.items():
        branch = getattr(config, name)
        student, target = trim(projections[name].float(), target)
        if branch.objective == "units":
            parts[name] = unit_loss(student, target.values, target.mask)
        elif branch.objective == "t_axis":
            parts[name] = t_axis_loss(
                student, target.values, target.mask, cosine_weight=branch.cosine_weight
            )
        else:
            parts[name] = d_axis_loss(student, target.values, target.mask)
    total = torch.stack([getattr(config, name).weight * part for name, part in parts.items()]).sum()
    if len(parts) == 2:
        total = total / 2
    return {f"distill_{name}": part for name, part in parts.items()} | {"distill": total}


def trim(student: Float[Tensor, "B T D"], target: Target) -> tuple[Tensor, Target]:
    """Both cut to the shorter one; they may differ by one frame, as strided convolutions do.

    Raises `ValueError` when they differ by more: then time does not match time.
    """
    ours, theirs = student.shape[1], target.values.shape[1]
    if abs(ours - theirs) > 1:
        raise ValueError(
            f"the teacher has {theirs} frames where the codec has {ours}: they may differ by one; "
            "features must be (frames, features), at the codec's frame rate"
        )
    frames = min(ours, theirs)
    return student[:, :frames], Target(target.values[:, :frames], target.mask[:, :frames])


def d_axis_loss(
    student: Float[Tensor, "B T D"],
    teacher: Float[Tensor, "B T D"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """-log sigmoid of the cosine over time of every feature, mean over features and items.

    0.3133 for a perfect student, 0.6931 for one that knows nothing. Items with fewer than two
    frames inside the mask say nothing of time and do not count; with none left the loss is 0.
    Source: SpeechTokenizer (2308.16692), equation 2 as its code has it.
    """
    inside = mask.unsqueeze(2).to(student.dtype)
    counts = mask.sum(1) >= 2
    cosine = functional.cosine_similarity(student * inside, teacher * inside, dim=1)
    losses = -functional.logsigmoid(cosine).mean(1)
    return (losses * counts).sum() / counts.sum().clamp(min=1)


def t_axis_loss(
    student: Float[Tensor, "B T D"],
    teacher: Float[Tensor, "B T D"],
    mask: Bool[Tensor, "B T"],
    *,
    cosine_weight: int | float = 1.0,
) -> Float[Tensor, ""]:
    """Per frame, mean absolute difference plus -log sigmoid of the cosine over features.

    Source: the released code's t_axis form (2308.16692; it follows 2212.09553).
    """
    distance = (student - teacher).abs().mean(2)
    cosine = functional.cosine_similarity(student, teacher, dim=2)
    losses = distance - cosine_weight * functional.logsigmoid(cosine)
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def unit_loss(
    logits: Float[Tensor, "B T K"], units: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Cross-entropy of pseudo-labels (2308.16692, section 3.3, equation 3)."""
    losses = functional.cross_entropy(logits.mT, units, reduction="none")
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def over_frames(
    features: Float[Tensor, "B t D"],
    lengths: Int[Tensor, " B"],
    rate: int | float,
    num_frames: int,
    frame_rate: int | float,
) -> Target:
    """A teacher's features, `rate` a second, on `num_frames` frames at the codec's frame rate.

    A frame gets the mean over its time of those of an item's first `lengths` features; it counts
    where they fill at least half of it. Padding never enters: an item has the target it has alone.
    """
    count = features.shape[1]
    edges = torch.arange(count + 1, device=features.device) / rate
    overlaps = word_overlaps(torch.stack([edges[:-1], edges[1:]], 1), num_frames, frame_rate)
    inside = torch.arange(count, device=features.device) < lengths.unsqueeze(1)
    return _mean_by_time(overlaps * inside.unsqueeze(1), features, frame_rate)


def word_overlaps(
    spans: Float[Tensor, "W 2"], num_frames: int, frame_rate: int | float
) -> Float[Tensor, "T W"]:
    """Seconds that each word (start and end in seconds) shares with each frame."""
    starts = torch.arange(num_frames, device=spans.device).unsqueeze(1) / frame_rate
    stops = starts + 1 / frame_rate
    return (torch.minimum(stops, spans[:, 1]) - torch.maximum(starts, spans[:, 0])).clamp(min=0)


def align_words(
    spans: Float[Tensor, "W 2"], num_frames: int, frame_rate: int | float
) -> Int[Tensor, " T"]:
    """The word that has most of each frame, -1 where words have less than half of it."""
    if not len(spans):
        return torch.full((num_frames,), -1, device=spans.device)
    overlaps = word_overlaps(spans, num_frames, frame_rate)
    counted = overlaps.sum(1) * frame_rate >= HALF
    return torch.where(counted, overlaps.argmax(1), -1)


def states_over_frames(
    spans: Float[Tensor, "W 2"],
    states: Float[Tensor, "W D"],
    num_frames: int,
    frame_rate: int | float,
) -> Target:
    """Each word's state over its own frames, a batch of one; a frame of several gets their mean.

    The mask leaves out the frames of which words have less than half: where nothing is said, a
    language model has nothing to say.
    """
    overlaps = word_overlaps(spans, num_frames, frame_rate)
    return _mean_by_time(overlaps.unsqueeze(0), states.unsqueeze(0), frame_rate)


def _mean_by_time(
    overlaps: Float[Tensor, "B T N"], values: Float[Tensor, "B N D"], frame_rate: int | float
) -> Target:
    total = overlaps.sum(2, keepdim=True)
    # The smallest total that counts is half a frame: the bound only keeps 0 / 0 away.
    means = overlaps / total.clamp(min=0.1 / frame_rate) @ values
    return Target(means, (total * frame_rate >= HALF).squeeze(2))


def branches(config: DistillConfig) -> dict[str, SpeechTeacherConfig | TextTeacherConfig]:
    """The teachers that a configuration names."""
    both = {"speech": config.speech, "text": config.text}
    return {name: branch for name, branch in both.items() if branch.model}
