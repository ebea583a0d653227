"""The forecast of a step from a performance model.

    step = data + forward + (backward and exchange, simulated) + optimizer + waiting for the slowest rank

codec_messages.py finds what a codec sends, and simulation.py how backward pass and exchange overlap. A message takes
hops x latency + bytes / bandwidth of the link between hosts: the alpha-beta model (Hockney, Parallel Computing 20,
1994) of a ring (Patarasuk & Yuan, JPDC 2009, section 3).

With local steps a rank does not wait for others in its steps, but for what of a round they do not hide:

    step = data + forward + backward + optimizer + (merging + codec + what is exposed of all rounds) / every
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hvdlm.errors import HvdlmError
from hvdlm.gradients.auto.forecast import BackwardPass, Cost, choose_codecs
from hvdlm.gradients.codecs.registry import AUTO
from hvdlm.scaling.codec_messages import Message, messages
from hvdlm.scaling.performance_model import CodecCost, Network, PerformanceModel
from hvdlm.scaling.scenario import Scenario
from hvdlm.scaling.simulation import Cores, Schedule, Stage, simulate
from hvdlm.scaling.statistics import expected_maximum
from hvdlm.strategies.local_steps.rounds import fewest_steps


@dataclass(frozen=True)
class StepForecast:
    """Seconds of one step by part, and the schedule of its exchange."""

    data: float
    forward: float
    backward: float  # with the exchange going on beside it
    exposed: float
    optimizer: float
    spread: float
    schedule: Schedule
    elements: list[int]  # numbers in each bucket
    codecs: list[str]  # of each bucket
    wire_bytes: float  # sent by a rank

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.data + self.forward + self.backward + self.exposed + self.optimizer + self.spread


def forecast(model: PerformanceModel, scenario: Scenario) -> StepForecast:
    """Forecasts the step of a scenario. Raises HvdlmError for a codec or a network that was not measured."""
    if scenario.local_steps:
        return _forecast_local_steps(model, scenario)
    if scenario.compression.codec == AUTO:
        return _forecast_auto(model, scenario)
    return _forecast(model, scenario, [scenario.compression.codec] * len(scenario.buckets))


def cores(model: PerformanceModel, scenario: Scenario) -> Cores:
    """The cores of one rank: the ranks of a machine share its cores."""
    sharing = -(-scenario.ranks // scenario.machines)
    return Cores(model.machine.cores / sharing, 0.0 if model.is_simulated or model.uses_gpu else 1.0)


def stages(model: PerformanceModel, scenario: Scenario, bucket: int, codec: str) -> tuple[list[Stage], float]:
    """The stages of a bucket's exchange with a codec, and the bytes that a rank sends."""
    cost = measured_cost(model, codec)
    shapes, elements = scenario.buckets[bucket], scenario.elements[bucket]
    is_hierarchical = scenario.compression.hierarchical and 1 < scenario.ranks_per_host < scenario.ranks
    exchanged = messages(codec, shapes, scenario.hosts if is_hierarchical else scenario.ranks, scenario.compression)
    computing = Stage("codec", cost.seconds_per_element * elements / (len(exchanged) + 1))
    result, sent = [computing], sum(message.nbytes for message in exchanged)
    per_host = 1 if is_hierarchical else scenario.ranks_per_host
    for message in exchanged:
        result += [*_between_hosts(model, scenario, message, cost, per_host), computing]
    if is_hierarchical:
        # A dense all-reduce within each host comes before, and a broadcast to its ranks, half as many bytes, after
        (reduction,) = messages("none", shapes, scenario.ranks_per_host, scenario.compression)
        broadcast = reduction._replace(nbytes=reduction.nbytes / 2, hops=reduction.hops // 2)
        dense = measured_cost(model, "none")
        result = [*_within_host(model, reduction, dense), *result, *_within_host(model, broadcast, dense)]
        sent += reduction.nbytes + broadcast.nbytes
    return result, sent


def _forecast(model: PerformanceModel, scenario: Scenario, names: Sequence[str]) -> StepForecast:
    exchanges = [stages(model, scenario, index, name) for index, name in enumerate(names)]
    flops = scenario.flops_per_token * scenario.tokens
    forward, backward = model.forward_seconds_per_flop * flops, model.backward_seconds_per_flop * flops
    last = last_backward_pass(scenario, backward / scenario.micro_batches)
    channels = model.channels if scenario.hosts > 1 else 1
    burst = 0.0
    if scenario.burst and scenario.hosts > 1:
        burst = 8 * scenario.burst / measured_network(model.between, "between hosts").bandwidth(scenario.link)
    schedule = simulate(last, [each for each, _ in exchanges], channels, cores(model, scenario), burst)
    before = backward - last.end  # the backward passes of the other micro-batches
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
        sum(nbytes for _, nbytes in exchanges),
    )


