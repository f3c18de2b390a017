"""The speech language model: a pretrained text LLM with speech tokens (AR), and a NAR.

`SpeechLM` (codebook 1, autoregressive), `NAR` (codebooks 2..Q), `Voice` (both and the codec) with
`Prompt` and `SamplingConfig`, and `export` (to a plain causal LM) are loaded on first use, so that
importing `slm` stays light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm.config import SamplingConfig
    from slm.data.prompts import Prompt
    from slm.export.causal_lm import export
    from slm.models.ar import SpeechLM
    from slm.models.nar import NAR
    from slm.voice import Voice

__all__ = ["NAR", "Prompt", "SamplingConfig", "SpeechLM", "Voice", "export"]

_HOMES = {
    "NAR": "slm.models.nar",
    "Prompt": "slm.data.prompts",
    "SamplingConfig": "slm.config",
    "SpeechLM": "slm.models.ar",
    "Voice": "slm.voice",
    "export": "slm.export.causal_lm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
