"""The performance model: what measurements say of compute, codecs, links and ranks, and the step that follows.

    step = data + forward + backward and exchange, played (schedule.py) + optimizer + waiting for the slowest rank

What a codec sends is rehearsed (rehearsal.py), what each thing costs is fitted (fit.py). A message takes
hops x latency, then bytes / bandwidth of the link between hosts: the alpha-beta model (Hockney, Parallel Computing 20,
1994) of a ring (Patarasuk & Yuan, JPDC 2009, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from hvdlm.errors import HvdlmError
from hvdlm.gradients.auto.forecast import BackwardPass, Cost, choose
from hvdlm.gradients.codecs.registry import AUTO
from hvdlm.scaling.point import Machine, Record
from hvdlm.scaling.rehearsal import Message, messages
from hvdlm.scaling.scenario import Scenario
from hvdlm.scaling.schedule import Cores, Schedule, Stage, play
from hvdlm.scaling.statistics import expected_maximum


class CodecCost(Record):
    """What a codec takes of a core."""

    seconds_per_element: float = Field(ge=0, description="making and reading messages, of a bucket's numbers")
    core_seconds_per_byte: float = Field(ge=0, description="sending, receiving and summing, of a byte sent")


class Network(Record):
    """What messages between ranks of one host, or between hosts, go through."""

    efficiency: float = Field(gt=0, description="bytes of gradients carried, over what the rate would carry")
    latency: float = Field(ge=0, description="seconds a hop")
    bits_per_second: float | None = Field(description="where no rate is known: what was carried")

    def bandwidth(self, link: float | None) -> float:
        """Bits/s of gradients, over a link of such a rate. Raises HvdlmError if none is known."""
        if self.bits_per_second is not None:
            return self.bits_per_second
        if link is None:
            raise HvdlmError("the rate of the link is not known: say it with --link, as in --link 100gbit")
        return link * self.efficiency


class Measured(Record):
    """The range of the measurements: beyond it is extrapolation."""

    ranks: list[int]
    links: list[float | None] = Field(description="bits/s")
    codecs: list[str]
    candidates: str | None = Field(description="of codec auto, where that was measured")
    tokens: int = Field(description="of a rank in a step")
    points: int


class PerformanceModel(Record):
    """Made by `hvdlm.scaling.fit`; its JSON file is what `hvdlm predict` reads."""

    machine: Machine
    ranks_per_host: int
    is_simulated: bool = Field(description="compute was a sleep, and took no core")
    uses_gpu: bool
    lanes: int
    data_seconds: float
    forward_seconds_per_flop: float = Field(description="of forward and backward, as size.py counts them")
    backward_seconds_per_flop: float
    optimizer_seconds_per_element: float
    spread: float = Field(description="standard deviation of a rank's step, over its mean")
    start_seconds: float = Field(description="from the start of processes to the first step, of the fewest ranks")
    start_seconds_per_rank: float
    codecs: dict[str, CodecCost]
    inside: Network | None = Field(description="of a host, between its ranks; null: not measured")
    between: Network | None = Field(description="hosts; null: not measured")
    residual: float = Field(description="root mean square of log(predicted / measured), of points not fitted, if any")
    measured: Measured


@dataclass(frozen=True)
class StepForecast:
    """Seconds of one step, by what they are spent on, and how the exchange goes."""

    data: float
    forward: float
    backward: float  # as long as it lasts beside the exchange
    exposed: float
    optimizer: float
    spread: float
    schedule: Schedule
    elements: list[int]  # numbers in each bucket
    codecs: list[str]  # of each bucket
    wire_bytes: float  # sent by a rank

    @property
    def seconds(self) -> float:
        return self.data + self.forward + self.backward + self.exposed + self.optimizer + self.spread


def read_model(file: Path) -> PerformanceModel:
    """Raises HvdlmError for a file that is none."""
    try:
        return PerformanceModel.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise HvdlmError(f"cannot read the fit {file}: {error.strerror}") from None
    except (ValidationError, UnicodeDecodeError):
        raise HvdlmError(f"{file} is no fit: make one with `hvdlm fit RESULTS --output {file}`") from None


def forecast(model: PerformanceModel, scenario: Scenario) -> StepForecast:
    """The step of a scenario. Raises HvdlmError for a codec that was not measured."""
    if scenario.compression.codec == AUTO:
        return _forecast_auto(model, scenario)
    return _forecast(model, scenario, [scenario.compression.codec] * len(scenario.buckets))


def cores(model: PerformanceModel, scenario: Scenario) -> Cores:
    """What a rank has to itself: emulated hosts share the cores of their machine."""
    sharing = -(-scenario.ranks // scenario.machines)
    return Cores(model.machine.cores / sharing, 0.0 if model.is_simulated or model.uses_gpu else 1.0)


def stages(model: PerformanceModel, scenario: Scenario, bucket: int, codec: str) -> tuple[list[Stage], float]:
    """A bucket's way by a codec, and the bytes that a rank sends for it."""
    cost = _cost(model, codec)
    shapes, elements = scenario.buckets[bucket], scenario.elements[bucket]
    by_node = scenario.compression.hierarchical and 1 < scenario.ranks_per_host < scenario.ranks
    exchanged = messages(codec, shapes, scenario.hosts if by_node else scenario.ranks, scenario.compression)
    computing = Stage("codec", cost.seconds_per_element * elements / (len(exchanged) + 1))
    way, sent = [computing], sum(message.nbytes for message in exchanged)
    for message in exchanged:
        way += [*_message(model, scenario, message, cost, 1 if by_node else scenario.ranks_per_host), computing]
    if by_node:
        # before and after, dense within each node: summed, and handed out again
        (within,) = messages("none", shapes, scenario.ranks_per_host, scenario.compression)
        handed = within._replace(nbytes=within.nbytes / 2, hops=within.hops // 2)
        dense = _cost(model, "none")
        way = [*_inside(model, within, dense), *way, *_inside(model, handed, dense)]
        sent += within.nbytes + handed.nbytes
    return way, sent


def _forecast(model: PerformanceModel, scenario: Scenario, names: Sequence[str]) -> StepForecast:
    ways = [stages(model, scenario, index, name) for index, name in enumerate(names)]
    flops = scenario.flops_per_token * scenario.tokens
    forward, backward = model.forward_seconds_per_flop * flops, model.backward_seconds_per_flop * flops
    last = _backward_pass(scenario, backward / scenario.micro_batches)
    lanes = model.lanes if scenario.hosts > 1 else 1
    burst = 0.0
    if scenario.burst and scenario.hosts > 1:
        burst = 8 * scenario.burst / _measured(model.between, "between hosts").bandwidth(scenario.link)
    schedule = play(last, [way for way, _ in ways], lanes, cores(model, scenario), burst)
    before = backward - last.end
    compute = forward + before + schedule.backward_end
    return StepForecast(
        model.data_seconds,
        forward,
        before + schedule.backward_end,
        schedule.exposed,
        model.optimizer_seconds_per_element * sum(scenario.elements),
        model.spread * compute * expected_maximum(scenario.ranks),
        schedule,
        scenario.elements,
        list(names),
        sum(nbytes for _, nbytes in ways),
    )


def _forecast_auto(model: PerformanceModel, scenario: Scenario) -> StepForecast:
    """The choice is made as hvdlm makes it, from costs that are forecast in place of tried: the soonest of one codec
    for all buckets, each in buckets that suit it, and of one for each bucket.
    """
    candidates = [name.strip() for name in scenario.compression.candidates.split(",")]
    uniform = [forecast(model, scenario.with_compression(codec=name)) for name in candidates]
    count = len(scenario.buckets)
    costs = {name: [_alone(stages(model, scenario, index, name)[0]) for index in range(count)] for name in candidates}
    flops = scenario.flops_per_token * scenario.tokens
    last = _backward_pass(scenario, model.backward_seconds_per_flop * flops / scenario.micro_batches)
    chosen = choose(last, costs, shares_core=False)
    mixed = _forecast(model, scenario, chosen)
    return min([mixed, *uniform], key=lambda each: each.seconds)


def _alone(way: Sequence[Stage]) -> Cost:
    computing = sum(stage.seconds for stage in way if stage.kind == "codec")
    return Cost(computing, sum(stage.seconds for stage in way) - computing)


def _backward_pass(scenario: Scenario, seconds: float) -> BackwardPass:
    """That of the last micro-batch, in which gradients become complete."""
    return BackwardPass([seconds * share for share in scenario.full], seconds)


def _message(
    model: PerformanceModel, scenario: Scenario, message: Message, cost: CodecCost, per_host: int
) -> list[Stage]:
    """Between hosts a ring passes each link once, whatever the ranks of a host; what goes to all passes it for each."""
    if scenario.hosts == 1:
        return _inside(model, message, cost)
    between = _measured(model.between, "between hosts")
    nbytes, latency = message.nbytes, between.latency
    if per_host > 1:
        if message.kind == "all-to-all":
            nbytes *= per_host * (scenario.ranks - per_host) / (scenario.ranks - 1)
        elif model.inside:  # of its hops only one in so many leaves a host
            latency = (between.latency + (per_host - 1) * model.inside.latency) / per_host
    return _stages(message, nbytes, latency, between.bandwidth(scenario.link), cost)


def _inside(model: PerformanceModel, message: Message, cost: CodecCost) -> list[Stage]:
    inside = _measured(model.inside, "within a host")
    return _stages(message, message.nbytes, inside.latency, inside.bandwidth(None), cost)


def _stages(message: Message, nbytes: float, latency: float, bandwidth: float, cost: CodecCost) -> list[Stage]:
    """`nbytes`: that pass the link for a rank's message; `latency`: of a hop."""
    seconds = 8 * nbytes / bandwidth
    load = cost.core_seconds_per_byte * message.nbytes / seconds if seconds else 0.0
    # While one segment of a chunk waits for its turn others are under way; when the last one goes round, none
    segments = message.nbytes / message.hops / message.segment if message.segment else 1.0
    waiting = latency * message.hops / segments + 8 * message.segment / bandwidth
    return [Stage("latency", waiting), Stage("link", seconds, load)]


def _measured(network: Network | None, where: str) -> Network:
    if network is None:
        raise HvdlmError(f"the fit has no messages {where}: measure some, by a study of such ranks")
    return network


def _cost(model: PerformanceModel, codec: str) -> CodecCost:
    if codec not in model.codecs:
        raise HvdlmError(
            f"codec {codec} was not measured: the fit knows {', '.join(sorted(model.codecs))}; add it to the study"
        )
    return model.codecs[codec]
