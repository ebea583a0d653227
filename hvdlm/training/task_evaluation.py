"""`hvdlm lm-eval`, and `train.evaluate_tasks`: what a model scores in tasks of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hvdlm.comm.rank_errors import on_all_ranks, on_rank_0
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError, JobError, write_failure
from hvdlm.scoring.distributed_model import DistributedModel, StopRequestedError, double_precision
from hvdlm.scoring.harness import Tasks, check_harness, scores_of, split_names
from hvdlm.training.agreement import check_devices_match
from hvdlm.training.hardware import choose_device, share_cores
from hvdlm.training.job import job
from hvdlm.training.out_of_memory import out_of_memory_errors
from hvdlm.training.preemption import Preemption
from hvdlm.training.trained_model import TrainedModel, load_model, open_trained

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer


def lm_eval(
    path: Path,
    names: str,
    include_path: Path | None,
    few_shot: int | None,
    limit: int | None,
    batch_size: int,
    engine: str,
    output: Path | None,
    log_samples: bool,
    averaged: bool,
) -> int:
    """Prints what the model of a checkpoint scores in tasks, and writes it to a JSON file. Returns the exit status.

    `averaged`: of the moving average of its weights. The file is the same, byte for byte, for any batch size and number
    of ranks.
    """
    options = (str(path), names, str(include_path), few_shot, limit, batch_size, str(output), log_samples, averaged)
    with job(engine, timeout=300, config_digest=hashlib.sha256(repr(options).encode()).hexdigest()) as communicator:
        for option, value, least in (("batch-size", batch_size, 1), ("limit", limit, 1), ("num-fewshot", few_shot, 0)):
            if value is not None and value < least:
                raise JobError(f"--{option} {value}: give {least} or more")
        if log_samples and output is None:
            raise JobError("--log-samples goes into the file of --output: give one")
        tasks: list[Tasks] = []  # of rank 0

        def prepare() -> TrainedModel:
            if output is not None and (output.is_dir() or not output.parent.is_dir()):
                raise HvdlmError(f"--output {output}: give the name of a file in a folder that is there")
            check_harness("hvdlm lm-eval")
            trained = open_trained(path)
            tasks.append(Tasks(split_names(names), include_path))
            return trained

        trained = on_rank_0(communicator, prepare)
        device = choose_device("auto", communicator)
        check_devices_match(communicator, device)
        share_cores(0, communicator)
        results: dict[str, Any] = {}
        with out_of_memory_errors("lower --batch-size"):
            model = load_model(trained, averaged, communicator).double().to(device)
            distributed = DistributedModel(model, trained.tokenizer, communicator, batch_size)
            if communicator.rank == 0:
                with distributed.leading():
                    results = tasks[0].score(distributed, few_shot, limit, log_samples=log_samples)
            else:
                distributed.follow()
        if output is not None:
            on_rank_0(communicator, lambda: _write(output, trained.state, results))
        if communicator.rank == 0:
            _print(str(trained.state["path"]), results)
    return 0


_KEPT = ("results", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "samples")


def _write(output: Path, state: dict[str, Any], results: dict[str, Any]) -> None:
    """Replaces `output` at once. Raises HvdlmError if it cannot be written."""
    from lm_eval.utils import handle_non_serializable

    kept = {key: results[key] for key in _KEPT if key in results}
    record = {"checkpoint": str(state["path"]), "step": state["step"], "lm_eval": version("lm_eval"), **kept}
    partial = output.with_name(f".{output.name}.partial")
    try:
        text = json.dumps(record, indent=2, ensure_ascii=False, default=handle_non_serializable)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise HvdlmError(f"cannot write {output}: {write_failure(error)}") from None


def _print(name: str, results: dict[str, Any]) -> None:
    table = Table(title=name, title_justify="left")
    for column in ("task", "examples", "questions", "metric", "score", "standard error"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for score in scores_of(results):
        error = "" if score.standard_error is None else f"{score.standard_error:.4f}"
        examples = str(results["n-shot"].get(score.task, ""))
        count = results["n-samples"].get(score.task, {}).get("effective")
        questions = "" if count is None else f"{count:,}"
        table.add_row(score.task, examples, questions, score.metric, f"{score.value:.4f}", error)
    Console(highlight=False).print(table)


class TaskScores:
    """Scores the tasks of `train.evaluate_tasks` with the parameters that are validated."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._names = split_names(trainer.config.train.evaluate_tasks)
        self._tasks: Tasks | None = None  # of rank 0, once they are loaded
        self._tokenizer: Tokenizer | None = None

    def __bool__(self) -> bool:
        return bool(self._names)

    def load(self) -> None:
        """Loads the tasks and their data, on rank 0. Collective.

        Raises JobError if some rank, which may become rank 0, has not got the harness, or if a task cannot be loaded.
        """
        if not self._names:
            return
        communicator = self._trainer.communicator
        on_all_ranks(communicator, lambda: check_harness("train.evaluate_tasks"))
        path = self._trainer.data.tokenizer_path
        self._tokenizer = on_all_ranks(communicator, lambda: Tokenizer.load(path))

        on_rank_0(communicator, lambda: bool(self._load_tasks()))

    def score(self, preemption: Preemption) -> bool:
        """Writes the scores after this step, of kind "tasks"; or returns False, as soon as a signal to any rank asks to
        stop. Collective. Raises JobError if a task fails.
        """
        if not self._names:
            return True
        trainer = self._trainer
        assert self._tokenizer is not None
        with trainer.strategy.evaluation_parameters():
            model = double_precision(trainer.model)
        size = trainer.config.train.micro_batch_size
        distributed = DistributedModel(model, self._tokenizer, trainer.communicator, size, lambda: preemption.requested)
        try:
            if trainer.communicator.rank > 0:
                distributed.follow()
                return True
            with distributed.leading():
                tasks = self._tasks or self._load_tasks()  # where this rank has become rank 0
                results = tasks.score(distributed, standard_errors=False)
        except StopRequestedError:
            return False
        trainer.write("tasks", **{f"{each.task}/{each.metric}": each.value for each in scores_of(results)})
        return True

    def _load_tasks(self) -> Tasks:
        try:
            self._tasks = Tasks(self._names)
        except HvdlmError as error:
            raise HvdlmError(f"train.evaluate_tasks: {error}") from error
        return self._tasks
