"""Records of metrics.jsonl for TensorBoard, which `pip install hvdlm[tensorboard]` brings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvdlm.config import LogSection
from hvdlm.errors import check_installed, write_failure

logger = logging.getLogger(__name__)

_FOLDER = "tensorboard"  # in the run directory


def check_tensorboard(settings: LogSection) -> None:
    """Raises HvdlmError if it is wanted and not installed."""
    if settings.tensorboard:
        check_installed("tensorboard", "log.tensorboard = true", "TensorBoard", "tensorboard")


class TensorBoard:
    """Writes each number of a record as a scalar, KIND/NAME over steps; events as text."""

    def __init__(self, run_dir: Path, start: int) -> None:
        """`start`: the step a resumed run goes on from; what was written of later ones is not shown any more."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run_dir / _FOLDER
        self._writer: SummaryWriter | None = None
        with self._warning():
            self._writer = SummaryWriter(str(self._folder), purge_step=start + 1)

    def show(self, record: dict[str, Any]) -> None:
        with self._warning():
            self._show(record)

    def close(self) -> None:
        with self._warning():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """A failure is told once: metrics.jsonl is what is kept."""
        try:
            yield
        except OSError as error:
            self._writer = None
            logger.warning("cannot write %s, so TensorBoard gets no more: %s", self._folder, write_failure(error))

    def _show(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            return
        kind, step = record["kind"], record["step"]
        if kind == "event":
            self._writer.add_text("event", str(record["message"]), step)
            return
        for name, value in record.items():
            if name not in ("kind", "step") and value is not None:
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        if kind == "eval":
            self._writer.flush()
