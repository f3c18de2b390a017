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
    """Layer norm whose scale and shift depend on the stage."""

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Linear(width, 2 * width)

    def forward(
        self, hidden: Float[Tensor, "B L D"], condition: Float[Tensor, " D"]
    ) -> Float[Tensor, "B L D"]:
        scale, shift = self.project(condition).chunk(2)
        return functional.layer_norm(hidden, hidden.shape[-1:]) * (1 + scale) + shift


class Nearby(nn.Module):
    """A depthwise convolution over text and speech apart, which knows no padding."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.norm = AdaptiveNorm(width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(
        self, hidden: Float[Tensor, "B L D"], valid: Bool[Tensor, "B L"],
        condition: Float[Tensor, " D"], num_text: int,
    ) -> Float[Tensor, "B L D"]:  # fmt: skip
        x = (self.norm(hidden, condition) * valid[..., None]).mT
        parts = (x[..., :num_text], x[..., num_text:])
        return torch.cat([self.depthwise(part) for part in parts], dim=-1).mT


class Layer(nn.Module):
    """Pre-norm: a convolution if asked for, attention to valid positions, a feed-forward part."""

    def __init__(
        self, *, width: int, num_heads: int, feedforward: int, dropout: float, kernel: int = 0
    ):
        super().__init__()
        self.nearby = Nearby(width, kernel) if kernel else None
        self.num_heads = num_heads
        self.attention_norm = AdaptiveNorm(width)
        self.feedforward_norm = AdaptiveNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"],
        condition: Float[Tensor, " D"],
        num_text: int,
    ) -> Float[Tensor, "B L D"]:
        """`num_text`: positions of text, in front of those of speech."""
        if self.nearby is not None:
            hidden = hidden + self.dropout(self.nearby(hidden, valid, condition, num_text))
        projected = self.query_key_value(self.attention_norm(hidden, condition))
        query, key, value = rearrange(
            projected, "b l (n h d) -> n b h l d", n=3, h=self.num_heads
        ).unbind()
        attended = attend(query, key, value, valid[:, None, None])
        hidden = hidden + self.dropout(self.output(rearrange(attended, "b h l d -> b l (h d)")))
        inner = functional.gelu(self.expand(self.feedforward_norm(hidden, condition)))
        return hidden + self.dropout(self.contract(self.dropout(inner)))


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
