"""The model `hvdlm` of lm-evaluation-harness, for programs that call the harness themselves.

Once this module has been imported, `lm_eval.simple_evaluate("hvdlm", {"checkpoint": PATH}, tasks=...)` scores a
checkpoint in one process; `hvdlm lm-eval` does so on all ranks of a job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model

from hvdlm.comm.solo import SoloCommunicator
from hvdlm.scoring.distributed_model import DistributedModel
from hvdlm.scoring.harness_model import HarnessModel
from hvdlm.training.hardware import choose_device
from hvdlm.training.trained_model import load_model, open_trained


@register_model("hvdlm")
class CheckpointModel(HarnessModel):
    """The model of a checkpoint, or of the latest one in a run directory."""

    def __init__(self, checkpoint: str, batch_size: int | str | None = None, **_: Any) -> None:
        """`batch_size`: requests that are computed at once; None or "auto": 8. What else the harness passes, such as a
        device, is not used: it computes on a GPU where there is one.

        Raises HvdlmError if the checkpoint cannot be read.
        """
        communicator = SoloCommunicator()
        trained = open_trained(Path(checkpoint))
        model = load_model(trained).double().to(choose_device("auto", communicator))
        size = 8 if batch_size in (None, "auto") else int(batch_size or 8)
        super().__init__(DistributedModel(model, trained.tokenizer, communicator, size))
