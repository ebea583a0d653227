"""A rank that is a parameter server, from settings to exit status."""

from __future__ import annotations

import math
from collections.abc import Callable

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.model.transformer import without_memory
from hvdlm.strategies.server.following import FollowingServer
from hvdlm.strategies.server.group import ServerGroup
from hvdlm.strategies.server.ordering import OrderingServer, StepPlan
from hvdlm.strategies.server.owned import OwnedParameters
from hvdlm.strategies.server.synchronous import SynchronousServer
from hvdlm.training.precision import DTYPES
from hvdlm.training.schedule import learning_rate

AnyServer = SynchronousServer | FollowingServer


def serve(
    group: ServerGroup,
    config: Config,
    vocab_size: int,
    servers: Communicator,
    stop_requested: Callable[[], bool],
) -> int:
    """Serves until the workers end; returns the status with which they do. `servers`: the communicator of this rank."""
    server = make_server(group, config, vocab_size, servers, stop_requested)
    _, status, have_died, _ = server.run().header
    servers.activity.idle()
    group.leave(bool(have_died))
    return status


def make_server(
    group: ServerGroup,
    config: Config,
    vocab_size: int,
    servers: Communicator,
    stop_requested: Callable[[], bool],
) -> AnyServer:
    """The server that this rank is, before the first letter."""
    model = without_memory(config.model, vocab_size)
    model.set_compute_dtype(DTYPES[config.train.precision])
    owned = OwnedParameters(model, config, group)
    if not config.server.max_staleness:
        return SynchronousServer(owned, group, servers.activity, stop_requested)
    if group.own_server:
        return FollowingServer(owned, group, servers.activity, config.server)
    plan, workers = step_plan(config, config.server.shares or group.workers), group.worker_ranks
    return OrderingServer(owned, group, servers.activity, config.server, plan, stop_requested, workers)


def step_plan(config: Config, shares: int) -> StepPlan:
    """The steps of a run whose batches are handed out in so many `shares`."""
    sizes, steps = config.train.batch_sizes, config.planned_steps
    between = [each for each in (config.checkpoint.steps_between, config.train.evaluate_every) if each]
    return StepPlan(
        steps=steps,
        shares=shares,
        nominal_tokens=lambda batch: sizes.size(batch) * config.model.context_length,
        rate=lambda step: learning_rate(step, steps, config.optimizer),
        boundary_after=lambda step: min([steps, *((step // each + 1) * each for each in between)]),
        seconds_between=config.checkpoint.seconds_between or math.inf,
        clip_norm=config.optimizer.clip_norm,
        max_skipped=config.train.max_skipped,
    )
