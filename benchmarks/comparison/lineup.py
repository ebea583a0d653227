"""Who takes part in a comparison: contestants by name, how they are built, and which share a job."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from comparison import ours, peers
from comparison.contestant import Contestant
from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError

LIMIT = "no communication"
REFERENCE = "DDP"

# Codecs whose sums are the dense ones up to the rounding of 16-bit numbers.
_FAITHFUL_CODECS = ("none", "fp16", "bf16")


@dataclass(frozen=True)
class Peer:
    """One of those that hvdlm is measured against; `engine`: whose ranks it runs on."""

    engine: str
    build: Callable[[Config, Communicator, DataSet], Contestant]
    is_faithful: bool = True
    has_own_job: bool = False  # since it may crash


PEERS = {
    REFERENCE: Peer("torch", peers.ddp),
    "DDP fp16": Peer("torch", peers.ddp_fp16),
    "DDP PowerSGD": Peer("torch", peers.ddp_power_sgd, is_faithful=False, has_own_job=True),
    "Horovod": Peer("horovod", peers.horovod),
    "Horovod fp16": Peer("horovod", peers.horovod_fp16),
}


@dataclass(frozen=True)
class Crew:
    """The contestants of one job of ranks, joined by one engine."""

    engine: str
    names: tuple[str, ...]


def ours_name(engine: str, codec: str) -> str:
    """What hvdlm is called as a contestant."""
    return f"hvdlm {engine} {codec}"


def is_ours(name: str) -> bool:
    """Whether hvdlm answers for this contestant."""
    return name not in PEERS


def is_faithful(name: str) -> bool:
    """Whether a contestant must train what DDP trains, up to the rounding of 16-bit numbers."""
    if name in PEERS:
        return PEERS[name].is_faithful
    return name != LIMIT and name.split(" ", 2)[2] in _FAITHFUL_CODECS


def line_up(codecs: Sequence[str], engines: Sequence[str], peer_names: Sequence[str]) -> list[Crew]:
    """All contestants, by job; the limit is the first of them, and the reference is always there.

    hvdlm runs every codec on the first engine, and `none` on the others. Contestants on one engine share a job,
    which saves memory. Raises HvdlmError if Horovod is wanted and not there.
    """
    first, *others = engines
    by_engine = {first: [LIMIT, *(ours_name(first, codec) for codec in codecs)]}
    for engine in others:
        by_engine[engine] = [ours_name(engine, "none")]
    own_jobs = []
    for name in dict.fromkeys([REFERENCE, *peer_names]):
        peer = PEERS[name]
        if peer.has_own_job:
            own_jobs.append(Crew(peer.engine, (name,)))
        else:
            by_engine.setdefault(peer.engine, []).append(name)
    if "horovod" in by_engine and importlib.util.find_spec("horovod") is None:
        raise HvdlmError(
            "Horovod is not installed: run `hvdlm install-horovod`, or leave it out with --engines and --peers"
        )
    return [*(Crew(engine, tuple(names)) for engine, names in by_engine.items()), *own_jobs]


def in_order(names: Sequence[str]) -> list[str]:
    """As in tables: hvdlm's as they come, which is the limit first, then the peers."""
    return [*(name for name in names if is_ours(name)), *(name for name in PEERS if name in names)]


def build(name: str, config: Config, communicator: Communicator, data: DataSet) -> Contestant:
    """The contestant called `name`, on this rank. Collective over the ranks of its job."""
    if name in PEERS:
        return PEERS[name].build(config, communicator, data)
    if name == LIMIT:
        return ours.alone(config, data)
    return ours.with_codec(name.split(" ", 2)[2], config, communicator, data)
