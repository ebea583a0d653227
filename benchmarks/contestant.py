"""What takes part in a comparison: one way to train one model, ready for its next step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hvdlm.model.transformer import Transformer


@dataclass(frozen=True)
class Exchange:
    """What a contestant itself tells of the gradient exchange of one step, on this rank."""

    waited_seconds: float  # between the end of the backward pass and the arrival of the last gradient
    wire_bytes: int  # sent


@dataclass(frozen=True)
class Contestant:
    """`step` trains `model` on the next global batch; hvdlm's tell what the exchange took, peers cannot."""

    model: Transformer
    step: Callable[[], Exchange | None]
