"""The learning rate of every step: linear warm-up, then one of several ways down."""

from __future__ import annotations

import math

from hvdlm.config import OptimizerSection

RANGE = 1e5  # of a range test: its last rate over the first


def learning_rate(step: int, steps: int, settings: OptimizerSection) -> float:
    """Learning rate of `step` (0 .. steps-1); a pure function, so that resuming needs no state.

    Warm-up rises linearly and reaches `lr` on its last step. "cosine" then falls along half a cosine to
    `final_lr_ratio * lr` on the last step (Loshchilov & Hutter, "SGDR", ICLR 2017, equation 5, without restarts).
    "wsd" stays at `lr` and falls linearly to the same end over the last `decay_steps` (Hu et al., "MiniCPM", 2024,
    section 4), "linear" over all of them. "inverse_sqrt" falls as 1 / sqrt(step), from `lr` at the end of the warm-up,
    whatever `steps` is (Vaswani et al. 2017, arXiv:1706.03762, equation 3), but not below the same end.

    "range_test" has no warm-up: it rises exponentially through RANGE, to `lr` on the last step (Smith 2017,
    arXiv:1506.01186, section 3.3, where it rises linearly).
    """
    if settings.schedule == "range_test":
        return settings.lr * math.pow(RANGE, (step + 1) / steps - 1)
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    final = settings.lr * settings.final_lr_ratio
    if settings.schedule == "cosine":
        progress = _progress(step, settings.warmup_steps, steps)
        return final + (settings.lr - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "inverse_sqrt":
        return max(final, settings.lr * math.sqrt(max(1, settings.warmup_steps) / (step + 1)))
    if settings.schedule == "linear":
        return settings.lr + (final - settings.lr) * _progress(step, settings.warmup_steps, steps)
    decay_steps = settings.decay_steps or min(max(1, steps // 5), steps - settings.warmup_steps)
    return settings.lr + (final - settings.lr) * _progress(step, steps - decay_steps, steps)


def _progress(step: int, begin: int, end: int) -> float:
    """How far `step` has come on the way from `begin` (0) to the last step before `end` (1)."""
    return min(1.0, max(0.0, (step - begin + 1) / max(1, end - begin)))
