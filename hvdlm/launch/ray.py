"""Ranks as actors of a Ray cluster."""

from __future__ import annotations

import contextlib
import socket
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hvdlm.errors import HvdlmError
from hvdlm.launch.job import Job, RanksLostError, run_attempts
from hvdlm.launch.rank import Outcome, Place, environment_of, own_place, run_rank

_SECONDS_FOR_PLACES = 300.0  # until the cluster has room for all ranks
_SECONDS_TO_CONNECT = 10.0  # to its head; Ray by itself goes on trying for more than a minute


class _Rank:
    """An actor, on the node that Ray has chosen."""

    def place(self) -> Place:
        return own_place(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    def run(self, settings: str, environment: dict[str, str]) -> Outcome:
        return run_rank(settings, environment)


def train(job: Job, address: str = "auto") -> int:
    """Trains on a cluster that is up, and returns the exit status.

    `address`: as ray.init takes it. Raises HvdlmError if there is no cluster there, or no room in it, or if the job has
    failed too often.
    """
    try:
        _refuse_silence(address)
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=True)
    except (ConnectionError, ValueError) as error:
        raise HvdlmError(f"no Ray cluster at {address!r} ({error}); start one with `ray start --head`") from None
    return run_attempts(job, lambda: _attempt(job))


def _refuse_silence(address: str) -> None:
    """Raises ConnectionError if nothing listens at an address that names a host and a port."""
    head = urlsplit(f"//{address.removeprefix('ray://')}")
    if head.hostname and head.port:
        try:
            socket.create_connection((head.hostname, head.port), _SECONDS_TO_CONNECT).close()
        except OSError as error:
            raise ConnectionError(str(error)) from None


def _attempt(job: Job) -> list[Outcome]:
    """All ranks at once; ends the others if an actor has died."""
    bundle = {"CPU": float(job.cpus_per_rank)} | ({"GPU": float(job.gpus_per_rank)} if job.gpus_per_rank else {})
    group = placement_group([bundle] * job.ranks, strategy="PACK")
    actors: list[Any] = []
    try:
        if not group.wait(_SECONDS_FOR_PLACES):
            have = ray.cluster_resources()
            known = ", ".join(f"{name} {have.get(name, 0):g}" for name in bundle)
            raise HvdlmError(f"the Ray cluster has no room for {job.ranks} ranks of {bundle} (it has {known} in all)")
        actors = [_actor(job, group, rank) for rank in range(job.ranks)]
        places: list[Place] = _of_all([actor.place.remote() for actor in actors])
        running = [actor.run.remote(job.settings, environment_of(rank, places)) for rank, actor in enumerate(actors)]
        return _of_all(running)
    finally:
        for actor in actors:
            with contextlib.suppress(RayActorError):
                ray.kill(actor)
        remove_placement_group(group)


def _actor(job: Job, group: PlacementGroup, rank: int) -> Any:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
    actor = ray.remote(_Rank)
    return actor.options(
        num_cpus=job.cpus_per_rank, num_gpus=job.gpus_per_rank, scheduling_strategy=strategy, max_restarts=0
    ).remote()


def _of_all(answers: list[Any]) -> list[Any]:
    try:
        return list(ray.get(answers))
    except RayTaskError as error:
        raise HvdlmError(f"a rank could not be started: {error.cause}") from None
    except RayError as error:
        raise RanksLostError(f"a worker of Ray has died ({str(error).splitlines()[0]})") from None
