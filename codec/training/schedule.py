"""The learning-rate schedule, a pure function of the step: a resumed run needs no state of it."""

import math

from codec.training.config import OptimConfig


def learning_rate(step: int, config: OptimConfig, peak: float | None = None) -> float:
    """The learning rate of the update number `step` + 1: linear warm-up, then cosine or decay.

    Args:
        peak: the rate after the warm-up; None: `config.lr`.
    """
    peak = config.lr if peak is None else peak
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "decay":
        return peak * config.decay ** ((step - config.warmup_steps) // config.decay_steps)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (config.final_lr_share + (1 - config.final_lr_share) * cosine)
