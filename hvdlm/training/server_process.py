"""`hvdlm serve`: a parameter server that is a process of its own, from settings to exit status."""

from __future__ import annotations

import logging
from contextlib import closing
from functools import partial
from pathlib import Path

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.server_mailbox import SERVER, ServerMailbox
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.exit_status import STOPPED_EARLY
from hvdlm.model.size import parameter_count
from hvdlm.strategies.server.group import Kind, ServerGroup, check_on_cpu
from hvdlm.strategies.server.independent import IndependentServer
from hvdlm.strategies.server.served_model import ServedModel
from hvdlm.training.boundary import do_what_is_due
from hvdlm.training.hardware import keep_memory
from hvdlm.training.job import job
from hvdlm.training.out_of_memory import out_of_memory_errors
from hvdlm.training.preemption import Preemption
from hvdlm.training.rank_start import begin, refuse_other_ranks, start_rank
from hvdlm.training.run_directory import RunDirectory
from hvdlm.training.run_log import draw_at_end, open_log
from hvdlm.training.served_steps import write_step
from hvdlm.training.server_token import FILE, make_token
from hvdlm.training.serving import step_plan
from hvdlm.training.share_training import ShareTraining
from hvdlm.training.tensorboard import check_tensorboard
from hvdlm.training.trainer import Trainer
from hvdlm.training.weights_and_biases import check_weights_and_biases
from hvdlm.training.worker_agreement import difference

logger = logging.getLogger(__name__)

_LESS_MEMORY = "a server keeps parameters, gradients and the optimizer's state in float32: use a host with more memory"


def run_server(config: Config, resume: str | None, config_file: Path | None = None) -> int:
    """Serves workers until training has come to its last step, or a signal asks to stop; the arguments are those of
    `run.train`.

    Returns 0 after the last step, STOPPED_EARLY after a signal. Raises HvdlmError if it cannot serve as configured.
    """
    if not config.server.listen or config.server.address:
        raise HvdlmError("hvdlm serve needs server.listen, HOST:PORT where it waits for workers, and no server.address")
    refuse_other_ranks("hvdlm serve")
    keep_memory()
    run_directory = RunDirectory(Path(config.train.run_dir))
    with (
        closing(run_directory),
        Preemption(config.train.stop_signals.split(",")) as preemption,
        job("solo", config.comm.timeout, config.digest()) as communicator,
    ):
        check_tensorboard(config.log)
        check_weights_and_biases(config.log)
        mailbox = ServerMailbox(*config.server.endpoint, config.comm.timeout)
        status = 1
        try:
            with out_of_memory_errors(_LESS_MEMORY):
                finished = _serve(config, communicator, mailbox, run_directory, preemption, resume, config_file)
            status = 0 if finished else STOPPED_EARLY
        finally:
            mailbox.end((Kind.END, status))
    return status


def _serve(
    config: Config,
    communicator: Communicator,
    mailbox: ServerMailbox,
    run_directory: RunDirectory,
    preemption: Preemption,
    resume: str | None,
    config_file: Path | None,
) -> bool:
    """Returns whether training has come to its last step."""
    data, vocab_size, device, threads = start_rank(config, communicator)
    check_on_cpu(device)
    shares = config.server.shares_of_a_process
    trainer = Trainer(config, communicator, data, vocab_size, device, ServerGroup(mailbox, SERVER, 1, communicator))
    run = _Run(trainer, mailbox, shares, preemption)
    state = run_directory.open(config, config_file, resume, data, vocab_size)
    sentences = [*begin(trainer, state), *run_directory.changed_settings]
    token = make_token(run_directory.path)
    plan = step_plan(config, shares)
    server = IndependentServer(
        run.strategy.owned,
        ServerGroup(mailbox, SERVER, 1, communicator),
        communicator.activity,
        config.server,
        plan,
        lambda: preemption.requested,
        run,
        config.comm.timeout * plan.rounds.every,
    )
    trainer.tokenizer = data.tokenizer_path.read_bytes()
    trainer.metrics = open_log(config, trainer.ending.last_step, trainer.step)
    try:
        for sentence in sentences:
            run.tell(sentence)
        trainer.ending.begin()
        if trainer.validation.was_cut_off(trainer.step):
            trainer.validation.run(preemption)
        mailbox.open(token, shares, partial(difference, config, data))
        logger.info("%s parameters, %d CPU threads", f"{parameter_count(config.model, vocab_size):,}", threads)
        host, _ = config.server.endpoint
        run.tell(f"listens at {host}:{mailbox.port}; workers need the token in {run_directory.path / FILE}")
        finished = server.serve(trainer.step)
        trainer.ending.tell()
    finally:
        trainer.metrics.close()
    if finished:
        draw_at_end(run_directory.path)
    else:
        logger.warning("stopped after step %d; go on with --resume latest", trainer.step)
    return finished


class _Run:
    """What the process does beside serving, as the server asks it to."""

    def __init__(self, trainer: Trainer, mailbox: ServerMailbox, shares: int, preemption: Preemption) -> None:
        assert isinstance(trainer.strategy, ServedModel)
        self.strategy = trainer.strategy
        self._trainer, self._mailbox, self._preemption = trainer, mailbox, preemption
        self._shares = ShareTraining(trainer, shares)
        self._sent_bytes = 0  # up to the last step

    def train_on(self, task: int, first: int) -> tuple[float, int]:
        trainer, parameters = self._trainer, self.strategy.parameters()
        with self.strategy.evaluation_parameters():
            pushed, loss, tokens = self._shares.make_on_server(task, first)
        trainer.communicator.activity.idle()
        self.strategy.owned.add_own(pushed)
        for each in parameters.values():
            each.grad = None
        return loss, tokens

    def before_update(self) -> None:
        self._trainer.saver.have_copied()

    def after_step(self, line: dict[str, float]) -> None:
        self._trainer.step = int(line["step"])
        write_step(self._trainer, line, self._mailbox.sent_bytes - self._sent_bytes)
        self._sent_bytes = self._mailbox.sent_bytes
        self._trainer.saver.tell()

    def at_boundary(self, step: int, is_end: bool) -> None:
        self._trainer.step = step
        self.strategy.meet(step)
        do_what_is_due(self._trainer, is_end, self._preemption)

    def tell(self, sentence: str) -> None:
        self._trainer.write("event", message=sentence)
