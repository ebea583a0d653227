"""`hvdlm train` with `server.address`: a worker that is a process of its own, from settings to exit status.

It joins a server at any time, trains on what that hands out, at its own pace, and leaves when it is asked to stop. It
writes nothing.
"""

from __future__ import annotations

import logging
import os

from hvdlm.comm.admission import Admission, join_all
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mailbox import Letter
from hvdlm.comm.server_mailbox import SERVER
from hvdlm.comm.worker_mailbox import LeavingError, WorkerMailbox
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.exit_status import STOPPED_EARLY
from hvdlm.strategies.server.group import Kind, ServerGroup, check_on_cpu
from hvdlm.strategies.server.strategy import Done, ServedWorker
from hvdlm.training.hardware import keep_memory
from hvdlm.training.job import job
from hvdlm.training.out_of_memory import out_of_memory_errors
from hvdlm.training.preemption import Preemption
from hvdlm.training.rank_start import RankStart, refuse_other_ranks, start_rank
from hvdlm.training.server_token import token_of_worker
from hvdlm.training.share_training import ShareTraining
from hvdlm.training.trainer import Trainer
from hvdlm.training.worker_agreement import description

logger = logging.getLogger(__name__)

_LESS_MEMORY = "lower train.micro_batch_size or set train.activation_checkpointing"


def run_worker(config: Config) -> int:
    """Trains for a server until that ends, or a signal asks to stop.

    Returns 0 when training is finished, STOPPED_EARLY if the server or this worker was asked to stop before. Raises
    HvdlmError if the server cannot be reached, does not want this worker, or ends otherwise.
    """
    refuse_other_ranks("a worker of server.address")
    keep_memory()
    token = token_of_worker(config.server, os.environ)
    host, port = config.server.endpoint
    with (
        Preemption(config.train.stop_signals.split(",")) as preemption,
        job("solo", config.comm.timeout, config.digest()) as communicator,
    ):
        start = start_rank(config, communicator)
        check_on_cpu(start.device)
        connections, admission = join_all(host, port, token, description(config, start.data), config.comm.timeout)
        mailbox = WorkerMailbox(
            connections, admission.number, f"{host}:{port}", config.comm.timeout, lambda: preemption.requested
        )
        try:
            with out_of_memory_errors(_LESS_MEMORY):
                return _work(config, communicator, start, mailbox, admission, preemption)
        finally:
            mailbox.close()


def _work(
    config: Config,
    communicator: Communicator,
    start: RankStart,
    mailbox: WorkerMailbox,
    admission: Admission,
    preemption: Preemption,
) -> int:
    """Returns the exit status."""
    group = ServerGroup(mailbox, SERVER, 1 + len(admission.others), communicator)
    trainer = Trainer(config, communicator, start.data, start.vocab_size, start.device, group)
    strategy, shares = trainer.strategy, ShareTraining(trainer, admission.shares)
    assert isinstance(strategy, ServedWorker)
    logger.info("worker %d of %s, %d CPU threads", admission.number, config.server.address, start.threads)

    def leave_if_asked() -> None:
        if preemption.requested:
            raise LeavingError(f"worker {admission.number} was asked to stop")

    done: Done | None = None
    try:
        while True:
            communicator.activity.idle()  # the server may take any time
            answer = strategy.ask(done, preemption.requested)
            if answer.kind == Kind.END:
                return _end(answer, config.server.address)
            done = shares.push(answer, leave_if_asked)
    except LeavingError:
        strategy.leave()
        logger.warning("worker %d leaves, as it was asked to; others do what it has not done", admission.number)
        return STOPPED_EARLY


def _end(answer: Letter, address: str) -> int:
    """The server ends, with the status that it says."""
    _, status, _, _ = answer.header
    if status == 0:
        logger.info("training is finished: the server at %s ends, and this worker", address)
    elif status == STOPPED_EARLY:
        logger.warning("the server at %s was stopped: start it again with --resume latest, then its workers", address)
    else:
        raise HvdlmError(f"the server at {address} has ended by an error: see what it has printed")
    return status
