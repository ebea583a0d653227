"""Where the time of steps went, on the slowest rank: the numbers of a "train" line in metrics.jsonl."""

from __future__ import annotations

from typing import Any

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.gradients.sync import Traffic
from hvdlm.training.hardware import peak_memory_bytes


class StepMetrics:
    """Adds up this rank's seconds from one logged step to the next."""

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self._communicator = communicator
        self._device = device
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        self._whole = self._data = self._exposed = self._codec = 0.0

    def add(self, whole: float, data: float, exposed: float, codec: float) -> None:
        """Seconds of one step: the whole, waiting for data, waiting for communication; in codecs, behind all that."""
        self._steps += 1
        self._whole += whole
        self._data += data
        self._exposed += exposed
        self._codec += codec

    def collect(self, loss_sum: float, tokens: int, traffic: Traffic) -> dict[str, Any]:
        """The last step's loss over all ranks, and mean times since the last call, each of the slowest rank.

        `loss_sum`: this rank's sum over its tokens, nats; `tokens`: of the whole global batch. Collective; sums
        are added in the order of ranks, so the loss is the same however they were divided, up to rounding.
        """
        steps = self._steps
        compute = self._whole - self._data - self._exposed
        own = (self._whole, self._data, compute, self._exposed, self._codec, peak_memory_bytes(self._device))
        self._clear()
        everyone = self._communicator.all_gather_object((loss_sum, own))
        whole, data, compute, exposed, codec, memory = (
            max(column) for column in zip(*(numbers for _, numbers in everyone), strict=True)
        )
        return {
            "loss": sum(part for part, _ in everyone) / tokens,
            "tokens_per_second": tokens * steps / whole,
            "step_seconds": whole / steps,
            "data_seconds": data / steps,
            "compute_seconds": compute / steps,
            "exposed_comm_seconds": exposed / steps,
            "codec_seconds": codec / steps,
            "wire_bytes": traffic.wire_bytes,
            "compression_ratio": traffic.dense_bytes / traffic.wire_bytes if traffic.wire_bytes else 1.0,
            "world_size": self._communicator.size,
            "memory_bytes": memory,
        }
