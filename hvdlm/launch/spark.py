"""Ranks as barrier tasks of a Spark cluster."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial

from py4j.protocol import Py4JJavaError
from pyspark import BarrierTaskContext
from pyspark.sql import SparkSession

from hvdlm.errors import HvdlmError
from hvdlm.launch.job import Job, RanksLostError, run_attempts
from hvdlm.launch.rank import Outcome, Place, environment_of, own_place, run_rank


def train(job: Job, master: str = "") -> int:
    """Trains on a cluster that is up, and returns the exit status.

    `master`: as Spark takes it; empty: of spark-submit or Spark's configuration. A task has the cores and GPUs that
    spark.task.cpus and spark.task.resource.gpu.amount say. Raises HvdlmError if the job has failed too often.
    """
    builder = SparkSession.builder.appName("hvdlm")
    session = (builder.master(master) if master else builder).getOrCreate()
    slots = session.sparkContext.defaultParallelism
    if str(session.sparkContext.master).startswith("local") and slots < job.ranks:
        raise HvdlmError(f"--ranks {job.ranks}, but {session.sparkContext.master} has {slots} slots: name as many")
    return run_attempts(job, lambda: _attempt(job, session))


def _attempt(job: Job, session: SparkSession) -> list[Outcome]:
    """All ranks at once: a barrier stage has all of its tasks, or none."""
    tasks = session.sparkContext.parallelize(range(job.ranks), job.ranks).barrier()
    try:
        return tasks.mapPartitions(partial(_run, job.settings)).collect()
    except Py4JJavaError as error:
        raise RanksLostError(
            f"a task of Spark has died ({str(error.java_exception.getMessage()).splitlines()[0]})"
        ) from None


def _run(settings: str, _: Iterable[int]) -> Iterator[Outcome]:
    """A task."""
    context = BarrierTaskContext.get()
    rank = context.partitionId()
    own = own_place(address=context.getTaskInfos()[rank].address.partition(":")[0])
    places = [Place(*json.loads(each)) for each in context.allGather(json.dumps(own))]
    yield run_rank(settings, environment_of(rank, places))
