"""Computes with other parameters than those that a rank trains, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from hvdlm.model.transformer import Transformer


@contextmanager
def parameters_replaced(model: Transformer, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context `model` computes with `parameters`, by name."""
    own = dict(model.named_parameters())
    kept = {name: parameter.data for name, parameter in own.items()}
    for name, parameter in parameters.items():
        own[name].data = parameter.data
    model.update_low_precision_weights()
    try:
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = kept[name]
        model.update_low_precision_weights()
