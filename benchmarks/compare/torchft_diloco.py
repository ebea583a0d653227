"""Peer `torchft DiLoCo`: Streaming DiLoCo (arXiv:2501.18512) of torchft, each rank a replica group of its own.

The outer optimizer is that of torchft's train_diloco.py. It sends differences as float32: torchft rounds them on GPUs
only.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo

from hvdlm.comm.communicator import Communicator
from hvdlm.model.transformer import Transformer

_OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}

# While other jobs are measured the ranks are suspended, for which nobody is to be left out
_NEVER = timedelta(hours=10)


class TorchftDiLoCo:
    """Averages a model while the inner optimizer steps; lives as long as the ranks train."""

    def __init__(
        self, model: Transformer, inner: torch.optim.Optimizer, communicator: Communicator, every: int, overlap: int
    ) -> None:
        """`every`: steps in which each of two fragments is averaged once; `overlap`: steps until it arrives."""
        fragments = _fragments(model)
        self._inner = inner
        self._outer = [torch.optim.SGD(each.parameters(), **_OUTER) for each in fragments]
        self._lighthouse: LighthouseServer | None = None
        host = socket.gethostname()
        if communicator.rank == 0:
            self._lighthouse = LighthouseServer(
                bind="[::]:0", min_replicas=communicator.size, heartbeat_timeout_ms=int(_NEVER.total_seconds() * 1000)
            )
        own = self._lighthouse.address() if self._lighthouse else ""
        address = communicator.all_gather_object(own)[0]
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._manager = Manager(
            pg=ProcessGroupGloo(timeout=_NEVER),
            use_async_quorum=False,
            min_replica_size=communicator.size,
            load_state_dict=self._load_state_dict(model),
            state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
            replica_id=f"compare_{communicator.rank}",
            timeout=_NEVER,
            quorum_timeout=_NEVER,
            init_sync=False,  # as its documentation says for replicas that are initialised alike
            rank=0,
            world_size=1,
            store_addr=host,
            store_port=self._store.port,
            lighthouse_addr=address,
            hostname=host,
        )
        self._diloco = DiLoCo(self._manager, fragments, inner, self._outer, every, fragment_sync_delay=overlap)
        self._diloco.__enter__()

    def averaged(self) -> dict[str, Tensor]:
        """The parameters after the last round of each fragment, the same on all ranks."""
        return {
            f"{number}.{name}": parameter
            for number, fragment in enumerate(self._diloco._fragments)
            for name, parameter in fragment.original_parameters.items()
        }

    def _load_state_dict(self, model: Transformer) -> Callable[[dict[str, Any]], None]:
        def load(state: dict[str, Any]) -> None:
            model.load_state_dict(state["model"])
            self._inner.load_state_dict(state["inner"])

        return load


def _fragments(model: Transformer) -> list[nn.Module]:
    """Two halves of the layers, with what stands before and after them."""
    half = len(model.blocks) // 2
    before = [each for each in (model.token_embedding, model.position_embedding) if each is not None]
    after = [each for each in (model.final_norm, model.output) if each is not None]
    return [nn.ModuleList([*before, *model.blocks[:half]]), nn.ModuleList([*model.blocks[half:], *after])]
