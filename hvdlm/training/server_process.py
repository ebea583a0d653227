"""`hvdlm serve`: parameter servers that are processes of their own, one or the ranks of a job, to exit status."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from hvdlm.comm.admission import Admission, Entrance, number_in
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.interfaces import address_beside, joining_networks, own_interfaces
from hvdlm.comm.launch import detect
from hvdlm.comm.mailbox import open_mailbox
from hvdlm.comm.rank_errors import on_all_ranks, on_rank_0
from hvdlm.comm.server_mailbox import SERVER, ServerMailbox
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.exit_status import STOPPED_EARLY
from hvdlm.model.size import parameter_count
from hvdlm.strategies.server.group import Kind, ServerGroup, check_on_cpu
from hvdlm.strategies.server.independent import IndependentServer
from hvdlm.strategies.server.independent_follower import IndependentFollower
from hvdlm.strategies.server.served_model import ServedModel
from hvdlm.training.boundary import do_what_is_due
from hvdlm.training.hardware import keep_memory
from hvdlm.training.job import job
from hvdlm.training.out_of_memory import out_of_memory_errors
from hvdlm.training.preemption import Preemption
from hvdlm.training.rank_start import begin, start_rank
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
    keep_memory()
    run_directory = RunDirectory(Path(config.train.run_dir))
    engine = config.comm.engine if detect(os.environ).size > 1 else "solo"
    with (
        closing(run_directory),
        Preemption(config.train.stop_signals.split(",")) as preemption,
        job(engine, config.comm.timeout, config.digest()) as communicator,
    ):
        preemption.renew()
        for check in (check_tensorboard, check_weights_and_biases):
            on_all_ranks(communicator, partial(check, config.log))
        mailbox = _open_mailbox(config, communicator)
        try:
            with out_of_memory_errors(_LESS_MEMORY):
                finished = _serve(config, communicator, mailbox, run_directory, preemption, resume, config_file)
        except BaseException:
            mailbox.end((Kind.END, 1))
            raise
        status = 0 if finished else STOPPED_EARLY
        if communicator.rank == 0:
            mailbox.end((Kind.END, status))
        communicator.barrier()  # other servers end once workers have read that the first one does
        mailbox.close()
    return status


def _open_mailbox(config: Config, communicator: Communicator) -> ServerMailbox:
    """That of this server, which listens: on other hosts on the network of the first. Collective.

    Raises JobError on all ranks if one cannot.
    """
    timeout, (host, port) = config.comm.timeout, config.server.endpoint
    servers = open_mailbox(communicator, timeout) if communicator.size > 1 else None
    own_port = port + communicator.rank if port else 0

    def listen() -> ServerMailbox:
        own = host if _is_on_first_host(communicator) else address_beside(host)
        if own is None:
            raise HvdlmError(
                f"server.listen = {config.server.listen}: {communicator.hosts[communicator.rank]} has no address on "
                "that network, by which workers could reach the server there: give 0.0.0.0, or another network"
            )
        try:
            return ServerMailbox(own, own_port, timeout, servers)
        except HvdlmError as error:
            if communicator.rank == 0:
                raise
            which = f"server {communicator.rank} listens at the port of server.listen plus {communicator.rank}"
            raise HvdlmError(f"{error}; {which}") from None

    return on_all_ranks(communicator, listen)


def _is_on_first_host(communicator: Communicator) -> bool:
    return communicator.hosts[communicator.rank] == communicator.hosts[0]


def _entrances(communicator: Communicator, mailbox: ServerMailbox) -> list[Entrance]:
    """Where workers find each server. Collective."""
    interfaces = communicator.all_gather_object(own_interfaces())
    networks = joining_networks(interfaces)
    addresses = [each.address.ip for each in interfaces[communicator.rank]]
    joining = [address for network in networks for address in addresses if address in network]
    own = Entrance([mailbox.address], mailbox.port)
    if _is_on_first_host(communicator):
        own = Entrance((), mailbox.port)
    elif ip_address(mailbox.address).is_unspecified:  # bridges of containers look alike on all hosts, and lead nowhere
        own = Entrance([str(each) for each in joining or addresses], mailbox.port)
    return communicator.all_gather_object(own)


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
    group = ServerGroup(mailbox, SERVER, communicator.size, SoloCommunicator())
    trainer = Trainer(config, communicator, data, vocab_size, device, group)
    run = _Run(trainer, mailbox, shares, preemption)
    state = on_rank_0(communicator, lambda: run_directory.open(config, config_file, resume, data, vocab_size))
    sentences = begin(trainer, state)
    token = on_rank_0(communicator, lambda: make_token(run_directory.path))
    server = _make_server(config, communicator, group, run, shares, preemption)
    trainer.tokenizer = data.tokenizer_path.read_bytes()
    if communicator.rank == 0:
        trainer.metrics = open_log(config, trainer.ending.last_step, trainer.step)
    try:
        for sentence in [*run_directory.changed_settings, *sentences]:
            run.tell(sentence)
        trainer.ending.begin()
        if trainer.validation.was_cut_off(trainer.step):
            trainer.validation.run(preemption)
        entrances = _entrances(communicator, mailbox)
        mailbox.open(token, _first_answer(config, data, shares, entrances[1:]) if not communicator.rank else _answer)
        communicator.barrier()  # all servers let workers in, of whom the first one tells
        host, _ = config.server.endpoint
        if communicator.rank == 0:
            parameters = f"{parameter_count(config.model, vocab_size):,}"
            servers = f"{communicator.size} server{'s' if communicator.size > 1 else ''}"
            logger.info("%s parameters, %s, %d CPU threads each", parameters, servers, threads)
        run.tell(f"listens at {host}:{mailbox.port}; workers need the token in {run_directory.path / FILE}")
        finished = server.serve(trainer.step)
        trainer.ending.tell()
    finally:
        if trainer.metrics is not None:
            trainer.metrics.close()
    if finished and communicator.rank == 0:
        draw_at_end(run_directory.path)
    elif communicator.rank == 0:
        logger.warning("stopped after step %d; go on with --resume latest", trainer.step)
    return finished


def _make_server(
    config: Config, communicator: Communicator, group: ServerGroup, run: _Run, shares: int, preemption: Preemption
) -> IndependentServer | IndependentFollower:
    owned, activity, plan = run.strategy.owned, communicator.activity, step_plan(config, shares)
    settings, patience = config.server, config.comm.timeout * plan.rounds.every

    def stops() -> bool:
        return preemption.requested

    if communicator.rank:
        return IndependentFollower(owned, group, activity, settings, plan.rounds, stops, run)
    return IndependentServer(owned, group, activity, settings, plan, stops, run, patience)


def _first_answer(
    config: Config, data: DataSet, shares: int, others: Sequence[Entrance]
) -> Callable[[dict[str, Any]], Admission | str]:
    """What the first server tells a worker, or why it does not want it."""
    numbers = itertools.count()

    def answer(said: dict[str, Any]) -> Admission | str:
        return difference(config, data, said) or Admission(next(numbers), shares, others)

    return answer


def _answer(said: dict[str, Any]) -> Admission | None:
    """What another server tells it, which the first one has let in."""
    number = number_in(said)
    return None if number is None else Admission(number)


class _Run:
    """What the process does beside serving, as the server asks it to."""

    def __init__(self, trainer: Trainer, mailbox: ServerMailbox, shares: int, preemption: Preemption) -> None:
        assert isinstance(trainer.strategy, ServedModel)
        self.strategy = trainer.strategy
        self._trainer, self._mailbox, self._preemption = trainer, mailbox, preemption
        self._shares = ShareTraining(trainer, shares)
        self._sent_bytes = 0  # up to the last step

    def train_on(self, task: int, first: int) -> tuple[float, int]:
        trainer = self._trainer
        with self.strategy.evaluation_parameters():
            pushed, loss, tokens = self._shares.make_on_server(task, first)
        trainer.communicator.activity.idle()
        self.strategy.owned.add_own(pushed)
        for each in trainer.model.parameters():
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
        self._trainer.communicator.activity.idle()  # workers may take any time

    def tell(self, sentence: str) -> None:
        self._trainer.write("event", message=sentence)
