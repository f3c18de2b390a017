"""Distillation of teacher features into codebooks: SpeechTokenizer (arXiv 2308.16692, section 3.3)
and DM-Codec (2410.15017, section 2.1).

`Student` projects quantized codebook entries to each teacher's width; the losses compare the
projections with `Target`s at the codec's frame rate.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from codec.models.codec import Codec
from codec.modules.quantize import Quantized
from codec.training.config import DistillConfig, ResynthesisConfig

MIN_COVERAGE = 0.499
"""Share of a frame that features or words must cover to count: half, less a rounding error."""


class Target(NamedTuple):
    """A teacher's target for each codec frame."""

    values: Float[Tensor, "B T D"] | Int[Tensor, "B T"]
    """Features, or pseudo-labels (k-means cluster ids) for the objective `units`."""
    mask: Bool[Tensor, "B T"]
    """Frames that have a target."""


class StudentOutput(NamedTuple):
    """One forward pass of a training step."""

    wave: Float[Tensor, "B 1 S"]
    quantized: Quantized
    projections: dict[str, Float[Tensor, "B T _"]]
    """By teacher: projected codebook entries, D of the teacher (or logits of pseudo-labels)."""
    resynthesis: Float[Tensor, "B 1 s"] | None = None
    """Speech decoded from the semantic codes alone, at the auxiliary decoder's sample rate."""


class Student(nn.Module):
    """A codec with a linear projection to each teacher's width, for training.

    In the seanet family the projection of the first teacher is the codec's own `semantic_head`, as
    in the published checkpoints. Other projections are training state and not saved with the codec.
    """

    def __init__(
        self,
        codec: Codec,
        config: DistillConfig | None = None,
        widths: Mapping[str, int] | None = None,
        resynthesis: ResynthesisConfig | None = None,
    ) -> None:
        """
        Args:
            widths: features (or pseudo-labels) of each teacher, "speech" and "text".
            resynthesis: None: no speech is decoded from the semantic codes alone.

        Raises:
            ValueError: the teachers' widths do not fit the codec or each other, or the codec has no
                auxiliary decoder.
        """
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
            # Without a teacher no loss reaches the head.
            codec.semantic_head.requires_grad_(bool(names))
        auxiliary = resynthesis is not None and resynthesis.decoder == "auxiliary"
        if auxiliary and codec.auxiliary is None:
            raise ValueError(
                "resynthesis.decoder: this codec has no auxiliary decoder; give it one "
                "(lmspt.auxiliary.kind), or set it to main"
            )
        if codec.auxiliary is not None:
            codec.auxiliary.requires_grad_(auxiliary)

    def forward(
        self, wave: Float[Tensor, "B 1 S"], codes: Int[Tensor, "B T"] | None = None
    ) -> StudentOutput:
        """Encodes, decodes and projects; `codes`: known codes of codebook 1 (`Codec.forward`)."""
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
    """Losses `distill_speech` and `distill_text`, and their weighted sum `distill`.

    Where `config` names both teachers, the sum is halved, also if one has weight 0 and no target
    (DM-Codec, 2410.15017, equations 3 and 11). One teacher alone counts fully (equation 10 with the
    loss of the language model; SpeechTokenizer).

    Raises:
        ValueError: a teacher's frames do not match the codec's.
    """
    parts = {}
    for name, target in targets.items():
        branch = getattr(config, name)
        student, target = match_lengths(projections[name].float(), target)
        if branch.objective == "units":
            parts[name] = pseudo_label_loss(student, target.values, target.mask)
        elif branch.objective == "t_axis":
            parts[name] = t_axis_loss(
                student, target.values, target.mask, cosine_weight=branch.cosine_weight
            )
        else:
            parts[name] = d_axis_loss(student, target.values, target.mask)
    total = torch.stack([getattr(config, name).weight * part for name, part in parts.items()]).sum()
    if config.combined:
        total = total / 2
    return {f"distill_{name}": part for name, part in parts.items()} | {"distill": total}


