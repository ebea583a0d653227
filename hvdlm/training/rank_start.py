"""How a process begins that trains, or serves those who do: what it reads, where it computes, and from which model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.launch import detect, leave_word_to_rank_0
from hvdlm.comm.rank_errors import on_all_ranks
from hvdlm.config import Config
from hvdlm.data.cached_split import read_copies
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError, JobError
from hvdlm.training.agreement import check_data_matches, check_devices_match
from hvdlm.training.checkpoint_contents import Checkpoint
from hvdlm.training.hardware import choose_device, share_cores
from hvdlm.training.initial_weights import begin_with_weights
from hvdlm.training.model import check_compiler, check_deterministic
from hvdlm.training.saved_state import restore
from hvdlm.training.trainer import Trainer


class RankStart(NamedTuple):
    """What a rank trains on and computes by."""

    data: DataSet
    vocab_size: int
    device: torch.device
    threads: int  # of the CPU


def refuse_other_ranks(what: str) -> None:
    """Raises HvdlmError if a launcher has started this process with others, which leave it to rank 0 to say so.

    `what`: it is.
    """
    launch = detect(os.environ)
    if launch.size > 1:
        leave_word_to_rank_0(os.environ)
        if launch.rank:
            raise SystemExit(1)
        raise HvdlmError(
            f"{what} is a process of its own, and {launch.launcher} has started {launch.size}: start each without it"
        )


def start_rank(config: Config, communicator: Communicator) -> RankStart:
    """Opens the data set and chooses device and threads, with what all ranks have to have alike. Collective.

    Raises JobError on all ranks if some rank cannot train as configured, or differs.
    """
    _check_ranks(config, communicator)
    data = on_all_ranks(communicator, lambda: DataSet(Path(config.data.path)))
    check_data_matches(communicator, data)
    if config.data.cache:
        on_all_ranks(communicator, lambda: read_copies(data, config.data.cache))
    vocab_size = vocabulary_size(config, data)
    device = choose_device(config.train.device, communicator)
    on_all_ranks(communicator, lambda: check_compiler(config, device))
    on_all_ranks(communicator, lambda: check_deterministic(config, device))
    check_devices_match(communicator, device, config)
    return RankStart(data, vocab_size, device, share_cores(config.train.threads, communicator))


def _check_ranks(config: Config, communicator: Communicator) -> None:
    """Raises JobError on all ranks if they, or their hosts, are not as many as the settings say, but elastic ones."""
    ranks, nodes = config.train.ranks, config.train.nodes
    size, node_count = communicator.size, communicator.node_count
    if communicator.supports("join"):
        return
    on = f"{node_count} node" if node_count == 1 else f"{node_count} nodes"
    started = "1 process was started" if size == 1 else f"{size} ranks were started, on {on}"
    if ranks and size != ranks:
        raise JobError(
            f"train.ranks = {ranks}, but {started}: name as many to the launcher, and all hosts (mpirun -np {ranks} "
            "--hostfile FILE), or set train.ranks to 0"
        )
    if nodes and node_count != nodes:
        raise JobError(
            f"train.nodes = {nodes}, but {started}: name all hosts to the launcher, and as many slots on each as it is "
            "to have ranks (mpirun --hostfile FILE), or set train.nodes to 0"
        )


def vocabulary_size(config: Config, data: DataSet) -> int:
    """Tokens of the model. Raises JobError if the data set has more."""
    if config.model.vocab_size and config.model.vocab_size < data.vocab_size:
        raise JobError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {data.vocab_size} of {data.path}: "
            f"set it to {data.vocab_size} or more, or to 0 for the data set's own"
        )
    return config.model.vocab_size or data.vocab_size


def begin(trainer: Trainer, state: dict[str, Any] | None) -> list[str]:
    """Lets a trainer begin with the checkpoint that has this `state`, with `model.from`, or anew; returns what the user
    is to be told. Collective.
    """
    communicator = trainer.communicator
    if state is not None:
        return restore(trainer, Checkpoint(Path(state["path"])) if communicator.rank == 0 else None, state)
    if trainer.config.model.from_:
        return begin_with_weights(communicator, trainer)
    trainer.start()
    return []
