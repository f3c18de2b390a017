"""The speech language model: a pretrained text LLM that gains speech, and the NAR that fills it in.

`SpeechLM` (codebook 1, autoregressive), `NAR` (codebooks 2..Q) and `Voice` (both and the codec) are
loaded on first use, so that importing `slm` stays light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm.ar import SpeechLM
    from slm.nar import NAR
    from slm.pipeline import Voice

__all__ = ["NAR", "SpeechLM", "Voice"]

_HOMES = {"SpeechLM": "slm.ar", "NAR": "slm.nar", "Voice": "slm.pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
