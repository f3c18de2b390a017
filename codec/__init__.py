"""Speech codecs: recordings to discrete codes and back.

Dimensions, everywhere in this project: B batch, S samples, T frames, C channels, D features,
Q codebooks, K codebook entries, L token positions, V vocabulary, H heads.
`wave` (B,1,S) in [-1,1], `latent` and `quantized` (B,D,T), `codes` (B,Q,T), `lengths` (B,).
"""

from codec.audio import read_audio, write_audio
from codec.config import CodecConfig
from codec.models.base import Codes, SpeechCodec
from codec.models.codec import Codec, load_codec

__all__ = [
    "Codec", "CodecConfig", "Codes", "SpeechCodec", "load_codec", "read_audio", "write_audio",
]  # fmt: skip
