"""Speech codecs: recordings to discrete codes and back.

Dimensions, the same in all packages: B batch, S samples, T frames, C channels, D features,
Q codebooks, K codebook entries, L token positions, V vocabulary, H heads.

Words: `wave` (B,1,S) float in [-1, 1]; `latent` (B,D,T); `quantized` (B,D,T); `codes` (B,Q,T) int64
codec indices, index 0 being the semantic codebook ("codebook 1" in prose); `tokens` (B,L)
vocabulary ids; `logits`; `lengths` (B,).

The names below are imported on first use, so `codec.tokens` and `codec.io` need no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codec.audio import read_audio, write_audio
    from codec.config import CodecConfig
    from codec.models.base import Codes, SpeechCodec
    from codec.models.codec import Codec, load_codec

__all__ = [
    "Codec", "CodecConfig", "Codes", "SpeechCodec", "load_codec", "read_audio", "write_audio",
]  # fmt: skip

_HOMES = {
    "Codec": "codec.models.codec",
    "CodecConfig": "codec.config",
    "Codes": "codec.models.base",
    "SpeechCodec": "codec.models.base",
    "load_codec": "codec.models.codec",
    "read_audio": "codec.audio",
    "write_audio": "codec.audio",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'codec' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
