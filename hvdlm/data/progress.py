"""Progress of `hvdlm prepare`: a progress bar on a terminal, otherwise a log line every 30 seconds."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class InputProgress:
    """Context manager that shows on standard error how many of `total` input bytes are done."""

    def __init__(self, task: str, total: int) -> None:
        self._task = task
        self._total = total
        self._done = 0
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._bar_task = self._bar.add_task(task, total=total)

    def __enter__(self) -> InputProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, input_bytes: int) -> None:
        """Counts `input_bytes` more as done."""
        self._done += input_bytes
        self._bar.advance(self._bar_task, input_bytes)
        if self._bar.disable and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            done, total = self._done / 2**20, self._total / 2**20
            logger.info("%s: %s of %s MiB", self._task, f"{done:,.0f}", f"{total:,.0f}")
