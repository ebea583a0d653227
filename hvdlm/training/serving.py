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
from hvdlm.strategies.server.rounds import ServedRounds
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
        return FollowingServer(owned, group, servers.activity, config.server, ServedRounds.of_run(config))
    plan, workers = step_plan(config, config.server.shares or group.workers), group.worker_ranks
    return OrderingServer(owned, group, servers.activity, config.server, plan, stop_requested, workers)


def step_plan(config: Config, shares: int) -> StepPlan:
    """What servers do of a run whose rounds are handed out in so many `shares`."""
    rounds, steps, is_local = ServedRounds.of_run(config), config.planned_steps, bool(config.local_steps.every)
    between = [each for each in (config.checkpoint.steps_between, config.train.evaluate_every) if each]

    def boundary_after(version: int) -> int:
        due = [(rounds.end(version) // each + 1) * each for each in between]
        return min([rounds.count, *map(rounds.first_after, due)])

    def rate(version: int) -> float:
        return config.local_steps.lr if is_local else learning_rate(version, steps, config.optimizer)

    return StepPlan(
        rounds=rounds,
        shares=shares,
        tokens_before=config.tokens_before,
        rate=rate,
        boundary_after=boundary_after,
        seconds_between=config.checkpoint.seconds_between or math.inf,
        moves_at_once=is_local,
        clip_norm=0.0 if is_local else config.optimizer.clip_norm,
        max_skipped=config.train.max_skipped,
    )