def local_interval(model: PerformanceModel, scenario: Scenario) -> tuple[int, int]:
    """`local_steps.every` and `overlap` of a scenario; for "auto" those that interval.py would choose."""
    return _interval(scenario, _compute(model, scenario), _rounds(model, scenario, _exchanges(model, scenario)))


def _interval(scenario: Scenario, compute: float, rounds: Sequence[float]) -> tuple[int, int]:
    settings = scenario.local_steps
    assert settings is not None
    if settings.every != "auto":
        return settings.every, settings.overlap
    return fewest_steps(compute, sum(rounds), settings.fragments)


def _forecast_local_steps(model: PerformanceModel, scenario: Scenario) -> StepForecast:
    """Where ranks share cores, all of them merge at once. Steps of a rank that are slower by chance are made up for by
    others until the round ends.
    """
    exchanges, compute = _exchanges(model, scenario), _compute(model, scenario)
    rounds = _rounds(model, scenario, exchanges)
    every, overlap = _interval(scenario, compute, rounds)
    own, flops = cores(model, scenario), scenario.flops_per_token * scenario.tokens
    merging = codec = 0.0  # of a round
    if rounds:
        merging = model.merge_seconds_per_element * sum(scenario.elements) * max(1.0, 1 / own.available)
        if own.backward and own.available < 2:  # beside steps that compute on the same cores
            codec = sum(stage.seconds for each, _ in exchanges for stage in each if stage.kind == "codec")
    busy = compute + (merging + codec) / every
    exposed = sum(max(0.0, each - overlap * busy) for each in rounds) / every
    return StepForecast(
        model.data_seconds,
        model.forward_seconds_per_flop * flops,
        model.backward_seconds_per_flop * flops + codec / every,
        max(exposed, sum(rounds) / every - busy),  # the latter where the link is never idle
        model.optimizer_seconds_per_element * sum(scenario.elements) + merging / every,
        model.spread * compute * expected_maximum(scenario.ranks) / math.sqrt(every),
        Schedule([]),
        scenario.elements,
        [scenario.compression.codec] * len(scenario.buckets),
        sum(nbytes for _, nbytes in exchanges) / every,
    )


def _compute(model: PerformanceModel, scenario: Scenario) -> float:
    """Seconds of a step that waits for nobody."""
    passes = model.forward_seconds_per_flop + model.backward_seconds_per_flop
    optimizer = model.optimizer_seconds_per_element * sum(scenario.elements)
    return model.data_seconds + passes * scenario.flops_per_token * scenario.tokens + optimizer


def _exchanges(model: PerformanceModel, scenario: Scenario) -> list[tuple[list[Stage], float]]:
    """`stages` of each bucket with the scenario's codec."""
    return [stages(model, scenario, index, scenario.compression.codec) for index in range(len(scenario.buckets))]


def _rounds(model: PerformanceModel, scenario: Scenario, exchanges: Sequence[tuple[list[Stage], float]]) -> list[float]:
    """Seconds of the exchange of each fragment while steps go on; none on one rank."""
    if scenario.ranks == 1:
        return []
    channels = model.channels if scenario.hosts > 1 else 1
    beside_steps = cores(model, scenario)._replace(backward=0.0)
    rounds = []
    for fragment in scenario.fragments:
        ready = BackwardPass([0.0] * len(fragment), 0.0)
        rounds.append(simulate(ready, [exchanges[index][0] for index in fragment], channels, beside_steps).end)
    return rounds


