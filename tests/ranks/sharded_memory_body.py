"""What ZeRO's ranks hold, counted in bytes of memory that tensors have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import torch
from checks import check
from sharded_body import VOCABULARY, make_config, make_trainer
from torch import Tensor
from training_body import Batches

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.model.layout import Layout
from hvdlm.model.memory import training_memory_bytes
from hvdlm.model.parameter_access import Part
from hvdlm.strategies.sharded.parameters import ShardedParameters
from hvdlm.strategies.sharded.strategy import Sharded

LAYERS = 6


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of their memory, which several may share."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({id_of(each): each.size() for each in storages if each.size()}.values())


def id_of(storage: torch.UntypedStorage) -> int:
    return storage.data_ptr()


@check(sizes=[2, 4], stage=[1, 2, 3], precision=["fp32", "bf16"])
def check_what_a_rank_holds(comm: Communicator, stage: int, precision: str) -> None:
    """Of moments, gradients and parameters, as large as what a stage divides is, and never more in a pass."""
    values = make_config("llama", stage, precision=precision).model_dump(by_alias=True)
    values["model"]["layers"] = LAYERS
    config = Config.model_validate(values)
    trainer, batches = make_trainer(comm, config), Batches(comm, 0, ignored=False)
    strategy = trainer.strategy
    assert isinstance(strategy, Sharded)
    partitions = strategy._partitions
    numbers = sum(torch.Size(shape).numel() for shape in strategy.held_parts().shapes.values())
    largest = sorted((each.weights.numel() * each.weights.element_size() for each in partitions), reverse=True)
    gradients = sorted((each.buffer.nbytes for each in partitions), reverse=True)
    most: dict[str, int] = {"weights": 0, "gradients": 0}

    def count() -> None:
        most["weights"] = max(most["weights"], nbytes(each.weights for each in partitions))
        most["gradients"] = max(most["gradients"], nbytes(each.buffer for each in partitions))

    def counted(name: str) -> Any:
        call = getattr(ShardedParameters, name)

        def calling(own: ShardedParameters, part: Part, x: Tensor) -> Tensor:
            count()
            found: Tensor = call(own, part, x)
            if found.requires_grad:
                found.register_hook(lambda _: count())
            count()
            return found

        return patch.object(ShardedParameters, name, calling)

    with counted("before"), counted("after"):
        for _ in range(3):
            trainer.train_step(batches, False)
    moments = nbytes(each for name, each in strategy.optimizer_state().items() if not name.startswith("step."))
    share = (1 / comm.size + 0.05) * 4 * numbers
    assert moments == nbytes(strategy.optimizer_state().values()) - 4 * len(strategy.parameters())
    assert moments <= 2 * share
    held = nbytes(each.buffer for each in partitions)
    if stage > 1:
        assert held == 0 and nbytes(strategy._gradients.own) <= share
        assert 0 < most["gradients"] <= sum(gradients[:3])  # two are under way while one is filled
    else:
        assert held <= 1.05 * 4 * numbers
    if stage == 3:
        norms = sum(each.weights.nbytes for each in partitions if each.is_kept)
        assert nbytes(each.weights for each in partitions) == norms  # between steps
        assert 0 < most["weights"] - norms <= sum(largest[:2])
        assert sum(largest[:2]) < 0.5 * sum(largest), "this test would show nothing"
    assert nbytes(each.master for each in partitions) <= (share if stage == 3 or precision == "bf16" else 4.2 * numbers)
    assert nbytes(trainer.model.parameters()) <= sum(largest)
    strategy.close()


@check(sizes=[4], stage=[1, 2, 3])
def check_what_a_rank_keeps_for_muon(comm: Communicator, stage: int) -> None:
    """One number for each of its matrices', two for each other one; about as much on each rank as --dry-run says."""
    values = make_config("llama", stage, optimizer={"algorithm": "muon"}).model_dump(by_alias=True)
    values["model"]["layers"] = LAYERS
    config = Config.model_validate(values)
    strategy = make_trainer(comm, config).strategy
    kept = nbytes(each for name, each in strategy.optimizer_state().items() if not name.startswith("step."))
    shapes = {name: torch.Size(shape) for name, shape in strategy.held_parts().shapes.items()}
    matrices = sum(shape.numel() for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2)
    others = sum(shape.numel() for shape in shapes.values()) - matrices
    assert int(comm.all_reduce_(torch.tensor([kept]))) == 4 * matrices + 8 * others
    layout = Layout(stage, shard=4)
    formula = training_memory_bytes(config.model, VOCABULARY, 1, "fp32", algorithm="muon", layout=layout)
    assert abs(kept / formula.moments - 1) <= 0.1, (kept, formula.moments)
    strategy.close()
