"""How the semantic codebook of a codec with Whisper's encoder learns: to hold what is said.

From its entries alone a small network must spell the transcript (CTC; supervised semantic tokens,
CosyVoice, arXiv 2407.05407, section 2.1) and tell Whisper's features, which keeps in the codes what
no transcript says.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from codec.distillation.ctc_reader import BLANK, STEPS, Reader
from codec.models.codec import Codec
from codec.modules.layers import ceil_div, length_mask
from codec.modules.quantize import SplitVQ
from codec.modules.ssl_encoders import WhisperEncoder


class Spoken(NamedTuple):
    """A batch of whole recordings and their transcripts."""

    wave: Float[Tensor, "B 1 S"]
    lengths: Int[Tensor, " B"]
    labels: Int[Tensor, "B N"]
    """Behind an item's end: BLANK."""


class Told(NamedTuple):
    """What the reader makes of a batch."""

    letters: Float[Tensor, "B N V"]
    """Log probabilities of the labels, N = STEPS * T."""
    features: Float[Tensor, ""]
    """Mean squared error of Whisper's features, each normalised over its frame."""
    commitment: Float[Tensor, ""]
    codes: Int[Tensor, " N"]
    """Of all frames that are no padding."""


class SemanticStudent(nn.Module):
    """The semantic encoder and codebook of a codec, and the reader that teaches them."""

    groups = ("letters", "features")

    def __init__(self, codec: Codec, letters: str) -> None:
        super().__init__()
        encoder, quantizer = codec.encoder.semantic, codec.quantizer
        if not isinstance(encoder, WhisperEncoder) or not isinstance(quantizer, SplitVQ):
            raise ValueError("the semantic codebook is trained so where lmspt.semantic is whisper")
        self.encoder, self.quantizer = encoder, quantizer.semantic
        width = codec.config.lmspt.whisper.adapter_width
        self.reader = Reader(codec.latent_dimension, width, letters)
        self.tell = nn.Conv1d(width, encoder.embed.in_channels, 1)

    def forward(self, batch: Spoken) -> Told:
        """In training Whisper hears each item twice, at two places in its 30 s: the codes of one
        must tell the features of the other, so that they do not hold the place."""
        frames = ceil_div(batch.lengths, self.encoder.hop_length)
        if self.training:
            features, wanted = (self._somewhere(batch) for _ in range(2))
        else:
            features = wanted = self.encoder.features(batch.wave, batch.lengths)
        mask = length_mask(frames, features.shape[-1])
        inside = mask[:, 0].bool()
        latent = self.encoder.adapt(features, mask)
        # Padding is no speech: the codebook must not learn from it.
        quantized = self.quantizer(latent.mT[inside].mT[None])
        entries = latent.new_zeros(latent.mT.shape, dtype=quantized.latent.dtype)
        entries[inside] = quantized.latent[0].mT
        letters, states = self.reader(entries.mT, mask)
        target = functional.layer_norm(wanted.mT, wanted.shape[1:2])[inside]
        told = functional.mse_loss(self.tell(states).mT[inside].float(), target)
        return Told(letters, told, quantized.commitment, quantized.codes[0, 0])

    def _somewhere(self, batch: Spoken) -> Float[Tensor, "B F T"]:
        with self.encoder.shifted(batch.lengths):
            return self.encoder.features(batch.wave, batch.lengths)


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
