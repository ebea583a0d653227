"""The forecast of a step with parameter servers, from a performance model of all-reduces.

    step = data + pulling beyond the forward pass + forward + (backward and pushing, simulated) + servers' update

A bucket is pushed when the backward pass has made it, and pulled before the next forward pass reads it. A worker sends
and receives each number once; a server has as many to receive, and then to send, as all workers have of its part. So
with fewer servers than workers the servers' links decide (Jiang et al., "A Unified Architecture for Accelerating
Distributed DNN Training", OSDI 2020, section 3). Asynchronous workers wait for a server's link, not for one another.
With local steps they push and pull between rounds:

    step = data + forward + backward + the worker's update + (pushing + pulling) / local_steps.every
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from hvdlm.config.server import no_workers
from hvdlm.errors import HvdlmError
from hvdlm.scaling.codec_messages import pushed_bytes
from hvdlm.scaling.forecast import cores, last_backward_pass, measured_cost, measured_network
from hvdlm.scaling.performance_model import CodecCost, PerformanceModel
from hvdlm.scaling.scenario import Scenario
from hvdlm.scaling.simulation import Stage, simulate
from hvdlm.scaling.statistics import expected_maximum

# From the last gradient to the first parameter: the norms of the servers' parts, what to scale by, and the update
_MESSAGES_BETWEEN = 3


@dataclass(frozen=True)
class ServerForecast:
    """Seconds of one step of the workers by part."""

    data: float
    forward: float
    backward: float  # with pushing beside it
    pushing: float  # that the backward pass does not hide
    pulling: float  # that the forward pass does not hide
    update: float  # of the servers, and the messages around it; with local steps of a worker
    spread: float
    pushed_bytes: float  # by a worker; with local steps the mean over those of a round
    pulled_bytes: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        passes = self.data + self.forward + self.backward
        return passes + self.pushing + self.pulling + self.update + self.spread


class _Links(NamedTuple):
    """What a byte costs that a worker sends or receives, in seconds."""

    latency: float  # of a message
    by_worker: float  # of its host's link
    by_server: float  # of what is busiest on the servers' side, a host's link or the core that adds

    @property
    def together(self) -> float:
        """Where all workers send at once."""
        return max(self.by_worker, self.by_server)


def forecast_servers(model: PerformanceModel, scenario: Scenario) -> ServerForecast:
    """Forecasts the step of a scenario whose last ranks are servers. Raises HvdlmError for a codec or a network that
    was not measured, and where no worker is left.
    """
    servers, is_asynchronous = scenario.config.server.ranks, scenario.config.server.max_staleness > 0
    cost = measured_cost(model, scenario.compression.codec)
    links = _links(model, scenario, cost)
    if scenario.local_steps:
        return _of_local_steps(model, scenario, links, cost)
    per_byte = links.by_worker if is_asynchronous else links.together

    flops = scenario.flops_per_token * scenario.tokens
    forward, backward = model.forward_seconds_per_flop * flops, model.backward_seconds_per_flop * flops
    last = last_backward_pass(scenario, backward / scenario.micro_batches)
    load = cost.core_seconds_per_byte / per_byte
    pushes, pulled = [], pulled_bytes(scenario)
    for encoding, nbytes in _pushes(scenario, cost):
        stages = [Stage("codec", encoding), Stage("latency", links.latency), Stage("link", per_byte * nbytes, load)]
        pushes.append(stages)
    schedule = simulate(last, pushes, 1, cores(model, scenario))
    backward += schedule.backward_end - last.end
    pull = per_byte * pulled + links.latency
    found = ServerForecast(
        model.data_seconds,
        forward,
        backward,
        schedule.exposed,
        max(pull - forward / scenario.micro_batches, pull / len(scenario.buckets)),
        model.optimizer_seconds_per_element * sum(scenario.elements) / servers + _MESSAGES_BETWEEN * links.latency,
        0.0 if is_asynchronous else model.spread * (forward + backward) * expected_maximum(workers_of(scenario)),
        sum(nbytes for _, nbytes in _pushes(scenario, cost)),
        pulled,
    )
    return _at_the_servers_pace(found, links) if is_asynchronous else found


def _of_local_steps(model: PerformanceModel, scenario: Scenario, links: _Links, cost: CodecCost) -> ServerForecast:
    """Of rounds of asynchronous workers, whose link does nothing while they compute: nothing hides what it carries."""
    assert scenario.local_steps is not None and scenario.local_steps.every != "auto"
    every = scenario.local_steps.every
    flops, elements = scenario.flops_per_token * scenario.tokens, sum(scenario.elements)
    pushes, pulled = _pushes(scenario, cost), pulled_bytes(scenario)
    pushed = sum(nbytes for _, nbytes in pushes)
    pushing = sum(encoding for encoding, _ in pushes) + links.by_worker * pushed + links.latency
    found = ServerForecast(
        model.data_seconds,
        model.forward_seconds_per_flop * flops,
        model.backward_seconds_per_flop * flops,
        pushing / every,
        (links.by_worker * pulled + links.latency) / every,
        model.optimizer_seconds_per_element * elements,  # of the worker; servers add while it computes
        0.0,
        pushed / every,
        pulled / every,
    )
    return _at_the_servers_pace(found, links)


def _at_the_servers_pace(found: ServerForecast, links: _Links) -> ServerForecast:
    """All asynchronous workers' shares go through the servers, at whatever time."""
    busy = links.by_server * max(found.pushed_bytes, found.pulled_bytes)
    return replace(found, pushing=found.pushing + max(0.0, busy - found.seconds))


def _links(model: PerformanceModel, scenario: Scenario, cost: CodecCost) -> _Links:
    servers, workers, has_hosts = scenario.config.server.ranks, workers_of(scenario), scenario.hosts > 1
    network = measured_network(model.between, "between hosts") if has_hosts else None
    network = network or measured_network(model.inside, "within a host")
    bandwidth = network.bandwidth(scenario.link if has_hosts else None) / 8
    per_host = scenario.ranks_per_host if has_hosts else 1
    by_server = workers / servers * max(min(per_host, servers) / bandwidth, cost.core_seconds_per_byte)
    return _Links(network.latency, min(per_host, workers) / bandwidth, by_server)


def _pushes(scenario: Scenario, cost: CodecCost) -> list[tuple[float, float]]:
    """Of each bucket the seconds of its encoding, half of what the codec of an all-reduce does, and its bytes."""
    codec, compression = scenario.compression.codec, scenario.compression
    return [
        (cost.seconds_per_element * elements / 2, pushed_bytes(codec, shapes, compression))
        for shapes, elements in zip(scenario.buckets, scenario.elements, strict=True)
    ]


def workers_of(scenario: Scenario) -> int:
    """Ranks that are no servers. Raises HvdlmError if there are none."""
    workers = scenario.ranks - scenario.config.server.ranks
    if workers < 1:
        raise HvdlmError(no_workers(scenario.config.server.ranks, scenario.ranks))
    return workers


def pulled_bytes(scenario: Scenario) -> float:
    """Bytes of all parameters as a worker gets them."""
    rounded = 0
    if scenario.config.server.pull == "bf16":
        rounded = sum(scenario.elements)
    elif scenario.config.train.precision != "fp32" and not scenario.local_steps:  # a round's own steps move float32
        rounded = scenario.product_elements
    return 4.0 * sum(scenario.elements) - 2.0 * rounded
