"""Codecs in half precision, as they ship: half the size on disk, computed with as before.

Rounding changes some codes: it makes another codec, with another digest, to export tokens with.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from codec.folder import SUMS, WEIGHTS_FILE, written_together
from codec.model import Codec

KEPT = ("cluster_size", "num_updates")
"""Small tensors that count, and are no weights."""


def halve(codec: Codec) -> Codec:
    """Rounds every weight to what float16 can hold, in place. Raises ValueError for a codec that
    was folded for inference, and one whose weights float16 cannot hold."""
    if codec.is_folded:
        raise ValueError(f"{codec.source}: folded; load it with Codec.from_pretrained")
    state = codec.state_dict()
    for name, tensor in state.items():
        if _is_weight(name, tensor):
            rounded = tensor.half().to(tensor.dtype)
            if not bool(rounded.isfinite().all()):
                raise ValueError(f"{codec.source}: {name} is too large for float16")
            state[name] = rounded
    for name in state:
        if name.endswith(SUMS):
            state[name] = _sums(state, name)
    codec.load_state_dict(state)
    return codec


def is_half(codec: Codec) -> bool:
    """Whether float16 holds the codec as it is."""
    state = codec.state_dict()
    for name, tensor in state.items():
        if _is_weight(name, tensor) and not torch.equal(tensor.half().to(tensor.dtype), tensor):
            return False
        if name.endswith(SUMS) and not torch.equal(tensor, _sums(state, name)):
            return False
    return True


def save_half(codec: Codec, folder: str | Path) -> None:
    """Writes a halved codec's folder; sums of moving averages are left out, as they follow from
    the entries."""
    if not is_half(codec):
        raise ValueError("the codec holds more than half precision: halve it first")
    with written_together(Path(folder)) as temporary:
        codec.save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)
        state = {
            name: (tensor.half() if _is_weight(name, tensor) else tensor).contiguous()
            for name, tensor in codec.state_dict().items()
            if not name.endswith(SUMS)
        }
        save_file(state, temporary / WEIGHTS_FILE, metadata={"format": "pt"})


def _is_weight(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not name.endswith((*KEPT, SUMS))


def _sums(state: dict[str, Tensor], name: str) -> Tensor:
    stem = name.removesuffix(SUMS)
    return state[f"{stem}entries"] * state[f"{stem}cluster_size"][:, None]
