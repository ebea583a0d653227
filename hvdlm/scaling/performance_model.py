"""The performance model: what compute, codecs, links and ranks cost. `hvdlm fit` makes it, forecast.py uses it."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field, ValidationError

from hvdlm.errors import HvdlmError
from hvdlm.scaling.point import Machine, Record


class CodecCost(Record):
    """The time that a codec uses a core."""

    seconds_per_element: float = Field(ge=0, description="encoding and decoding, per number in a bucket")
    core_seconds_per_byte: float = Field(ge=0, description="sending, receiving and summing, per byte sent")


class Network(Record):
    """The network between ranks of one host, or between hosts."""

    efficiency: float = Field(gt=0, description="bytes of gradients carried, over what the link's rate allows")
    latency: float = Field(ge=0, description="seconds per hop")
    bits_per_second: float | None = Field(description="gradients carried; null: the link's rate is known")

    def bandwidth(self, link: float | None) -> float:
        """Bits/s of gradients over a link of this rate. Raises HvdlmError if no rate is known."""
        if self.bits_per_second is not None:
            return self.bits_per_second
        if link is None:
            raise HvdlmError("the rate of the link is not known: give it by --link, as in --link 100gbit")
        return link * self.efficiency


class Measured(Record):
    """The range of the measurements, beyond which forecasts are extrapolations."""

    ranks: list[int]
    links: list[float | None] = Field(description="bits/s")
    codecs: list[str]
    candidates: str | None = Field(description="of codec auto; null: not measured")
    tokens: int = Field(description="of a rank per step")
    points: int


class PerformanceModel(Record):
    """The result of `hvdlm fit`. `hvdlm predict` reads its JSON file."""

    machine: Machine
    ranks_per_host: int
    is_simulated: bool = Field(description="compute was simulated, and used no core")
    uses_gpu: bool
    channels: int = Field(alias="lanes")
    data_seconds: float
    forward_seconds_per_flop: float = Field(description="per FLOP of forward and backward pass together")
    backward_seconds_per_flop: float = Field(description="per FLOP of forward and backward pass together")
    optimizer_seconds_per_element: float
    merge_seconds_per_element: float = Field(
        0.0, description="of a round of local steps, without its codec; 0: not measured"
    )
    spread: float = Field(description="standard deviation of a rank's steps, over their mean")
    start_seconds: float = Field(description="from the start of processes to the first step, on the fewest ranks")
    start_seconds_per_rank: float
    codecs: dict[str, CodecCost]
    inside: Network | None = Field(description="between ranks of a host; null: not measured")
    between: Network | None = Field(description="between hosts; null: not measured")
    residual: float = Field(
        description="root mean square of log(predicted / measured), of held-out points if there are any"
    )
    measured: Measured


def read_model(file: Path) -> PerformanceModel:
    """Reads a file of `hvdlm fit`. Raises HvdlmError if it cannot be read or holds something else."""
    try:
        return PerformanceModel.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise HvdlmError(f"cannot read the fit {file}: {error.strerror}") from None
    except (ValidationError, UnicodeDecodeError):
        raise HvdlmError(f"{file} is no fit: make one with `hvdlm fit RESULTS --output {file}`") from None


def interval(model: PerformanceModel, ranks: int) -> float:
    """The upper bound of a forecast's 95% interval over the forecast, and the forecast over its lower bound.

    That is twice the residual of held-out points, and as much again for each doubling beyond the measured ranks, where
    the growth of the error is not known.
    """
    doublings = max(0.0, math.log2(ranks / max(model.measured.ranks)))
    return math.exp(2 * model.residual * (1 + doublings))
