"""What jobs of Slurm and of Kubernetes alike must agree on with their settings."""

from __future__ import annotations

from hvdlm.config import Config
from hvdlm.errors import HvdlmError


def check_gpus(settings: Config, gpus_per_rank: int) -> None:
    """Raises HvdlmError if a rank does not compute on none or one, or not on what `train.device` says."""
    if gpus_per_rank not in (0, 1):
        raise HvdlmError(f"--gpus-per-rank {gpus_per_rank}: a rank computes on one GPU; raise --ranks-per-node instead")
    device = settings.train.device
    if (device, gpus_per_rank) in (("cuda", 0), ("cpu", 1)):
        other = "set train.device = 'auto'" if gpus_per_rank else "add --gpus-per-rank 1"
        raise HvdlmError(f"train.device = {device!r} does not go with --gpus-per-rank {gpus_per_rank}: {other}")


def check_size(settings: Config, nodes: int, ranks: int) -> None:
    """Raises HvdlmError if the settings name another number of either."""
    for name, given, own in (("ranks", settings.train.ranks, ranks), ("nodes", settings.train.nodes, nodes)):
        if given not in (0, own):
            raise HvdlmError(f"train.{name} = {given}, but the job has {own} {name}: give as many")
