"""Share of codes that stay after a change of the recording that keeps its content.

The caller changes waves (noise, gain, resampling, a shift) and encodes them.
"""

import numpy as np
from jaxtyping import Float, Integer


def unchanged_codes(
    original: Integer[np.ndarray, "Q T"], changed: Integer[np.ndarray, "R U"]
) -> Float[np.ndarray, " Q"]:
    """Returns the share of frames whose code is the same, for each codebook.

    Frame t is compared with frame t, over the frames that both have. So a shift must be shorter
    than half a frame: then frame t is the nearest on the frame grid.

    Raises:
        ValueError: the numbers of codebooks differ, or there is no frame.
    """
    if len(original) != len(changed):
        raise ValueError(f"codes of {len(original)} and of {len(changed)} codebooks")
    num_frames = min(original.shape[1], changed.shape[1])
    if not num_frames:
        raise ValueError("codes without a frame")
    return (original[:, :num_frames] == changed[:, :num_frames]).mean(1)
