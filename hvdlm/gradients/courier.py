"""Runs what goes between ranks beside what computes: one task after the other, in the order of their submission."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from hvdlm.comm.communicator import Work


class Courier:
    """The communication thread of a rank, and on a GPU the communication stream that its tasks use."""

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hvdlm-gradients")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, task: Callable[[], None]) -> Work[None]:
        """Starts `task` as soon as those before it have ended.

        On a GPU it sees all that the current stream has been given so far, and the stream that waits sees its results.
        """
        stream = self._stream
        if stream is None:
            future = self._thread.submit(task)
            return Work(future.result, future.done)
        ready, finished = torch.cuda.Event(), torch.cuda.Event()
        ready.record()

        def run() -> None:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                task()
                finished.record(stream)

        on_stream = self._thread.submit(run)

        def finish() -> None:
            on_stream.result()
            torch.cuda.current_stream().wait_event(finished)

        return Work(finish, on_stream.done)
