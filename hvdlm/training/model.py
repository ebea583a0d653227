"""The model of a run as training begins: initialised, on its device, in its precision, compiled if so wished."""

from __future__ import annotations

import torch

from hvdlm.config import Config
from hvdlm.model.transformer import Transformer
from hvdlm.training.precision import DTYPES


def make_model(config: Config, vocab_size: int, device: torch.device) -> Transformer:
    """The same on every rank. What is to be compiled is compiled when it is first used."""
    model = Transformer(config.model, vocab_size)
    model.initialise(config.train.seed)
    model.to(device)
    model.compute_in(DTYPES[config.train.precision])
    model.recompute = config.train.recompute
    if config.train.compile:
        for block in model.blocks:  # one compiled backward for all would deliver all gradients at its end
            block.compile()
    return model
