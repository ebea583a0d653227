"""The numbers of a "train" line in metrics.jsonl: loss, speed, and how the slowest rank spent the time of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Precision
from hvdlm.gradients.sync import Traffic
from hvdlm.timing import StepTimer
from hvdlm.training.hardware import gpu_uuid, peak_memory_bytes
from hvdlm.training.peak import peak_flops


class StepMetrics:
    """Adds up this rank's seconds from one logged step to the next."""

    def __init__(
        self, communicator: Communicator, device: torch.device, precision: Precision, flops_per_token: float
    ) -> None:
        self._communicator, self._device = communicator, device
        self._precision, self._flops_per_token = precision, flops_per_token
        self._peak_flops: float | None = None
        self.compute_seconds: list[float] = []  # of each rank, as the last `collect` has learned
        self._has_looked_up_peak = False
        self._clear()

    def ranks_have_changed(self) -> None:
        """Asks all ranks anew for what they are asked once."""
        self._has_looked_up_peak = False

    def _clear(self) -> None:
        self._step_seconds = self._codec_seconds = 0.0
        self._wire_bytes = self._dense_bytes = self._tokens = 0
        self._timers: list[StepTimer] = []
        self._losses: list[Tensor] = []
        self._is_collected = False

    def add(
        self, step_seconds: float, timer: StepTimer, traffic: Traffic, losses: Sequence[Tensor], tokens: int
    ) -> None:
        """One step: its seconds, their phases, what was sent, which overlaps the phases, and this rank's part of the
        loss: `losses`, of its micro-batches, nats, are sums over its `tokens`.
        """
        if self._is_collected:
            self._clear()
        self._tokens += tokens
        self._step_seconds += step_seconds
        self._timers.append(timer)  # read in `collect`: on a GPU reading blocks
        self._losses += losses
        self._codec_seconds += traffic.codec_seconds
        self._wire_bytes += traffic.wire_bytes
        self._dense_bytes += traffic.dense_bytes

    def collect(self, loss_sum: float, tokens: int) -> dict[str, Any]:
        """The last step's loss over all ranks, and means since the last call: the loss, and times of the slowest rank.

        `loss_sum`: this rank's sum over its `tokens`, nats. Bytes are those of rank 0. Collective; sums
        are added in the order of ranks, so the loss is the same however they were divided, up to rounding.
        """
        steps = max(1, len(self._timers))  # one that has just joined has done none
        if not self._has_looked_up_peak:  # between steps, when nothing else computes
            self._peak_flops, self._has_looked_up_peak = self._own_peak(), True
        seconds = [timer.seconds() for timer in self._timers]
        data, exposed = (sum(each.get(name, 0.0) for each in seconds) for name in ("data", "wait"))
        compute = self._step_seconds - data - exposed
        own = (self._step_seconds, data, compute, exposed, self._codec_seconds, peak_memory_bytes(self._device))
        told = (loss_sum, tokens, sum(map(float, self._losses)), self._tokens, self._peak_flops, own)
        self._is_collected = True  # the numbers stay for a second call, if a rank dies in this one
        all_told = self._communicator.all_gather_object(told)
        losses, counts, all_losses, all_tokens, peaks, times = zip(*all_told, strict=True)
        self.compute_seconds = [each[2] for each in times]
        whole, data, compute, exposed, codec, memory = map(max, zip(*times, strict=True))
        tokens_per_second = sum(all_tokens) / whole
        return {
            "loss": sum(losses) / sum(counts) if any(counts) else math.nan,
            "mean_loss": sum(all_losses) / sum(all_tokens) if any(all_tokens) else math.nan,
            "tokens_per_second": tokens_per_second,
            "utilisation": _utilisation(self._flops_per_token * tokens_per_second, peaks),
            "step_seconds": whole / steps,
            "data_seconds": data / steps,
            "compute_seconds": compute / steps,
            "exposed_comm_seconds": exposed / steps,
            "codec_seconds": codec / steps,
            "wire_bytes": self._wire_bytes // steps,
            "compression_ratio": self._dense_bytes / self._wire_bytes if self._wire_bytes else 1.0,
            "world_size": self._communicator.size,
            "memory_bytes": memory,
        }

    def _own_peak(self) -> float | None:
        """Collective."""
        own = gpu_uuid(self._device) if self._device.type == "cuda" else None
        sharing = self._communicator.all_gather_object(own).count(own) if own is not None else 1
        return peak_flops(self._device, self._precision, sharing)


def _utilisation(flops: float, peaks: Sequence[float | None]) -> float | None:
    """Of the peaks of all ranks' devices together; None if that of one is not known."""
    known = [peak for peak in peaks if peak is not None]
    return flops / sum(known) if len(known) == len(peaks) else None
