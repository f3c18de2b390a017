"""ASR supervision of the semantic codebook of a codec with Whisper's encoder.

A small network predicts from the codebook's entries alone the transcript (CTC; compare CosyVoice's
supervised semantic tokens, arXiv 2407.05407, section 2.1) and Whisper's features, so that the codes
keep what a transcript does not contain.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from codec.distillation.ctc_reader import BLANK, STEPS, RecognizerNetwork
from codec.models.codec import Codec
from codec.modules.layers import ceil_div, length_mask
from codec.modules.quantize import SplitVQ
from codec.modules.ssl_encoders import WhisperEncoder


class TranscribedBatch(NamedTuple):
    """A padded batch of recordings and their transcripts."""

    wave: Float[Tensor, "B 1 S"]
    lengths: Int[Tensor, " B"]
    labels: Int[Tensor, "B N"]
    """Padded with BLANK."""


class SemanticOutput(NamedTuple):
    """Predictions and losses of a batch."""

    letters: Float[Tensor, "B N V"]
    """Log probabilities of the CTC labels, N = STEPS * T."""
    features: Float[Tensor, ""]
    """Mean squared error of the prediction of Whisper's features, layer-normalized per frame."""
    commitment: Float[Tensor, ""]
    codes: Int[Tensor, " N"]
    """Of all frames without padding."""


class SemanticStudent(nn.Module):
    """The semantic encoder and codebook of a codec, and the network that supervises them.

    Raises:
        ValueError: the codec's semantic encoder is not Whisper's.
    """

    groups = ("letters", "features")

    def __init__(self, codec: Codec, letters: str) -> None:
        super().__init__()
        encoder, quantizer = codec.encoder.semantic, codec.quantizer
        if not isinstance(encoder, WhisperEncoder) or not isinstance(quantizer, SplitVQ):
            raise ValueError("supervision of the semantic codebook needs lmspt.semantic whisper")
        self.encoder, self.quantizer = encoder, quantizer.semantic
        width = codec.config.lmspt.whisper.adapter_width
        self.reader = RecognizerNetwork(codec.latent_dimension, width, letters)
        self.tell = nn.Conv1d(width, encoder.embed.in_channels, 1)

    def forward(self, batch: TranscribedBatch) -> SemanticOutput:
        """In training Whisper encodes each item twice, at two random positions in its 30 s window:
        the codes of one pass predict the features of the other, so they do not encode the position.
        """
        frames = ceil_div(batch.lengths, self.encoder.hop_length)
        if self.training:
            features, target = (self._at_random_offset(batch) for _ in range(2))
        else:
            features = target = self.encoder.features(batch.wave, batch.lengths)
        mask = length_mask(frames, features.shape[-1])
        inside = mask[:, 0].bool()
        latent = self.encoder.adapt(features, mask)
        # Padding must not enter the codebook's moving averages.
        quantized = self.quantizer(latent.mT[inside].mT[None])
        entries = latent.new_zeros(latent.mT.shape, dtype=quantized.latent.dtype)
        entries[inside] = quantized.latent[0].mT
        letters, states = self.reader(entries.mT, mask)
        target = functional.layer_norm(target.mT, target.shape[1:2])[inside]
        error = functional.mse_loss(self.tell(states).mT[inside].float(), target)
        return SemanticOutput(letters, error, quantized.commitment, quantized.codes[0, 0])

    def _at_random_offset(self, batch: TranscribedBatch) -> Float[Tensor, "B F T"]:
        offsets = self.encoder.random_offsets(batch.lengths)
        return self.encoder.features(batch.wave, batch.lengths, offsets)


def transcript_nll(
    output: SemanticOutput, batch: TranscribedBatch, hop_length: int
) -> Float[Tensor, " B"]:
    """Negative log-likelihood (CTC) of each transcript in nats; 0 if it has more labels than steps.

    Args:
        hop_length: samples per frame of the codec.
    """
    frames = STEPS * ceil_div(batch.lengths, hop_length)
    counts = (batch.labels != BLANK).sum(1)
    return functional.ctc_loss(
        output.letters.transpose(0, 1), batch.labels, frames, counts,
        blank=BLANK, reduction="none", zero_infinity=True,
    )  # fmt: skip


def greedy_labels(
    output: SemanticOutput, lengths: Int[Tensor, " B"], hop_length: int
) -> list[list[int]]:
    """Labels of each item by greedy CTC decoding.

    Args:
        lengths: samples of each item without padding.
        hop_length: samples per frame of the codec.
    """
    counts = (STEPS * ceil_div(lengths, hop_length)).tolist()
    best = output.letters.argmax(-1)
    rows = (row[:count].unique_consecutive() for row, count in zip(best, counts, strict=True))
    return [row[row != BLANK].tolist() for row in rows]
