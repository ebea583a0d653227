"""Records of metrics.jsonl for TensorBoard, which `pip install hvdlm[tensorboard]` brings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError

_FOLDER = "tensorboard"  # in the run directory


def check_tensorboard(wanted: bool) -> None:
    """Raises HvdlmError if it is wanted and not installed."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise HvdlmError(
            "log.tensorboard = true needs TensorBoard, which is not installed: pip install 'hvdlm[tensorboard]'"
        )


class TensorBoard:
    """Writes each number of a record as a scalar, KIND/NAME over steps; events as text."""

    def __init__(self, run_dir: Path, start: int) -> None:
        """`start`: the step a resumed run goes on from; what was written of later ones is not shown any more."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / _FOLDER), purge_step=start + 1)

    def show(self, record: dict[str, Any]) -> None:
        kind, step = record["kind"], record["step"]
        if kind == "event":
            self._writer.add_text("event", str(record["message"]), step)
            return
        for name, value in record.items():
            if name not in ("kind", "step") and value is not None:
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        if kind == "eval":
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()
