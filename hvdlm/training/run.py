"""`hvdlm train` and its dry run, from settings to exit status."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from hvdlm.comm.launch import detect
from hvdlm.config import Config, from_dict
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError, JobError
from hvdlm.exit_status import STOPPED_EARLY
from hvdlm.model.presets import PRESETS
from hvdlm.model.size import parameter_count
from hvdlm.training import checkpoint
from hvdlm.training.agreement import check_data_matches, check_devices_match
from hvdlm.training.console import open_view
from hvdlm.training.dry_run import print_dry_run
from hvdlm.training.hardware import choose_device, keep_memory, share_cores
from hvdlm.training.job import job
from hvdlm.training.loss_curve import draw_loss_curve
from hvdlm.training.metrics import MetricsLog
from hvdlm.training.model import check_compiler
from hvdlm.training.preemption import Preemption
from hvdlm.training.rank_errors import on_all_ranks, on_rank_0
from hvdlm.training.trainer import Trainer

logger = logging.getLogger(__name__)


def dry_run(config: Config) -> int:
    """Prints what `train` would do on the ranks that this launcher has started."""
    launch = detect(os.environ)
    if launch.rank == 0:
        vocab_size = config.model.vocab_size or _vocab_size(config, DataSet(Path(config.data.path)))
        print_dry_run(config, vocab_size, launch)
    return 0


def train(config: Config, resume: str | None) -> int:
    """Trains as configured; `resume`: a checkpoint's path, or "latest" of the run directory, or None for a new run.

    Returns 0 after the last step, STOPPED_EARLY after a signal.
    """
    keep_memory()
    with Preemption() as preemption, job(config.comm.engine, config.comm.timeout, config.digest()) as communicator:
        data = on_all_ranks(communicator, lambda: DataSet(Path(config.data.path)))
        check_data_matches(communicator, data)
        vocab_size = _vocab_size(config, data)
        device = choose_device(config.train.device, communicator)
        check_devices_match(communicator, device, config)
        on_all_ranks(communicator, lambda: check_compiler(config, device))
        threads = share_cores(config.train.threads, communicator)
        trainer = Trainer(config, communicator, data, vocab_size, device)
        state = on_rank_0(communicator, lambda: _open_run(config, resume, data, vocab_size))
        if state is not None:
            source = checkpoint.Checkpoint(Path(state["path"])) if communicator.rank == 0 else None
            trainer.restore(source, state)
        loader = on_all_ranks(communicator, trainer.open_loader)
        if communicator.rank == 0:
            logger.info(
                "%s parameters, %d ranks on %d nodes, %s, %d CPU threads a rank",
                f"{parameter_count(config.model, vocab_size):,}",
                communicator.size,
                communicator.node_count,
                device.type,
                threads,
            )
            steps = config.train.steps
            if trainer.step >= steps:
                logger.info("all %d steps are done: nothing to train; raise train.steps to go on", steps)
            trainer.metrics = MetricsLog(Path(config.train.run_dir), trainer.step, open_view(steps, trainer.step))
        try:
            with loader:
                finished = trainer.train(loader, preemption)
        finally:
            if trainer.metrics is not None:
                trainer.metrics.close()
        if communicator.rank == 0:
            if finished:
                draw_loss_curve(Path(config.train.run_dir))
            else:
                logger.warning("stopped by a signal after step %d; go on with --resume latest", trainer.step)
    return 0 if finished else STOPPED_EARLY


def _vocab_size(config: Config, data: DataSet) -> int:
    if config.model.vocab_size and config.model.vocab_size < data.vocab_size:
        raise JobError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {data.vocab_size} of {data.path}: "
            f"set it to {data.vocab_size} or more, or to 0 for the data set's own"
        )
    return config.model.vocab_size or data.vocab_size


def _open_run(config: Config, resume: str | None, data: DataSet, vocab_size: int) -> dict[str, Any] | None:
    """Prepares the run directory, and returns the state of the checkpoint to resume, if any. On rank 0 alone."""
    run_dir = Path(config.train.run_dir)
    if resume is None and (run_dir / "metrics.jsonl").exists():
        raise HvdlmError(
            f"{run_dir} already holds a run: go on with it by --resume latest, or choose another train.run_dir"
        )
    state = None
    if resume is not None and not (resume == "latest" and not checkpoint.exists_in(run_dir)):
        state = checkpoint.open_state(run_dir if resume == "latest" else Path(resume))
        _check_resumable(state, config, data, vocab_size)
        checkpoint.set_latest(Path(state["path"]), run_dir)
        logger.info("resuming from %s, step %d", state["path"], state["step"])
    elif resume == "latest":
        logger.info("%s holds no checkpoint yet: beginning anew", run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    except OSError as error:
        raise HvdlmError(f"cannot write to train.run_dir = {run_dir}: {error.strerror}") from None
    return state


def _check_resumable(state: dict[str, Any], config: Config, data: DataSet, vocab_size: int) -> None:
    """Raises HvdlmError unless model, data and order of samples are those of the checkpoint; the rest may differ."""
    saved, now = from_dict(state["config"], state["path"], PRESETS).model_dump(), config.model_dump()
    fixed = [("model", name) for name in now["model"] if name != "preset"]
    fixed += [("train", "seed"), ("train", "global_batch_size")]
    for section, name in fixed:
        if saved[section][name] != now[section][name]:
            raise HvdlmError(
                f"{state['path']} was made with {section}.{name} = {saved[section][name]!r}, not "
                f"{now[section][name]!r}: resume with the same, or begin a new run in another train.run_dir"
            )
    if state["fingerprint"] != data.fingerprint or state["vocab_size"] != vocab_size:
        raise HvdlmError(f"{state['path']} was trained on another data set than {data.path}: give data.path the same")
