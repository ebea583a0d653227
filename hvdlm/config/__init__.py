"""Every setting hvdlm has: one typed section each.

A setting is declared once, here, with its type, its bounds, its default and its meaning. config_reader.py makes a
`Config` of TOML and a command line.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left

import tomli_w
from pydantic import Field, model_validator

from hvdlm.config.balance_misfits import balance_misfits
from hvdlm.config.comm import CommSection, CompressionSection
from hvdlm.config.data import DataSection
from hvdlm.config.local_steps import LocalStepsSection
from hvdlm.config.model import ModelSection
from hvdlm.config.optimizer import Algorithm, OptimizerSection
from hvdlm.config.output import CheckpointSection, LogSection
from hvdlm.config.parallel import ParallelSection
from hvdlm.config.parallel_misfits import parallel_misfits
from hvdlm.config.privacy import PrivacySection, masking_misfits, privacy_misfits
from hvdlm.config.section import Section
from hvdlm.config.server import ServerSection, server_misfits
from hvdlm.config.train import Precision, TrainSection

__all__ = [
    "Algorithm",
    "CheckpointSection",
    "CommSection",
    "CompressionSection",
    "Config",
    "DataSection",
    "LocalStepsSection",
    "LogSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "Precision",
    "PrivacySection",
    "Section",
    "ServerSection",
    "TrainSection",
]


class Config(Section):
    """All sections. `config_reader.load` makes one."""

    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    comm: CommSection = Field(default_factory=CommSection)
    compression: CompressionSection = Field(default_factory=CompressionSection)
    local_steps: LocalStepsSection = Field(default_factory=LocalStepsSection)
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    server: ServerSection = Field(default_factory=ServerSection)
    privacy: PrivacySection = Field(default_factory=PrivacySection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    log: LogSection = Field(default_factory=LogSection)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        optimizer, local_steps, compression = self.optimizer, self.local_steps, self.compression
        is_dion = optimizer.algorithm == "dion"
        has_warmup = optimizer.schedule != "range_test"
        steps = f"train.steps = {self.train.steps}"
        if self.planned_steps < self.train.steps:
            steps = f"the {self.planned_steps} steps of train.max_tokens = {self.train.max_tokens}"
        misfits = {
            f"optimizer.warmup_steps = {optimizer.warmup_steps} is more than {steps}": (
                optimizer.warmup_steps > self.planned_steps and has_warmup
            ),
            f"optimizer.decay_steps = {optimizer.decay_steps} does not fit between optimizer.warmup_steps = "
            f"{optimizer.warmup_steps} and {steps}": (
                optimizer.decay_steps > self.planned_steps - optimizer.warmup_steps and has_warmup
            ),
            "compression.codec = 'auto' chooses by the gradients of every step: name a codec for local_steps.every": (
                bool(local_steps.every) and compression.codec == "auto"
            ),
            "local_steps.hierarchical combines the ranks of a node every step, compression.hierarchical only where a "
            "codec is used: set one of them": local_steps.hierarchical and compression.hierarchical,
            "optimizer.algorithm = 'dion' exchanges momentum at every step: it does not go with local_steps.every": (
                is_dion and bool(local_steps.every)
            ),
            "train.ema averages the weights that all ranks have in common after every step: it does not go with "
            "local_steps.every": self.train.ema > 0 and bool(local_steps.every),
            "compression.codec = 'auto' chooses for the gradients of all parameters: name a codec for those that "
            "optimizer.algorithm = 'dion' leaves to AdamW": is_dion and compression.codec == "auto",
            "comm.elastic = true goes neither with local_steps.hierarchical nor with local_steps.by = 'seconds': leave "
            "out one of them": (
                self.comm.elastic
                and bool(local_steps.every)
                and (local_steps.hierarchical or local_steps.by == "seconds")
            ),
            "comm.mirror_residuals = true needs comm.elastic = true": (
                self.comm.mirror_residuals and not self.comm.elastic
            ),
            "comm.mirror_residuals = true sends the residuals of gradients, not of local steps: leave it out": (
                self.comm.mirror_residuals and bool(local_steps.every)
            ),
            **balance_misfits(self),
            **parallel_misfits(self),
            **server_misfits(self),
            **masking_misfits(self),
            **privacy_misfits(self),
            f"optimizer.dion_rank = {optimizer.dion_rank:g} is more than model.width = {self.model.width}": (
                is_dion and optimizer.dion_rank > self.model.width
            ),
        }
        if found := [sentence for sentence, is_wrong in misfits.items() if is_wrong]:
            raise ValueError(found[0])
        return self

    @property
    def planned_steps(self) -> int:
        """After which training ends, unless by time or by validation before: by `train.steps` or `train.max_tokens`."""
        if not self.train.max_tokens:
            return self.train.steps
        return bisect_left(range(self.train.steps), self.train.max_tokens, key=self.tokens_before)

    @property
    def steps_of_served_round(self) -> int:
        """Global batches from one version of the parameters that servers keep to the next: more than 1 with local
        steps alone, and 1 without servers.
        """
        every = self.local_steps.every
        return every if self.server.is_used and isinstance(every, int) and every else 1

    def tokens_before(self, step: int) -> int:
        """Tokens of the global batches of the first `step` steps."""
        return self.train.batch_sizes.before(step) * self.model.context_length

    def to_toml(self) -> str:
        """This configuration as the text of a TOML file that `config_reader.load` reads back to an equal one."""
        return tomli_w.dumps(self.model_dump())

    def digest(self) -> str:
        """SHA-256 (hex) over every setting: equal on two ranks exactly if they were configured alike."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()
