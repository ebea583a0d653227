"""`[train]`."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from hvdlm.arguments import duration
from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.config.section import Section, UserPath, check_optional_duration, check_signals

Precision = Literal["fp32", "bf16", "fp16"]


class TrainSection(Section):
    """`[train]`: steps, batches, precision, device."""

    steps: int = Field(1000, gt=0, description="optimizer steps")
    max_tokens: int = Field(
        0,
        ge=0,
        description="training, and the learning rate's schedule, end after so many, if not by steps; 0: never",
    )
    max_time: Annotated[str, AfterValidator(check_optional_duration)] = Field(
        "", description="training ends with the step in which all starts of a run have trained so long: 90s, 30min, 2h"
    )
    patience: int = Field(
        0, ge=0, description="training ends when so many validations in a row were no better than the best; 0: never"
    )
    ranks: int = Field(
        0, ge=0, description="a job of another number of ranks is refused: a launcher may start fewer; 0: none is"
    )
    nodes: int = Field(
        0, ge=0, description="a job on another number of hosts is refused: a launcher may not see all; 0: none is"
    )
    global_batch_size: int = Field(32, gt=0, description="sequences per optimizer step, over all ranks")
    batch_ramp_start: int = Field(
        0, ge=0, description="sequences of a step at first, where they then grow to global_batch_size; 0: they do not"
    )
    batch_ramp_increment: int = Field(
        0, ge=0, description="by how many sequences a step grows at a time; 0: by batch_ramp_start"
    )
    batch_ramp_steps: int = Field(
        0, ge=0, description="steps before the first of global_batch_size sequences, as many of them of each size"
    )
    micro_batch_size: int = Field(
        8, gt=0, description="sequences a rank computes at once; gradients of several are accumulated"
    )
    precision: Precision = Field("fp32", description="arithmetic of forward and backward; master weights are fp32")
    balance: bool = Field(
        False,
        description="sequences of a batch are dealt out by how fast each rank computes, as it is measured in training",
    )
    balance_every: int = Field(
        8, ge=5, description="steps over which that is measured each time, after which shares may change"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of initialisation, sample order and dropout")
    stop_signals: Annotated[str, AfterValidator(check_signals)] = Field(
        "SIGTERM,SIGINT,SIGHUP,SIGUSR1",
        description="signals at which all ranks finish the step, save and exit with 75; a second SIGINT ends at once",
    )
    run_dir: UserPath = Field(
        "runs/default", min_length=1, description="where config, metrics, checkpoints and pictures go"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    threads: int = Field(0, ge=0, description="CPU threads a rank; 0: OMP_NUM_THREADS, or the cores shared among ranks")
    compile: bool = Field(False, description="torch.compile, block by block so that communication still overlaps")
    activation_checkpointing: bool = Field(
        False, description="blocks keep only their input and are computed again in the backward pass"
    )
    deterministic: bool = Field(
        False,
        description="only kernels that sum in one order: bit-for-bit resuming on GPUs needs it, and it costs time",
    )
    evaluate_every: int = Field(0, ge=0, description="steps between validations; 0: only at the end")
    evaluate_sequences: int = Field(0, ge=0, description="validation sequences each time; 0: all")
    evaluate_tasks: str = Field(
        "",
        description="tasks of lm-evaluation-harness, or paths of task files, with commas between them, to be scored "
        "after each validation",
    )
    max_skipped: int = Field(
        10, ge=0, description="steps in a row that may be left out because a gradient is NaN or infinite"
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of a moving average of weights, validated and saved beside them: 0.999, say; 0: none",
    )
    check_replicas_every: int = Field(100, ge=0, description="steps between parameter hash comparisons; 0: never")
    heal_replicas: bool = Field(
        False,
        description="a rank whose parameters are found to differ gets those of most ranks, of two those of rank 0; "
        "otherwise the job ends",
    )

    @model_validator(mode="after")
    def _ramp_fits(self) -> TrainSection:
        start, final, steps = self.batch_ramp_start, self.global_batch_size, self.batch_ramp_steps
        if not start:
            for name in ("batch_ramp_increment", "batch_ramp_steps"):
                if getattr(self, name):
                    raise ValueError(f"train.{name} = {getattr(self, name)} needs train.batch_ramp_start")
            return self
        if start >= final:
            raise ValueError(f"train.batch_ramp_start = {start} is not less than train.global_batch_size = {final}")
        increment = self.batch_ramp_increment or start
        increments, rest = divmod(final - start, increment)
        if rest:
            raise ValueError(
                f"a batch that grows by {increment} sequences at a time does not come from train.batch_ramp_start = "
                f"{start} to train.global_batch_size = {final}: set train.batch_ramp_increment to a divisor of "
                f"{final - start}"
            )
        if steps < increments:
            raise ValueError(
                f"train.batch_ramp_steps = {steps} is less than the {increments} times that the batch grows by "
                f"{increment} sequences"
            )
        return self

    @property
    def batch_sizes(self) -> BatchSizes:
        """How many sequences each global batch has."""
        if not self.batch_ramp_start:
            return BatchSizes(self.global_batch_size)
        increment = self.batch_ramp_increment or self.batch_ramp_start
        increments = (self.global_batch_size - self.batch_ramp_start) // increment
        return BatchSizes(self.global_batch_size, increment, increments, self.batch_ramp_steps)

    @property
    def max_seconds(self) -> float:
        """`max_time`; infinite if there is no limit."""
        return duration(self.max_time) if self.max_time else math.inf
