"""Whether contestants have trained the same model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.utils import parameters_to_vector

from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.model.transformer import Transformer

# Of the way that the reference has gone: what the rounding of 16-bit numbers may put between two contestants.
TOLERANCE = 0.1


def apart(own: Path, reference: Path, config: Config) -> float:
    """How far two contestants' parameters are apart after equal steps, over how far the reference has moved."""
    begin = Transformer(config.model, DataSet(Path(config.data.path)).vocab_size)
    begin.initialise(config.train.seed)
    start = parameters_to_vector(begin.parameters()).detach()
    mine, theirs = torch.load(own), torch.load(reference)
    return float((mine - theirs).norm() / (theirs - start).norm())
