"""How the semantic codebook of a codec with Whisper's encoder learns: to hold what is said.

From its entries alone a small network must spell the transcript (CTC; supervised semantic tokens,
CosyVoice, arXiv 2407.05407, section 2.1) and tell Whisper's features, which keeps in the codes what
no transcript says.
"""

import logging
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from codec.layers import ConvNeXtBlock, ceil_div, length_mask
from codec.model import Codec
from codec.quantize import SplitVQ
from codec.whisper_encoder import KERNEL, WhisperEncoder

logger = logging.getLogger(__name__)

APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
BLANK, SPACE = 0, 1
"""CTC's blank and the end of a word; letters follow."""
STEPS = 2
"""Letters that a frame can hold, at least: fast speech has more than 20 a second."""
DEPTH = 2
"""ConvNeXt blocks of the reader."""


def letters_of(texts: Sequence[str]) -> str:
    """The letters of transcripts, sorted: what is read is spelt in them."""
    found = set().union(*(set(_plain(text)) for text in texts))
    return "".join(sorted(letter for letter in found - {" "} if not letter.isnumeric()))


def spell(text: str, letters: str) -> list[int] | None:
    """Labels of a transcript, from 1 on; None where it says nothing, or has what cannot be spelt,
    such as a digit: nobody knows how it was read."""
    words = _plain(text)
    if not words or any(letter.isnumeric() or letter not in letters + " " for letter in words):
        return None
    return [SPACE if letter == " " else letters.index(letter) + 2 for letter in words]


def _plain(text: str) -> str:
    """In small letters, without punctuation; apostrophes are letters, hyphens end words."""
    small = unicodedata.normalize("NFC", text.lower().replace(APOSTROPHE, "'"))
    kept = [
        letter if letter == "'" or unicodedata.category(letter)[0] in "LMN" else " "
        for letter in small
    ]
    return " ".join("".join(kept).split())


class Spoken(NamedTuple):
    """A batch of whole recordings and their transcripts."""

    wave: Float[Tensor, "B 1 S"]
    lengths: Int[Tensor, " B"]
    labels: Int[Tensor, "B N"]
    """Behind an item's end: BLANK."""


class Told(NamedTuple):
    """What the reader makes of a batch."""

    letters: Float[Tensor, "B T L"]
    """Log probabilities, STEPS a frame."""
    features: Float[Tensor, ""]
    """Mean squared error of Whisper's features, each normalised over its frame."""
    commitment: Float[Tensor, ""]
    codes: Int[Tensor, " N"]
    """Of all frames that are no padding."""


class SemanticStudent(nn.Module):
    """The semantic encoder and codebook of a codec, and the reader that teaches them."""

    def __init__(self, codec: Codec, num_letters: int) -> None:
        super().__init__()
        encoder, quantizer = codec.encoder.semantic, codec.quantizer
        if not isinstance(encoder, WhisperEncoder) or not isinstance(quantizer, SplitVQ):
            raise ValueError("the semantic codebook is trained so where lmspt.semantic is whisper")
        self.encoder, self.quantizer = encoder, quantizer.semantic
        width, dimension = codec.config.lmspt.whisper.adapter_width, codec.latent_dimension
        self.embed = nn.Conv1d(dimension, width, 1)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(width, kernel=KERNEL, scale=1 / DEPTH) for _ in range(DEPTH)
        )
        self.tell = nn.Conv1d(width, encoder.embed.in_channels, 1)
        self.widen = nn.Conv1d(width, STEPS * width, 1)
        self.fine = ConvNeXtBlock(width, kernel=KERNEL, scale=1.0)
        self.letters = nn.Linear(width, num_letters + 2)

    def forward(self, batch: Spoken) -> Told:
        frames = ceil_div(batch.lengths, self.encoder.hop_length)
        features = self.encoder.features(batch.wave, batch.lengths)
        mask = length_mask(frames, features.shape[-1])
        inside = mask[:, 0].bool()
        latent = self.encoder.adapt(features, mask)
        # Padding is no speech: the codebook must not learn from it.
        taken = latent.mT[inside].mT[None]
        quantized = self.quantizer(taken)
        entries = latent.new_zeros(latent.mT.shape, dtype=quantized.latent.dtype)
        entries[inside] = quantized.latent[0].mT
        x = self.embed(entries.mT)
        for block in self.blocks:
            x = block(x, mask)
        target = functional.layer_norm(features.mT, features.shape[1:2])[inside]
        told = functional.mse_loss(self.tell(x).mT[inside].float(), target)
        fine = rearrange(self.widen(x), "b (s c) t -> b c (t s)", s=STEPS)
        fine = self.fine(fine, mask.repeat_interleave(STEPS, dim=-1))
        letters = self.letters(fine.mT).float().log_softmax(-1)
        return Told(letters, told, quantized.commitment, quantized.codes[0, 0])


def spelling_loss(told: Told, batch: Spoken, hop_length: int) -> Float[Tensor, " B"]:
    """CTC's negative log-likelihood of each transcript, in nats; 0 for one too long to be said."""
    frames = STEPS * ceil_div(batch.lengths, hop_length)
    counts = (batch.labels != BLANK).sum(1)
    return functional.ctc_loss(
        told.letters.transpose(0, 1), batch.labels, frames, counts,
        blank=BLANK, reduction="none", zero_infinity=True,
    )  # fmt: skip


def read(told: Told, lengths: Int[Tensor, " B"], hop_length: int) -> list[list[int]]:
    """The likeliest label of each step, without repetitions and blanks."""
    counts = (STEPS * ceil_div(lengths, hop_length)).tolist()
    best = told.letters.argmax(-1)
    rows = (row[:count].unique_consecutive() for row, count in zip(best, counts, strict=True))
    return [row[row != BLANK].tolist() for row in rows]
