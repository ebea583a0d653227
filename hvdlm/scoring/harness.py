"""Runs tasks of lm-evaluation-harness, which `pip install hvdlm[lm-eval]` brings."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from hvdlm.errors import HvdlmError, check_installed
from hvdlm.scoring.distributed_model import DistributedModel

logger = logging.getLogger(__name__)

# Of what tasks draw, and of the examples that they choose: those of the harness's own command
_SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "examples": 1234}

_BOOTSTRAP_SAMPLES = 100_000  # for standard errors that have no closed form, as of the harness's own command

# What the libraries below the harness read when they are imported: no reports of downloads over a network that may not
# answer, and no processes forked from one that holds connections and perhaps a GPU.
_ENVIRONMENT = {
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_MULTIPROC": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def check_harness(wanted_by: str) -> None:
    """Raises HvdlmError if the harness is not installed; `wanted_by` begins the sentence."""
    check_installed("lm_eval", wanted_by, "lm_eval", "lm-eval")


def split_names(text: str) -> list[str]:
    """The names of tasks, and paths of their files, in text with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


class Score(NamedTuple):
    """One number of a task, or of a group of tasks."""

    task: str
    metric: str  # with the name of a filter of answers after a comma, where a task has one
    value: float
    standard_error: float | None


def scores_of(results: dict[str, Any]) -> list[Score]:
    """All numbers in what `Tasks.score` returns."""
    found = []
    for task, numbers in results["results"].items():
        for key, value in numbers.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            error = numbers.get(f"{metric}_stderr,{name}")
            whole = metric if name == "none" else key
            found.append(Score(task, whole, float(value), float(error) if isinstance(error, Real) else None))
    return found


class Tasks:
    """Some tasks, groups of tasks and tags of the harness, with their data. Rank 0 has them."""

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        """`names`: of tasks, or paths of task files; `include_path`: a folder of task files whose names are known, too.

        Data that a task names are downloaded if they are not in the cache of Hugging Face's datasets. Raises HvdlmError
        for an unknown name, or a task that cannot be loaded.
        """
        if not names:
            raise HvdlmError("no task is named: give names of lm-evaluation-harness, or paths of task files")
        if include_path is not None and not include_path.is_dir():
            raise HvdlmError(f"{include_path} is no folder of task files")
        if missing := [name for name in names if name.endswith((".yaml", ".yml")) and not Path(name).is_file()]:
            raise HvdlmError(f"there is no task file {missing[0]}")
        manager = _manager(names, include_path)
        if unknown := _unknown(names, manager):
            raise HvdlmError(
                f"{unknown[0]!r} is neither a task of lm-evaluation-harness {version('lm_eval')} nor a task file: "
                "`lm-eval ls tasks` lists the former"
            )
        try:
            self._loaded = manager.load(list(names))
        except Exception as error:  # of many libraries, for want of a file, a network or a field
            raise HvdlmError(f"cannot load the tasks {', '.join(names)}: {_said(error)}") from error

    def score(
        self,
        model: DistributedModel,
        few_shot: int | None = None,
        limit: int | None = None,
        standard_errors: bool = True,
        log_samples: bool = False,
    ) -> dict[str, Any]:
        """What the harness returns: `results` by task, and more. Within `model.leading`.

        `few_shot`: examples before each question, None for what each task says; `limit`: questions of each task, None
        for all. Random-number generators are as before. Raises HvdlmError if a task fails.
        """
        import numpy
        import torch
        from lm_eval import evaluate

        from hvdlm.scoring.harness_model import HarnessModel

        random_state, numpy_state = random.getstate(), numpy.random.get_state()
        try:
            for task in self._loaded["tasks"].values():
                _set_examples(task, few_shot)
            with torch.random.fork_rng(devices=[]), _without_progress_bars():
                random.seed(_SEEDS["random"])
                numpy.random.seed(_SEEDS["numpy"])
                torch.default_generator.manual_seed(_SEEDS["torch"])  # and not those of GPUs
                results: dict[str, Any] = evaluate(
                    HarnessModel(model),
                    self._loaded,
                    limit=limit,
                    bootstrap_iters=_BOOTSTRAP_SAMPLES if standard_errors else 0,
                    log_samples=log_samples,
                )
        except Exception as error:
            if model.ranks_have_failed or isinstance(error, HvdlmError):
                raise
            raise HvdlmError(f"lm-evaluation-harness cannot score the tasks: {_said(error)}") from error
        finally:
            random.setstate(random_state)
            numpy.random.set_state(numpy_state)
        return results


def _set_examples(task: Any, few_shot: int | None) -> None:
    """As the harness's own command does: a task that is set to 0 stays so, and one that is not set gets 0."""
    own = task.get_config("num_fewshot")
    if own is None or (few_shot is not None and own != 0):
        task.set_config(key="num_fewshot", value=few_shot or 0)
    task.set_fewshot_seed(seed=_SEEDS["examples"])


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """A TaskManager that knows the tasks: the harness's own 15,000, which takes seconds, only where they may be meant,
    also as members of a group."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = TaskManager(include_path=include_path, include_defaults=False)
    if not _unknown(names, own) and not own.all_groups:
        return own
    return TaskManager(include_path=include_path)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """One for each task, which the harness draws wherever stderr goes."""
    from lm_eval.api import task

    tqdm = task.tqdm
    task.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        task.tqdm = tqdm


def _unknown(names: Sequence[str], manager: Any) -> list[str]:
    known = set(manager.all_tasks)
    return [name for name in names if name not in known and not Path(name).is_file()]


def _said(error: Exception) -> str:
    """What an exception of another library says, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
