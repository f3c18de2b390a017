"""Kokoro-82M: synthetic English speech of many voices from phonemes, on a CPU.

`recipes/offline_models.py kokoro-82m` makes its folder: model.onnx, config.json (symbol ids) and
styles.safetensors (a table of style vectors for each voice, row n for a text of n symbols).
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

SAMPLE_RATE = 24_000
MAX_SYMBOLS = 509
"""Maximum length of a text; style tables have no more rows."""
COMPONENTS = 20
"""Number of principal components of new voices."""

# espeak-ng's phonemes, with affricates and diphthongs tied by "^", to the symbols of the training
# data: those of misaki's espeak fallback for American English.
_SYMBOLS = {
    "a^\u026a": "I", "a^\u028a": "W", "e^\u026a": "A", "o^\u028a": "O", "\u0259^\u028a": "Q",
    "\u0254^\u026a": "Y", "d^\u0292": "\u02a4", "t^\u0283": "\u02a7", "\u0259^l": "\u1d4al",
    "\u025a": "\u0259\u0279", "\u025c\u02d0\u0279": "\u025c\u0279", "\u025c\u02d0": "\u025c\u0279",
    "\u026a^\u0259": "i\u0259", "\u0294n": "t\u1d4an", "\u0294": "t", "r": "\u0279", "x": "k",
    "\u00e7": "k", "\u0250": "\u0259", "\u026c": "l", "g": "\u0261", "e": "A", "\u02d0": "",
    "\u0303": "", "\u0329": "", "^": "",
}  # fmt: skip


def symbols_of(phonemes: str) -> str:
    """Returns espeak-ng's American English phonemes, tied by "^", in the model's symbols."""
    for sound in sorted(_SYMBOLS, key=len, reverse=True):
        phonemes = phonemes.replace(sound, _SYMBOLS[sound])
    return phonemes


class Kokoro:
    """Synthesizes texts one by one on one thread."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError if a file of the folder is missing or invalid."""
        self.folder = Path(folder)
        try:
            self._ids = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            self.styles = load_file(self.folder / "styles.safetensors")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder}: no valid Kokoro ({error}); python recipes/offline_models.py kokoro-82m "
                "makes models/kokoro-82m"
            ) from error

    @cached_property
    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return onnxruntime.InferenceSession(
            self.folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def synthesize(
        self, phonemes: str, style: Float[np.ndarray, "N 256"], speed: float = 1.0
    ) -> Float[np.ndarray, " S"]:
        """Returns a wave at SAMPLE_RATE.

        Args:
            style: table of the voice.
            speed: 1: normal; higher is faster.

        Raises:
            ValueError: the text has no symbols, or too many.
        """
        ids = [self._ids[one] for one in symbols_of(phonemes) if one in self._ids]
        if not 0 < len(ids) <= MAX_SYMBOLS:
            raise ValueError(f"{len(ids)} symbols cannot be synthesized, only 1 to {MAX_SYMBOLS}")
        inputs = {
            "tokens": np.array([[0, *ids, 0]], dtype=np.int64),
            "style": style[len(ids)][None].astype(np.float32),
            "speed": np.array([speed], dtype=np.float32),
        }
        (wave,) = self._session.run(None, inputs)
        return np.asarray(wave, dtype=np.float32).reshape(-1)


def draw_styles(
    styles: dict[str, Float[np.ndarray, "N 256"]], number: int, seed: int
) -> dict[str, Float[np.ndarray, "N 256"]]:
    """Returns new voices, normally distributed along the principal components of the given ones."""
    names, random = sorted(styles), np.random.default_rng((seed, 1))
    table = np.stack([styles[name].reshape(-1) for name in names]).astype(np.float64)
    mean = table.mean(0)
    u, values, directions = np.linalg.svd(table - mean, full_matrices=False)
    kept = min(COMPONENTS, len(names) - 1)
    spread = (u[:, :kept] * values[:kept]).std(0)
    made = {}
    for index in range(number):
        flat = mean + (random.normal(size=kept) * spread) @ directions[:kept]
        made[f"drawn-{index:04d}"] = flat.reshape(styles[names[0]].shape).astype(np.float32)
    return made
