"""Peers `DeepSpeed ZeRO-2` and `DeepSpeed ZeRO-3`: DeepSpeed's engine on CPUs over Gloo.

Under DeepSpeed's own autocast, where the weights and gradients of linear layers travel in bf16. The optimizer is that
of all systems: DeepSpeed's own for CPUs would be compiled at the first use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.batches import open_loader
from common.torch_adamw import torch_adamw
from compare.systems import MeanLoss, System, divide, initial_model
from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.strategies.optimizer import set_learning_rate
from hvdlm.training.precision import DTYPES
from hvdlm.training.schedule import learning_rate


def zero(stage: int, config: Config, communicator: Communicator, data: DataSet) -> System:
    """All ranks divide the optimizer's state and gradients (stage 2), and parameters, too (3)."""
    # Before the import: what computes, and what DeepSpeed's launcher would set
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(communicator.rank),
        WORLD_SIZE=str(communicator.size),
        LOCAL_RANK=str(communicator.local_rank),
    )
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)  # takes the group that is there
    model = initial_model(config, data)
    mean_loss = MeanLoss(model, config.train.precision)
    optimizer = torch_adamw(model, config.optimizer)
    engine, *_ = deepspeed.initialize(
        model=mean_loss, optimizer=optimizer, config=_settings(stage, config, communicator.size)
    )
    loader = open_loader(config, data, communicator)

    def step() -> None:
        batch = loader.next()
        set_learning_rate(optimizer, learning_rate(batch.index, config.train.steps, config.optimizer))
        for inputs, targets in divide(batch, config):
            engine.backward(engine(inputs, targets))
            engine.step()

    def parameters() -> Mapping[str, Tensor]:
        return {name: safe_get_full_fp32_param(parameter) for name, parameter in model.named_parameters()}

    return System(parameters, step)


def _settings(stage: int, config: Config, ranks: int) -> dict[str, Any]:
    train = config.train
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // ranks // train.micro_batch_size,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": DTYPES[train.precision] != torch.float32,
            "dtype": str(DTYPES[train.precision]).removeprefix("torch."),
            "lower_precision_safe_modules": ["hvdlm.model.linear.Linear"],
        },
    }