def match_lengths(student: Float[Tensor, "B T D"], target: Target) -> tuple[Tensor, Target]:
    """Both truncated to the shorter one; strided convolutions may make a difference of one frame.

    Raises:
        ValueError: they differ by more than one frame.
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
    """-log sigmoid of each feature's cosine similarity over time, mean over features and items.

    0.3133 for equal features, 0.6931 for orthogonal ones. Items with fewer than two masked frames
    are left out; without items the loss is 0. Source: SpeechTokenizer (2308.16692), equation 2 as
    in its code; DM-Codec (2410.15017), equations 1 and 2.
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
    """Mean over frames of the L1 distance plus -log sigmoid of the cosine similarity over features.

    Source: t_axis in SpeechTokenizer's code, which follows 2212.09553.
    """
    distance = (student - teacher).abs().mean(2)
    cosine = functional.cosine_similarity(student, teacher, dim=2)
    losses = distance - cosine_weight * functional.logsigmoid(cosine)
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def pseudo_label_loss(
    logits: Float[Tensor, "B T K"], labels: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Cross-entropy of pseudo-labels in nats per frame (2308.16692, section 3.3, equation 3)."""
    losses = functional.cross_entropy(logits.mT, labels, reduction="none")
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def average_over_frames(
    features: Float[Tensor, "B t D"],
    lengths: Int[Tensor, " B"],
    rate: int | float,
    num_frames: int,
    frame_rate: int | float,
) -> Target:
    """Resamples a teacher's features from `rate` to `frame_rate` Hz (`num_frames` frames).

    Each frame gets the mean of the features that overlap with it, weighted by the overlap; the mask
    has the frames of which an item's first `lengths` features cover at least half. Items do not
    depend on padding.
    """
    count = features.shape[1]
    edges = torch.arange(count + 1, device=features.device) / rate
    overlaps = frame_overlaps(torch.stack([edges[:-1], edges[1:]], 1), num_frames, frame_rate)
    inside = torch.arange(count, device=features.device) < lengths.unsqueeze(1)
    return _weighted_mean(overlaps * inside.unsqueeze(1), features, frame_rate)


def frame_overlaps(
    spans: Float[Tensor, "W 2"], num_frames: int, frame_rate: int | float
) -> Float[Tensor, "T W"]:
    """Overlap in seconds of each frame with each span (start and end in seconds)."""
    starts = torch.arange(num_frames, device=spans.device).unsqueeze(1) / frame_rate
    stops = starts + 1 / frame_rate
    return (torch.minimum(stops, spans[:, 1]) - torch.maximum(starts, spans[:, 0])).clamp(min=0)


def word_per_frame(
    spans: Float[Tensor, "W 2"], num_frames: int, frame_rate: int | float
) -> Int[Tensor, " T"]:
    """Index of the word with the largest overlap, -1 where words cover less than half a frame."""
    if not len(spans):
        return torch.full((num_frames,), -1, device=spans.device)
    overlaps = frame_overlaps(spans, num_frames, frame_rate)
    counted = overlaps.sum(1) * frame_rate >= MIN_COVERAGE
    return torch.where(counted, overlaps.argmax(1), -1)


def word_states_over_frames(
    spans: Float[Tensor, "W 2"],
    states: Float[Tensor, "W D"],
    num_frames: int,
    frame_rate: int | float,
) -> Target:
    """Each word's state on the frames of its span, as a batch of one.

    Frames of several words get the mean, weighted by overlap; frames of which words cover less than
    half (pauses) are not in the mask.
    """
    overlaps = frame_overlaps(spans, num_frames, frame_rate)
    return _weighted_mean(overlaps.unsqueeze(0), states.unsqueeze(0), frame_rate)


def _weighted_mean(
    overlaps: Float[Tensor, "B T N"], values: Float[Tensor, "B N D"], frame_rate: int | float
) -> Target:
    total = overlaps.sum(2, keepdim=True)
    # Frames in the mask have a total of at least half a frame: the bound only avoids 0 / 0.
    means = overlaps / total.clamp(min=0.1 / frame_rate) @ values
    return Target(means, (total * frame_rate >= MIN_COVERAGE).squeeze(2))
