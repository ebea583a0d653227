"""`hvdlm train` and its dry run, from settings to exit status."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from hvdlm.comm.launch import detect, leave_word_to_rank_0
from hvdlm.comm.rank_errors import on_all_ranks, on_rank_0
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.exit_status import STOPPED_EARLY
from hvdlm.gradients.channel import may_sum_by_engine
from hvdlm.model.presets import PRESETS
from hvdlm.model.size import parameter_count
from hvdlm.strategies.server.group import ServerGroup, join_server_group
from hvdlm.training.agreement import check_data_matches, check_devices_match
from hvdlm.training.asynchronous import AsynchronousTraining
from hvdlm.training.dry_run import print_dry_run
from hvdlm.training.elastic import check_elastic
from hvdlm.training.hardware import keep_memory, share_cores
from hvdlm.training.initial_weights import shape_of
from hvdlm.training.job import job
from hvdlm.training.metrics import MetricsLog
from hvdlm.training.out_of_memory import out_of_memory_errors
from hvdlm.training.preemption import Preemption
from hvdlm.training.rank_start import begin, start_rank, vocabulary_size
from hvdlm.training.run_directory import RunDirectory
from hvdlm.training.run_log import draw_at_end, open_log
from hvdlm.training.serving import serve
from hvdlm.training.tensorboard import check_tensorboard
from hvdlm.training.trainer import Trainer
from hvdlm.training.weights_and_biases import check_weights_and_biases

logger = logging.getLogger(__name__)

_LESS_MEMORY = "lower train.micro_batch_size or set train.activation_checkpointing; --dry-run estimates what is needed"


def read_config(path: Path, overrides: Sequence[str]) -> Config:
    """The settings in a file and in options. An error in them, which all ranks find, is printed once."""
    try:
        return load(path, overrides, PRESETS, shape_of)
    except HvdlmError:
        leave_word_to_rank_0(os.environ)
        raise


def dry_run(config: Config, ranks: int | None = None) -> int:
    """Prints what `train` would do on so many ranks; None: those that this launcher has started."""
    launch = detect(os.environ)
    if launch.rank == 0:
        launch = replace(launch, size=ranks or launch.size)
        vocab_size = config.model.vocab_size or vocabulary_size(config, DataSet(Path(config.data.path)))
        print_dry_run(config, vocab_size, launch)
    return 0


def train(config: Config, resume: str | None, config_file: Path | None = None) -> int:
    """Trains as configured, by settings that were read from `config_file`.

    `resume`: a checkpoint's path, or "latest" of the run directory, or None for a new run.

    Returns 0 after the last step, STOPPED_EARLY after a signal.
    """
    keep_memory()
    engine_sums = may_sum_by_engine(config.comm, config.compression)
    run_directory = RunDirectory(Path(config.train.run_dir))
    with (
        closing(run_directory),
        Preemption(config.train.stop_signals.split(",")) as preemption,
        job(config.comm.engine, config.comm.timeout, config.digest(), config.comm.elastic, engine_sums) as communicator,
    ):
        preemption.renew()
        check_elastic(config, communicator)
        for check in (check_tensorboard, check_weights_and_biases):  # on all ranks: any may become rank 0
            on_all_ranks(communicator, partial(check, config.log))
        data, vocab_size, device, threads = start_rank(config, communicator)
        if communicator.supports("join"):
            communicator.after_regroup += [
                lambda: check_data_matches(communicator, data),
                lambda: check_devices_match(communicator, device, config),
                lambda: share_cores(config.train.threads, communicator),
            ]
        servers: ServerGroup | None = None
        if config.server.ranks:
            servers, communicator = join_server_group(communicator, config, device)
            if servers.is_server:
                return serve(servers, config, vocab_size, communicator, lambda: preemption.requested)
        with out_of_memory_errors(_LESS_MEMORY):
            trainer = Trainer(config, communicator, data, vocab_size, device, servers)
        trainer.task_scores.load()
        sentences: list[str] = []
        if not communicator.is_new:
            state = on_rank_0(communicator, lambda: run_directory.open(config, config_file, resume, data, vocab_size))
            sentences = begin(trainer, state)
        train_all_steps = (
            AsynchronousTraining(trainer).train
            if config.server.max_staleness
            else partial(trainer.train, on_all_ranks(communicator, trainer.open_loader))
        )

        def take_over(step: int) -> MetricsLog:
            run_directory.take_over(config)
            return open_log(config, trainer.ending.last_step, step, takes_over=True)

        trainer.open_metrics = take_over
        if communicator.rank == 0 and not communicator.is_new:
            logger.info(
                "%s parameters, %d ranks on %d nodes, %s, %d CPU threads a rank",
                f"{parameter_count(config.model, vocab_size):,}",
                communicator.size,
                communicator.node_count,
                device.type,
                threads,
            )
            trainer.metrics = open_log(config, trainer.ending.last_step, trainer.step)
            sentences += trainer.sentences + (trainer.privacy.sentences() if trainer.privacy else [])
            for sentence in [*run_directory.changed_settings, *sentences]:
                trainer.metrics.write("event", trainer.step, message=sentence)
        try:
            with out_of_memory_errors(_LESS_MEMORY):
                finished = train_all_steps(preemption)
        finally:
            if trainer.metrics is not None:
                trainer.metrics.close()
        status = 0 if finished else STOPPED_EARLY
        if servers is not None:
            servers.end(status, communicator)
        if communicator.rank == 0:
            if finished:
                draw_at_end(run_directory.path)
            else:
                logger.warning("stopped after step %d; go on with --resume latest", trainer.step)
    return status
