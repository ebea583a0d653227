"""The systems by name: how each is built, which must agree with DDP, and which share a job."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.methods import Method, parse_method
from compare import systems
from compare.systems import System
from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.gradients.channel import may_sum_by_engine

LIMIT = "no communication"
REFERENCE = "DDP"

# Codecs whose gradients are exact, or rounded to 16-bit numbers.
_DENSE_CODECS = ("none", "fp16", "bf16")


# Without isolation: building it imports the PyTorch that is there
_DEEPSPEED = '--no-build-isolation -c constraints.txt -e ".[deepspeed]"'


@dataclass(frozen=True)
class Peer:
    """A system that hvdlm is compared with; `engine` is that of the job it runs in."""

    engine: str
    build: Callable[[Config, Communicator, DataSet], System]
    is_dense: bool = True
    has_own_job: bool = False  # it may crash, and would end the other systems of its job
    package: str = ""  # which it needs and hvdlm does not
    install: str = ""  # arguments of pip that install it
    steps: int = 1  # that belong together, as in `steps_of_a_round`


PEERS = {
    REFERENCE: Peer("torch", systems.ddp),
    "DDP fp16": Peer("torch", systems.ddp_fp16),
    "DDP PowerSGD": Peer("torch", systems.ddp_power_sgd, is_dense=False, has_own_job=True),
    "FSDP2": Peer("torch", systems.fsdp2, has_own_job=True),
    "PyTorch 1F1B": Peer("torch", systems.torch_1f1b, has_own_job=True),
    "PyTorch GPipe": Peer("torch", systems.torch_gpipe, has_own_job=True),
    "DeepSpeed ZeRO-2": Peer(
        "torch", systems.deepspeed_zero2, has_own_job=True, package="deepspeed", install=_DEEPSPEED
    ),
    "DeepSpeed ZeRO-3": Peer(
        "torch", systems.deepspeed_zero3, has_own_job=True, package="deepspeed", install=_DEEPSPEED
    ),
    "Horovod": Peer("horovod", systems.horovod),
    "Horovod fp16": Peer("horovod", systems.horovod_fp16),
    "torchft DiLoCo": Peer(
        "mpi",
        systems.torchft_diloco,
        is_dense=False,
        has_own_job=True,
        package="torchft",
        install='-c constraints.txt -e ".[peers]"',
        steps=systems.DILOCO_EVERY,
    ),
}


# What stands in a name in place of the engine where horovodrun starts the job, and how Horovod's ranks meet
HOROVODRUN = {"horovodrun-mpi": "mpi", "horovodrun-gloo": "gloo"}


@dataclass(frozen=True)
class SystemGroup:
    """The systems of one job, whose ranks are connected by one engine."""

    engine: str
    names: tuple[str, ...]
    horovodrun: str = ""  # "mpi" or "gloo": started by it, with that option; empty: by mpirun


def hvdlm_name(engine: str, method: str) -> str:
    """The name of hvdlm with an engine and a method, as `parse_method` reads it."""
    return f"hvdlm {engine} {method}"


def is_hvdlm(name: str) -> bool:
    """Whether a system is hvdlm, with or without communication."""
    return name not in PEERS


def is_installed(peer: str) -> bool:
    """Whether the package is there that a peer needs beside PyTorch and Horovod."""
    package = PEERS[peer].package
    return not package or importlib.util.find_spec(package) is not None


def is_dense(name: str) -> bool:
    """Whether a system must train the same model as DDP, up to the rounding of gradients to 16-bit numbers."""
    if name in PEERS:
        return PEERS[name].is_dense
    if name == LIMIT:
        return False
    method = _method(name)
    return method.codec in _DENSE_CODECS and not method.local_steps and method.boundary != "int8"


def group_systems(
    codecs: Sequence[str], engines: Sequence[str], peer_names: Sequence[str], horovodrun: Sequence[str] = ()
) -> list[SystemGroup]:
    """All systems by job. The limit is the first of them, and the reference is always included.

    hvdlm runs every codec on the first engine and under each way of `horovodrun`, and `none` on the other engines.
    Systems on one engine share a job, which saves memory. Raises HvdlmError if what a peer needs is not installed.
    """
    first, *others = engines
    by_engine = {first: [LIMIT, *(hvdlm_name(first, codec) for codec in codecs)]}
    for engine in others:
        by_engine[engine] = [hvdlm_name(engine, "none")]
    own_jobs = []
    for name in dict.fromkeys([REFERENCE, *peer_names]):
        peer = PEERS[name]
        if peer.has_own_job:
            own_jobs.append(SystemGroup(peer.engine, (name,)))
        else:
            by_engine.setdefault(peer.engine, []).append(name)
    for name in peer_names:
        if not is_installed(name):
            raise HvdlmError(
                f"{name} needs {PEERS[name].package}: pip install {PEERS[name].install}, or leave it out of --peers"
            )
    own_jobs += [
        SystemGroup("horovod", tuple(hvdlm_name(way, codec) for codec in codecs), HOROVODRUN[way]) for way in horovodrun
    ]
    if ("horovod" in by_engine or horovodrun) and importlib.util.find_spec("horovod") is None:
        raise HvdlmError(
            "Horovod is not installed: run `hvdlm install-horovod`, or leave it out with --engines and --peers"
        )
    return [*(SystemGroup(engine, tuple(names)) for engine, names in by_engine.items()), *own_jobs]


def sums_by_engine(name: str, config: Config) -> bool:
    """Whether a system may leave whole gradients to the engine's all-reduce."""
    if name in PEERS or name == LIMIT:
        return name in PEERS
    return may_sum_by_engine(config.comm, _method(name).apply(config).compression)


def table_order(names: Sequence[str]) -> list[str]:
    """The order of rows: hvdlm's systems as they come, the limit first, then the peers."""
    return [*(name for name in names if is_hvdlm(name)), *(name for name in PEERS if name in names)]


def build(name: str, config: Config, communicator: Communicator, data: DataSet) -> System:
    """Builds a system on this rank. Collective over the ranks of its job."""
    if name in PEERS:
        return PEERS[name].build(config, communicator, data)
    if name == LIMIT:
        return systems.hvdlm_without_communication(config, communicator.size, data)
    return systems.hvdlm_by_method(_method(name), config, communicator, data)


def steps_of_a_round(name: str) -> int:
    """How many steps belong together: of local steps, those from one average to the next."""
    if name in PEERS:
        return PEERS[name].steps
    return 1 if name == LIMIT else _method(name).steps


def _method(name: str) -> Method:
    return parse_method(name.split(" ", 2)[2])
