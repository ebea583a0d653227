"""`hvdlm ...` on the ranks of a pool, as if a launcher had started it on each of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from torch import Tensor
from torch._dynamo.utils import counters

from hvdlm.cli import main
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mpi import MPICommunicator
from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.work import Work
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.model.transformer import Transformer
from hvdlm.training import checkpoint
from hvdlm.training.checkpoint_contents import Checkpoint
from hvdlm.training.evaluation import evaluate
from hvdlm.training.trainer import Trainer


def run_hvdlm(
    comm: Communicator,
    arguments: Sequence[str],
    stop_after: int | None,
    overflow_at: Sequence[int],
    environment: Mapping[str, str],
) -> int:
    """Runs one command and returns its exit status; its engine is that of the pool, whatever the settings say.

    Rank 0 gets a SIGTERM during step `stop_after`; a gradient of the last rank is infinite in steps `overflow_at`.
    Raises AssertionError where the command would have ended the job at once, which would end the pool.
    """
    os.environ.update(environment)

    def connect(_: str, timeout: float, is_elastic: bool = False, engine_sums: bool = True) -> Communicator:
        own = comm.split(0, comm.rank)  # the command closes it
        assert isinstance(own, MPICommunicator)
        own._timeout = timeout
        own.abort = abort  # type: ignore[method-assign]
        return own

    def abort(reason: str) -> NoReturn:
        raise AssertionError(f"the job would have been ended: {reason}")

    step = Trainer.train_step

    def changed_step(trainer: Trainer, *arguments: object) -> bool:
        if trainer.step + 1 == stop_after and comm.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        overflows = trainer.step + 1 in overflow_at and comm.rank == comm.size - 1
        with infinite_gradient(trainer.model) if overflows else nullcontext():
            return step(trainer, *arguments)  # type: ignore[arg-type]

    with ExitStack() as stack:
        stack.enter_context(patch("hvdlm.training.job.connect", connect))
        stack.enter_context(patch("hvdlm.cluster.doctor.examine_ranks.connect", connect))
        stack.enter_context(patch.object(Trainer, "train_step", changed_step))
        try:
            return main(arguments)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1


def run_doctor(comm: Communicator, fault: str | None) -> int:
    """`hvdlm doctor`; with "version" or "sum", rank 1 has another hvdlm, or a wrong last element of long sums."""
    reduce = MPICommunicator._all_reduce

    def reduce_wrongly(own: MPICommunicator, flat: Tensor, op: ReduceOp) -> Work[None]:
        def spoil(_: None) -> None:
            if flat.dtype.is_floating_point and flat.numel() == 65537:
                flat[-1] += 1

        return reduce(own, flat, op).then(spoil)

    faults = {
        "version": patch("hvdlm.__version__", "0.0.1"),
        "sum": patch.object(MPICommunicator, "_all_reduce", reduce_wrongly),
    }
    with faults[fault] if fault and comm.rank == 1 else nullcontext():
        # what the launcher of a job of this size says
        return run_hvdlm(comm, ["doctor"], None, (), {"OMPI_COMM_WORLD_SIZE": str(comm.size)})


@contextmanager
def infinite_gradient(model: Transformer) -> Iterator[None]:
    """One gradient of this rank overflows."""
    handle = model.final_norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    yield
    handle.remove()


def evaluate_checkpoint(comm: Communicator, run_dir: Path, data_path: Path, at_once: int) -> tuple[float, float, int]:
    """Loss, accuracy and number of tokens that `hvdlm evaluate` rounds and prints, `at_once` sequences at once."""
    state = checkpoint.open_state(run_dir)
    model = Transformer(Config.model_validate(state["config"]).model, state["vocab_size"])
    model.load_state_dict(Checkpoint(Path(state["path"])).model())
    result = evaluate(model, DataSet(data_path), comm, at_once)
    return result.loss, result.accuracy, result.tokens


def compiled_graphs(_: Communicator) -> int:
    """How many graphs torch.compile has made in this process."""
    return int(counters["stats"]["unique_graphs"])
