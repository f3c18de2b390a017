"""What the NAR is made of, and how its labels are shared among codes that sound alike."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from slm.attention import attend

HALVINGS = 40
"""Steps of the search for a temperature."""


class StageHead(nn.Module):
    """One table for the heads of all codebooks; a call computes the logits of some of its rows."""

    def __init__(self, width: int, num_rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width).normal_(std=width**-0.5))

    def forward(self, hidden: Float[Tensor, "N D"], rows: slice) -> Float[Tensor, "N K"]:
        return functional.linear(hidden, self.weight[rows])


class AdaptiveNorm(nn.Module):
    """Layer norm with a scale and a shift for each stage. Weight decay pulls to a plain one."""

    def __init__(self, width: int, num_stages: int):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(num_stages, width))
        self.shift = nn.Parameter(torch.zeros(num_stages, width))

    def forward(self, hidden: Float[Tensor, "B L D"], stage: int) -> Float[Tensor, "B L D"]:
        normed = functional.layer_norm(hidden, hidden.shape[-1:])
        return normed * (1 + self.scale[stage]) + self.shift[stage]


class Nearby(nn.Module):
    """A depthwise convolution over text and speech apart, which knows no padding."""

    def __init__(self, width: int, kernel: int, num_stages: int):
        super().__init__()
        self.norm = AdaptiveNorm(width, num_stages)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(
        self, hidden: Float[Tensor, "B L D"], valid: Bool[Tensor, "B L"],
        stage: int, num_text: int,
    ) -> Float[Tensor, "B L D"]:  # fmt: skip
        x = (self.norm(hidden, stage) * valid[..., None]).mT
        parts = x.split([num_text, x.shape[-1] - num_text], dim=-1) if num_text else [x]
        return torch.cat([self.depthwise(part) for part in parts], dim=-1).mT


class Layer(nn.Module):
    """Pre-norm: a convolution if asked for, attention to valid positions, a feed-forward part."""

    def __init__(
        self, *, width: int, num_heads: int, feedforward: int, dropout: float, num_stages: int,
        kernel: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.nearby = Nearby(width, kernel, num_stages) if kernel else None
        self.num_heads = num_heads
        self.attention_norm = AdaptiveNorm(width, num_stages)
        self.feedforward_norm = AdaptiveNorm(width, num_stages)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"],
        stage: int,
        num_text: int,
    ) -> Float[Tensor, "B L D"]:
        """`num_text`: positions of text, in front of those of speech."""
        if self.nearby is not None:
            hidden = hidden + self.dropout(self.nearby(hidden, valid, stage, num_text))
        projected = self.query_key_value(self.attention_norm(hidden, stage))
        query, key, value = rearrange(
            projected, "b l (n h d) -> n b h l d", n=3, h=self.num_heads
        ).unbind()
        attended = attend(query, key, value, valid[:, None, None])
        hidden = hidden + self.dropout(self.output(rearrange(attended, "b h l d -> b l (h d)")))
        inner = functional.gelu(self.expand(self.feedforward_norm(hidden, stage)))
        return hidden + self.dropout(self.contract(self.dropout(inner)))


class Reference(nn.Module):
    """What the prompt's frames have above that sound alike below.

    Voice conversion by nearest neighbours (kNN-VC, arXiv 2305.18975) takes a speaker's own frames
    for those that say the same; here by attention, whose query and key are one projection, so
    that like finds like from the first step on.
    """

    def __init__(self, *, width: int, num_heads: int, kernel: int, num_stages: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = AdaptiveNorm(width, num_stages)
        self.nearby = Nearby(width, kernel, num_stages) if kernel else None
        self.place = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    @torch.no_grad()
    def begin(self) -> None:
        """As strong as what comes in: an attention that tells frames apart, and is heard."""
        for linear in (self.place, self.value, self.output):
            linear.weight.normal_(std=linear.in_features**-0.5)

    def forward(
        self, below: Float[Tensor, "B T D"], above: Float[Tensor, "B T D"],
        valid: Bool[Tensor, "B T"], prompt: Bool[Tensor, "B T"], stage: int,
    ) -> Float[Tensor, "B T D"]:  # fmt: skip
        """From the embeddings of codebooks below the stage, of all `valid` frames, and of the other
        codebooks, of the `prompt`'s; where that is empty, next to nothing."""
        if self.nearby is not None:
            below = below + self.nearby(below, valid, stage, 0)
        # A frame in front, of zeros, for those that find nothing like them.
        place, value, reached = (
            functional.pad(part, (0, 0, 1, 0), value=fill)
            for part, fill in (
                (self.place(self.norm(below, stage)), 0),
                (self.value(above), 0),
                (prompt[..., None], True),
            )
        )
        place, value = (
            rearrange(part, "b l (h d) -> b h l d", h=self.num_heads) for part in (place, value)
        )
        attended = attend(place, place, value, reached[:, None, None, :, 0])
        return self.output(rearrange(attended, "b h l d -> b l (h d)")[:, 1:])


@torch.no_grad()
def shares_of_neighbours(entries: Float[Tensor, "K E"], wanted: float) -> Float[Tensor, "K K"]:
    """Row k: how the label k is shared among all entries, by a Gaussian of their distance whose
    width is one for the codebook, so that the shares' perplexity is `wanted` on average."""
    distances = torch.cdist(entries, entries).square()
    scale = distances.mean().clamp(min=1e-12)
    low, high = 1e-6, 10.0
    shares = torch.eye(len(entries))
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        shares = (-distances / (scale * middle)).softmax(dim=1)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum(1).mean()
        low, high = (middle, high) if float(entropy.exp()) < wanted else (low, middle)
    return shares
