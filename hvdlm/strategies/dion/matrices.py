"""By how many vectors Dion approximates the momentum of a matrix."""

from __future__ import annotations

import math

from hvdlm.config import ModelSection, OptimizerSection


def matrix_rank(optimizer: OptimizerSection, model: ModelSection) -> int:
    """Vectors on either side of every matrix; a matrix with fewer rows or columns uses as many as it has."""
    rank = optimizer.dion_rank
    return int(rank) if rank >= 1 else math.ceil(rank * model.width)
