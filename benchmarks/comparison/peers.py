"""The peers, each written as its users write it, around the same model, loss, batches and optimizer.

PyTorch DistributedDataParallel on Gloo with the communication hooks that PyTorch ships, and Horovod's
DistributedOptimizer. Learning rates and clipping are those of hvdlm's trainer; precision is autocast's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from comparison.contestant import Contestant, open_loader
from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config, Precision
from hvdlm.data.shard import DataSet
from hvdlm.model.loss import token_loss
from hvdlm.model.transformer import Transformer
from hvdlm.training.optimizer import make_optimizer, set_learning_rate
from hvdlm.training.precision import DTYPES
from hvdlm.training.schedule import learning_rate

POWER_SGD_RANK = 4


class _MeanLoss(nn.Module):
    """The model and its loss, nats per token, under autocast: what is wrapped by its user."""

    def __init__(self, model: Transformer, precision: Precision) -> None:
        super().__init__()
        self.model, self.dtype = model, DTYPES[precision]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs, targets: (B, T) int64."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return token_loss(self.model(inputs), self.model.output_weight, targets, self.dtype) / targets.numel()


def ddp(config: Config, communicator: Communicator, data: DataSet) -> Contestant:
    """Gradients as they are."""
    return _ddp(config, communicator, data, lambda replica: None)


def ddp_fp16(config: Config, communicator: Communicator, data: DataSet) -> Contestant:
    """With PyTorch's fp16_compress_hook."""
    return _ddp(
        config, communicator, data, lambda replica: replica.register_comm_hook(None, default_hooks.fp16_compress_hook)
    )


def ddp_power_sgd(config: Config, communicator: Communicator, data: DataSet) -> Contestant:
    """With PyTorch's PowerSGD hook (Vogels et al., NeurIPS 2019), from the second step on, as soon as it can be."""
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=POWER_SGD_RANK, start_powerSGD_iter=2)
    return _ddp(
        config, communicator, data, lambda replica: replica.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    )


def horovod(config: Config, communicator: Communicator, data: DataSet) -> Contestant:
    """Gradients as they are."""
    return _horovod(config, communicator, data, "none")


def horovod_fp16(config: Config, communicator: Communicator, data: DataSet) -> Contestant:
    """With Horovod's Compression.fp16."""
    return _horovod(config, communicator, data, "fp16")


def _ddp(
    config: Config, communicator: Communicator, data: DataSet, register: Callable[[DistributedDataParallel], None]
) -> Contestant:
    model = _model(config, data)
    optimizer = make_optimizer(model, config.optimizer)
    replica = DistributedDataParallel(_MeanLoss(model, config.train.precision), gradient_as_bucket_view=True)
    register(replica)
    loader = open_loader(config, data, communicator)

    def step() -> None:
        batch = loader.next()
        set_learning_rate(optimizer, learning_rate(batch.index, config.train.steps, config.optimizer))
        optimizer.zero_grad(set_to_none=True)
        replica(batch.inputs, batch.targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()

    return Contestant(model, step)


def _horovod(config: Config, communicator: Communicator, data: DataSet, compression: str) -> Contestant:
    import horovod.torch as hvd

    model = _model(config, data)
    training = _MeanLoss(model, config.train.precision)
    optimizer = hvd.DistributedOptimizer(
        make_optimizer(model, config.optimizer),
        # Horovod tells tensors apart by their names, and two of its optimizers may share a job
        named_parameters=[(f"{compression}.{name}", parameter) for name, parameter in model.named_parameters()],
        compression=getattr(hvd.Compression, compression),
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    loader = open_loader(config, data, communicator)

    def step() -> None:
        batch = loader.next()
        set_learning_rate(optimizer, learning_rate(batch.index, config.train.steps, config.optimizer))
        optimizer.zero_grad()
        training(batch.inputs, batch.targets).backward()
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        with optimizer.skip_synchronize():
            optimizer.step()

    return Contestant(model, step)


def _model(config: Config, data: DataSet) -> Transformer:
    model = Transformer(config.model, data.vocab_size)
    model.initialise(config.train.seed)
    return model
