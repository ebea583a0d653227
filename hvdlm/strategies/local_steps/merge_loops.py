"""The end of a round on a CPU, compiled by Numba: one pass over memory, which is what a round costs there.

The operations are those of outer_optimizer.py and fragment.py, number by number; each of these passes over two or three
arrays that no cache holds.
"""

from __future__ import annotations

import numpy as np

from hvdlm.gradients.codecs.compiled import compiled


@compiled()
def step_and_merge(
    differences: np.ndarray,
    factor: np.float32,
    lr: np.float32,
    momentum: np.float32,
    alpha: np.float32,
    velocity: np.ndarray,
    sent: np.ndarray,
    outer: np.ndarray,
    local: np.ndarray,
) -> None:
    """Moves `outer` along `factor` x `differences`, and merges it into `local`. All float32, of one length, but:

    `velocity` is empty without momentum; `sent` is empty unless `local` keeps the steps made since the round began.
    Without it `alpha` is the share that `local` keeps of itself.
    """
    for index in range(len(local)):
        step = np.float32(differences[index] * factor)
        if len(velocity):
            velocity[index] = np.float32(np.float32(velocity[index] * momentum) + step)
            step = np.float32(step + np.float32(velocity[index] * momentum))
        moved = np.float32(outer[index] + np.float32(step * lr))
        outer[index] = moved
        if len(sent):
            local[index] += np.float32(moved - sent[index])
        elif alpha:
            local[index] = np.float32(moved + np.float32(np.float32(local[index] - moved) * alpha))
        else:
            local[index] = moved
