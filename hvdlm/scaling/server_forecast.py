"""The forecast of a step with parameter servers, from a performance model of all-reduces.

    step = data + pulling beyond the forward pass + forward + (backward and pushing, simulated) + servers' update

A bucket is pushed when the backward pass has made it, and pulled before the next forward pass reads it. A worker sends
and receives each number once; a server has as many to receive, and then to send, as all workers have of its part. So
with fewer servers than workers the servers' links decide (Jiang et al., "A Unified Architecture for Accelerating
Distributed DNN Training", OSDI 2020, section 3). Asynchronous workers wait for a server's link, not for one another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hvdlm.config.server import no_workers
from hvdlm.errors import HvdlmError
from hvdlm.scaling.codec_messages import pushed_bytes
from hvdlm.scaling.forecast import cores, last_backward_pass, measured_cost, measured_network
from hvdlm.scaling.performance_model import PerformanceModel
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
    update: float  # of the servers, and the messages around it
    spread: float
    pushed_bytes: float  # by a worker
    pulled_bytes: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        passes = self.data + self.forward + self.backward
        return passes + self.pushing + self.pulling + self.update + self.spread


def forecast_servers(model: PerformanceModel, scenario: Scenario) -> ServerForecast:
    """Forecasts the step of a scenario whose last ranks are servers. Raises HvdlmError for a codec or a network that
    was not measured, and where no worker is left.
    """
    if scenario.local_steps:
        raise HvdlmError("local steps against servers are not forecast: leave out local_steps.every, or server.ranks")
    servers, workers = scenario.config.server.ranks, workers_of(scenario)
    is_asynchronous, has_hosts = scenario.config.server.max_staleness > 0, scenario.hosts > 1
    network = measured_network(model.between, "between hosts") if has_hosts else None
    network = network or measured_network(model.inside, "within a host")
    bandwidth = network.bandwidth(scenario.link if has_hosts else None) / 8
    cost = measured_cost(model, scenario.compression.codec)
    # For each byte that a worker sends: of its host's link, and of what is busiest on the servers' side, a host's link
    # or the core that adds
    per_host = scenario.ranks_per_host if has_hosts else 1
    by_worker = min(per_host, workers) / bandwidth
    by_server = workers / servers * max(min(per_host, servers) / bandwidth, cost.core_seconds_per_byte)
    per_byte = by_worker if is_asynchronous else max(by_worker, by_server)

    flops = scenario.flops_per_token * scenario.tokens
    forward, backward = model.forward_seconds_per_flop * flops, model.backward_seconds_per_flop * flops
    last = last_backward_pass(scenario, backward / scenario.micro_batches)
    load = cost.core_seconds_per_byte / per_byte
    pushes, pushed, pulled = [], 0.0, pulled_bytes(scenario)
    for shapes, elements in zip(scenario.buckets, scenario.elements, strict=True):
        nbytes = pushed_bytes(scenario.compression.codec, shapes, scenario.compression)
        encoding = Stage("codec", cost.seconds_per_element * elements / 2)  # what the codec of an all-reduce does twice
        pushes.append([encoding, Stage("latency", network.latency), Stage("link", per_byte * nbytes, load)])
        pushed += nbytes
    schedule = simulate(last, pushes, 1, cores(model, scenario))
    backward += schedule.backward_end - last.end
    pull = per_byte * pulled + network.latency
    found = ServerForecast(
        model.data_seconds,
        forward,
        backward,
        schedule.exposed,
        max(pull - forward / scenario.micro_batches, pull / len(scenario.buckets)),
        model.optimizer_seconds_per_element * sum(scenario.elements) / servers + _MESSAGES_BETWEEN * network.latency,
        0.0 if is_asynchronous else model.spread * (forward + backward) * expected_maximum(workers),
        pushed,
        pulled,
    )
    if not is_asynchronous:
        return found
    # All workers' shares go through the servers, at whatever time
    return replace(found, pushing=found.pushing + max(0.0, by_server * max(pushed, pulled) - found.seconds))


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
    elif scenario.config.train.precision != "fp32":
        rounded = scenario.product_elements
    return 4.0 * sum(scenario.elements) - 2.0 * rounded
