"""Ranks as barrier tasks of a Spark cluster."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark import BarrierTaskContext
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from hvdlm.errors import HvdlmError
from hvdlm.launch.job import Job, RanksLostError, run_attempts
from hvdlm.launch.rank import Outcome, Place, environment_of, own_place, run_rank


def train(job: Job, address: str = "") -> int:
    """Trains on a cluster that is up, and returns the exit status.

    `address`: a master, as Spark takes it; empty: of spark-submit or Spark's configuration. A task has the cores and
    GPUs that spark.task.cpus and spark.task.resource.gpu.amount say. Raises HvdlmError if there is no session to be had
    or not enough room, or if the job has failed too often.
    """
    try:
        # hvdlm counts attempts itself
        builder = SparkSession.builder.appName("hvdlm").config("spark.stage.maxConsecutiveAttempts", "1")
        session = (builder.master(address) if address else builder).getOrCreate()
    except (PySparkException, Py4JError) as error:
        first = str(error).strip().splitlines()[0]
        raise HvdlmError(
            f"no Spark session with master {address!r} ({first}); name one that is up, and install Java"
        ) from None
    slots = session.sparkContext.defaultParallelism
    if slots < job.ranks:
        raise HvdlmError(f"--ranks {job.ranks}, but {session.sparkContext.master} has {slots} slots: name as many")
    return run_attempts(job, lambda: _attempt(job, session))


def _attempt(job: Job, session: SparkSession) -> list[Outcome]:
    """All ranks at once: a barrier stage has all of its tasks, or none."""
    tasks = session.sparkContext.parallelize(range(job.ranks), job.ranks).barrier()
    try:
        return tasks.mapPartitions(partial(_run, job.settings)).collect()
    except Py4JJavaError as error:
        said = str(error.java_exception.getMessage())
        if "SPARK-24819" in said:
            raise HvdlmError(f"--ranks {job.ranks}, but this Spark cluster has fewer slots: name as many") from None
        raise RanksLostError(f"a task of Spark has died ({said.splitlines()[0]})") from None


def _run(settings: str, _: Iterable[int]) -> Iterator[Outcome]:
    """A task."""
    context = BarrierTaskContext.get()
    rank = context.partitionId()
    own = own_place(address=context.getTaskInfos()[rank].address.rpartition(":")[0].strip("[]"))
    places = [Place(*json.loads(each)) for each in context.allGather(json.dumps(own))]
    environment = environment_of(rank, places)
    if gpus := context.resources().get("gpu"):
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus.addresses)}
    yield run_rank(settings, environment)
