"""The stages of a pipeline whose ranks are not equally fast (`train.balance`): a slow one gets fewer blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from hvdlm.comm.mesh import Mesh
from hvdlm.config import Config, ParallelSection
from hvdlm.model.transformer import Transformer
from hvdlm.parallel.pipeline.stages import blocks_by_cost, flops
from hvdlm.training.precision import DTYPES

_SECONDS = 1.0  # of measuring: a rank that is stopped now and then is so several times
_FEWEST = 3  # passes


def with_stages_by_speed(config: Config, vocab_size: int, mesh: Mesh, device: torch.device) -> tuple[Config, str]:
    """`config` with `parallel.split` as the ranks' speeds suggest, and a sentence on it. Collective.

    Ranks measure at once how long each takes for a block: those of one host may share cores. Of several pipelines the
    slowest rank of a stage counts.
    """
    mesh.everyone.barrier()
    own = mesh.coordinates["pipeline"], seconds_of_block(config, device)
    told = mesh.everyone.all_gather_object(own)
    seconds = [max(each for place, each in told if place == stage) for stage in range(mesh.shape["pipeline"])]
    counts = blocks_by_speed(config, vocab_size, seconds)
    parallel: ParallelSection = config.parallel.model_copy(update={"split": ",".join(map(str, counts))})
    slowest = max(range(len(told)), key=lambda rank: told[rank][1])
    sentence = (
        f"stages have {', '.join(map(str, counts))} blocks, by how long ranks took for one: from "
        f"{min(seconds) * 1e3:.3g} ms to {max(seconds) * 1e3:.3g} ms on rank {slowest}, on "
        f"{mesh.everyone.hosts[slowest]}"
    )
    return config.model_copy(update={"parallel": parallel}), sentence


def blocks_by_speed(config: Config, vocab_size: int, seconds: Sequence[float]) -> list[int]:
    """The blocks of each stage. `seconds`: for a block, of the ranks of a pipeline in their order.

    With several chunks stages go round the ranks, and each rank has about as many blocks in all of its own.
    """
    ranks = len(seconds)
    of_ranks = blocks_by_cost(config.model.layers, ranks, flops(config.model, vocab_size), seconds)
    chunks = config.parallel.stages // ranks
    return [count // chunks + (chunk < count % chunks) for chunk in range(chunks) for count in of_ranks]


def seconds_of_block(config: Config, device: torch.device) -> float:
    """Mean seconds of a forward and a backward pass of one block over a micro-batch on this rank."""
    section = config.model.model_copy(update={"layers": 1})
    model = Transformer(section, vocab_size=1)  # so that only the block takes time
    model.initialise(config.train.seed)
    model.to(device)
    model.set_compute_dtype(DTYPES[config.train.precision])
    shape = config.train.micro_batch_size, section.context_length
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)

    def make_passes() -> None:
        model(tokens).float().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    make_passes()  # makes what later ones find
    count, begin = 0, time.perf_counter()
    while count < _FEWEST or time.perf_counter() - begin < _SECONDS:
        make_passes()
        count += 1
    return (time.perf_counter() - begin) / count
