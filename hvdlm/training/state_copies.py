"""Copies of what a step changes, in the host's memory, to be written while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class StateCopies:
    """Keeps its memory from copy to copy: pinned where tensors are on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """`device`: of the tensors, or the CPU."""
        self._kept: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        self._gpu_has_copied: torch.cuda.Event | None = None
        self._have_ended = threading.Event()
        self._have_ended.set()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies at once; names are those under which memory is kept."""
        copies = self._copy(tensors)
        if tensors and self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()
        return copies

    def begin(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Returns what completes the copies, to be called on another thread. Until `wait` no tensor may change."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                copies = self._copy(tensors)
            event = self._gpu_has_copied = self._stream.record_event()

            def complete() -> dict[str, Tensor]:
                event.synchronize()
                return copies

            return complete
        self._have_ended.clear()

        def copy() -> dict[str, Tensor]:
            try:
                return self._copy(tensors)
            finally:
                self._have_ended.set()

        return copy

    def wait(self) -> None:
        """Returns when tensors may change. On a GPU, what is queued from now on waits, and the host does not."""
        self._have_ended.wait()
        if self._gpu_has_copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._gpu_has_copied)

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On a GPU only queued."""
        for name, tensor in tensors.items():
            if name not in self._kept or self._kept[name].shape != tensor.shape:
                self._kept[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._kept[name].copy_(tensor.detach(), non_blocking=True)
        return {name: self._kept[name] for name in tensors}
