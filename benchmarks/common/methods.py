"""Ways to combine the work of ranks, as benchmarks name them: `int4`, `int4/4`, `int4/16/4/5`, `dion`, `zero2`,
`zero3:int8`, `zero1:int4:int4` (codecs of gradients and of weights), `tensor`, `pipeline`,
`pipeline:zero_bubble:bf16`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from hvdlm.config import Config
from hvdlm.config.parallel import Schedule
from hvdlm.errors import HvdlmError

# With these codecs a gradient may arrive many steps late. As hvdlm's documentation recommends, they start after a fifth
# of the steps, and AdamW's second moments are frozen from then on.
_LATE_CODECS = ("topk", "topk2", "powersgd")

# The optimizer that exchanges momentum of matrices, and the codec of all other gradients beside it
_DION, _CODEC_BESIDE_DION = "dion", "int4"

# Of the messages between the stages of a pipeline, beside fp32
_BOUNDARIES = ("bf16", "int8")


@dataclass(frozen=True)
class Method:
    """A codec for the gradients of every step, or for the differences of local steps; or the optimizer Dion; or how
    ranks divide a model.
    """

    text: str  # as it was given
    codec: str  # or "dion"
    local_steps: Mapping[str, int]  # settings of that section; none: every step
    zero: int = 0  # ZeRO stage
    weights: str = "none"  # with ZeRO, compression.weights
    dividing: str = ""  # "tensor" or "pipeline": what all ranks divide, matrices or blocks
    schedule: str = ""  # of a pipeline; empty: as configured
    boundary: str = ""  # of a pipeline's messages; empty: as configured

    @property
    def name(self) -> str:
        """As in tables and plots."""
        return f"{self.codec}, every {self.local_steps['every']} steps" if self.local_steps else self.text

    @property
    def steps(self) -> int:
        """From one average of the whole model to the next."""
        return self.local_steps.get("every", 1)

    def apply(self, config: Config, ranks: int = 1) -> Config:
        """`config` with this method's settings, where they are not set already; `ranks`: that divide a model."""
        chosen: dict[str, Any] = {"codec": self.codec, "weights": self.weights}
        optimizer = config.optimizer
        if self.codec == _DION:
            chosen["codec"] = _CODEC_BESIDE_DION
            optimizer = optimizer.model_copy(update={"algorithm": _DION})
        if self.codec in _LATE_CODECS and not self.local_steps:
            first = config.train.steps // 5
            chosen["warmup_steps"] = config.compression.warmup_steps or first
            optimizer = optimizer.model_copy(update={"freeze_variance_after": optimizer.freeze_variance_after or first})
        return config.model_copy(
            update={
                "compression": config.compression.model_copy(update=chosen),
                "local_steps": config.local_steps.model_copy(update=dict(self.local_steps)),
                "optimizer": optimizer,
                "parallel": config.parallel.model_copy(update=self._parallel(config, ranks)),
            }
        )

    def _parallel(self, config: Config, ranks: int) -> dict[str, Any]:
        if self.dividing:
            chosen = {"schedule": self.schedule, "boundary": self.boundary}
            return {self.dividing: ranks, **{name: value for name, value in chosen.items() if value}}
        return {"shard": self.zero or config.parallel.shard}


def parse_method(text: str) -> Method:
    """CODEC, CODEC/EVERY[/FRAGMENTS[/OVERLAP]] for local steps, dion, zeroSTAGE[:CODEC[:WEIGHTS]], tensor or
    pipeline[:SCHEDULE][:bf16 or :int8]. Raises HvdlmError for anything else.
    """
    if sharded := re.fullmatch(r"zero([123])(?::(\w+))?(?::(\w+))?", text):
        stage, codec, weights = sharded.groups(default="none")
        return Method(text, codec, {}, zero=int(stage), weights=weights)
    if text == "tensor":
        return Method(text, "none", {}, dividing=text)
    schedules, boundaries = "|".join(get_args(Schedule)), "|".join(_BOUNDARIES)
    if stages := re.fullmatch(rf"pipeline(?::({schedules}))?(?::({boundaries}))?", text):
        return Method(text, "none", {}, dividing="pipeline", schedule=stages[1] or "", boundary=stages[2] or "")
    if text.startswith("pipeline:"):
        raise HvdlmError(f"{text!r} is no pipeline: give pipeline[:{schedules}][:{boundaries}], as pipeline:1f1b")
    found = re.fullmatch(r"(.+?)(?:/(\d+)(?:/(\d+)(?:/(\d+))?)?)?", text)
    if found is None or found[2] == "0":
        raise HvdlmError(f"{text!r} is no way to exchange: give CODEC or CODEC/EVERY/FRAGMENTS/OVERLAP, as int4/4/4/1")
    codec, *numbers = found.groups()
    if codec == _DION and found[2]:
        raise HvdlmError(f"{text!r}: dion exchanges in every step; give it alone")
    names = ("every", "fragments", "overlap")
    return Method(text, codec, {name: int(number) for name, number in zip(names, numbers, strict=True) if number})