def _forecast_auto(model: PerformanceModel, scenario: Scenario) -> StepForecast:
    """Chooses as codec auto does, from forecast costs instead of measured ones.

    The fastest is taken of one codec for all buckets, in buckets made for it, and of a codec for each bucket.
    """
    candidates = [name.strip() for name in scenario.compression.candidates.split(",")]
    uniform = [forecast(model, scenario.with_compression(codec=name)) for name in candidates]
    count = len(scenario.buckets)
    costs = {
        name: [_cost_alone(stages(model, scenario, index, name)[0]) for index in range(count)] for name in candidates
    }
    flops = scenario.flops_per_token * scenario.tokens
    last = last_backward_pass(scenario, model.backward_seconds_per_flop * flops / scenario.micro_batches)
    chosen = choose_codecs(last, costs, shares_core=False)
    mixed = _forecast(model, scenario, chosen)
    return min([mixed, *uniform], key=lambda each: each.seconds)


def _cost_alone(exchange: Sequence[Stage]) -> Cost:
    """The cost of a bucket's exchange while nothing else uses link and cores."""
    computing = sum(stage.seconds for stage in exchange if stage.kind == "codec")
    return Cost(computing, sum(stage.seconds for stage in exchange) - computing)


def last_backward_pass(scenario: Scenario, seconds: float) -> BackwardPass:
    """The backward pass of the last micro-batch, in which buckets become ready."""
    return BackwardPass([seconds * share for share in scenario.ready], seconds)


def _between_hosts(
    model: PerformanceModel, scenario: Scenario, message: Message, cost: CodecCost, per_host: int
) -> list[Stage]:
    """A message between all ranks, `per_host` of them on each host.

    A ring sends its bytes once over each host's link, whatever the number of ranks there; an all-to-all sends those of
    every rank of the host.
    """
    if scenario.hosts == 1:
        return _within_host(model, message, cost)
    between = measured_network(model.between, "between hosts")
    nbytes, latency = message.nbytes, between.latency
    if per_host > 1:
        if message.kind == "all-to-all":
            nbytes *= per_host * (scenario.ranks - per_host) / (scenario.ranks - 1)
        elif model.inside:  # one in `per_host` hops goes to another host
            latency = (between.latency + (per_host - 1) * model.inside.latency) / per_host
    return _stages(message, nbytes, latency, between.bandwidth(scenario.link), cost)


def _within_host(model: PerformanceModel, message: Message, cost: CodecCost) -> list[Stage]:
    inside = measured_network(model.inside, "within a host")
    return _stages(message, message.nbytes, inside.latency, inside.bandwidth(None), cost)


def _stages(message: Message, nbytes: float, latency: float, bandwidth: float, cost: CodecCost) -> list[Stage]:
    """`nbytes`: those that the link carries for one message of each rank; `latency`: seconds per hop."""
    seconds = 8 * nbytes / bandwidth
    load = cost.core_seconds_per_byte * message.nbytes / seconds if seconds else 0.0
    # The segments of a chunk overlap, except the last one, for which every hop waits
    segments = message.nbytes / message.hops / message.segment if message.segment else 1.0
    waiting = latency * message.hops / segments + 8 * message.segment / bandwidth
    return [Stage("latency", waiting), Stage("link", seconds, load)]


def measured_network(network: Network | None, where: str) -> Network:
    """Raises HvdlmError if there is none."""
    if network is None:
        raise HvdlmError(f"the fit has no messages {where}: measure some by a study with such ranks")
    return network


def measured_cost(model: PerformanceModel, codec: str) -> CodecCost:
    """Raises HvdlmError for a codec that was not measured."""
    if codec not in model.codecs:
        raise HvdlmError(
            f"codec {codec} was not measured: the fit knows {', '.join(sorted(model.codecs))}; add it to the study"
        )
    return model.codecs[codec]
