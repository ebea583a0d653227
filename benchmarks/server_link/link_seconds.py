"""How long a step takes at the least on links of a rate: what all-reduce and servers are measured against.

Every link is as fast in one direction as in the other at the same time. A forward pass takes a third of the passes.
Gradients travel beside the backward pass; what servers send back, beside the next forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

_FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class Job:
    """Workers with one link each, and what they compute and send in a step."""

    workers: int
    passes: float  # seconds of both passes
    nbytes: float  # of all gradients, and of all parameters
    bandwidth: float  # bytes a second of a link


def all_reduce_seconds(job: Job) -> float:
    """A ring sends 2 (W - 1) / W of the gradients over each link."""
    on_link = 2 * (job.workers - 1) / job.workers * job.nbytes / job.bandwidth
    return _FORWARD_SHARE * job.passes + max((1 - _FORWARD_SHARE) * job.passes, on_link)


def server_seconds(job: Job, servers: int) -> float:
    """A server receives, and then sends, W / S of the model; a worker sends and receives it once."""
    on_link = max(1.0, job.workers / servers) * job.nbytes / job.bandwidth
    return max(_FORWARD_SHARE * job.passes, on_link) + max((1 - _FORWARD_SHARE) * job.passes, on_link)
