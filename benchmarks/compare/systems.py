"""The systems that are compared: hvdlm, and its peers as their users write them.

All train the same model on the same batches with the same loss, optimizer, learning rates and clipping. The peers are
PyTorch DistributedDataParallel on Gloo with the communication hooks that PyTorch ships, its FSDP2 and its pipelines
(torch_pipeline.py), Horovod's DistributedOptimizer, DeepSpeed's ZeRO (deepspeed_zero.py), and torchft's DiLoCo. hvdlm
computes with its own bf16 copies of the weights, the peers under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from common.batches import open_loader
from common.methods import Method
from common.torch_adamw import torch_adamw
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config, Precision
from hvdlm.data.loader import Batch
from hvdlm.data.shard import DataSet
from hvdlm.model.loss import token_loss
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.optimizer import set_learning_rate
from hvdlm.training.parts_file import put
from hvdlm.training.precision import DTYPES
from hvdlm.training.schedule import learning_rate
from hvdlm.training.trainer import Trainer

POWER_SGD_MATRIX_RANK = 4

# Steps from one average of half of the model to its next, and how many later it arrives: those of torchft's
# train_diloco.py
DILOCO_EVERY, DILOCO_OVERLAP = 20, 5


@dataclass(frozen=True)
class StepReport:
    """What hvdlm reports of the gradient exchange of one step on this rank."""

    waited_seconds: float  # for other ranks: the "wait" phase of the trainer's step timer
    wire_bytes: int  # sent


@dataclass(frozen=True)
class System:
    """One way to train one model. `step` trains on the next global batch; peers have nothing to report."""

    parameters: Callable[[], Mapping[str, Tensor]]  # that all ranks have alike
    step: Callable[[], StepReport | None]
    arrive: Callable[[], None] = lambda: None  # waits for what is still being sent


def hvdlm_by_method(method: Method, config: Config, communicator: Communicator, data: DataSet) -> System:
    """hvdlm's trainer, whose ranks combine their work by this method."""
    return _hvdlm(method.apply(config, communicator.size), communicator, data)


def hvdlm_without_communication(config: Config, ranks: int, data: DataSet) -> System:
    """hvdlm's trainer, alone on each rank, with its share of a step's sequences."""
    train = config.train.model_copy(update={"global_batch_size": config.train.global_batch_size // ranks})
    return _hvdlm(config.model_copy(update={"train": train}), SoloCommunicator(), data)


def ddp(config: Config, communicator: Communicator, data: DataSet) -> System:
    """DDP without a communication hook."""
    return _ddp(config, communicator, data, lambda replica: None)


def ddp_fp16(config: Config, communicator: Communicator, data: DataSet) -> System:
    """DDP with PyTorch's fp16_compress_hook."""
    return _ddp(
        config, communicator, data, lambda replica: replica.register_comm_hook(None, default_hooks.fp16_compress_hook)
    )


def ddp_power_sgd(config: Config, communicator: Communicator, data: DataSet) -> System:
    """DDP with PyTorch's PowerSGD hook (Vogels et al., NeurIPS 2019), from the third step on, the earliest possible."""
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=POWER_SGD_MATRIX_RANK, start_powerSGD_iter=2)
    return _ddp(
        config, communicator, data, lambda replica: replica.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    )


def fsdp2(config: Config, communicator: Communicator, data: DataSet) -> System:
    """FSDP2, `fully_shard` of each block and of the rest, which gathers weights in the precision of products."""
    dtype = DTYPES[config.train.precision]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (communicator.size,))
    model = initial_model(config, data)
    mean_loss = MeanLoss(model, config.train.precision)
    for module in (*model.blocks, mean_loss):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    optimizer = torch_adamw(model, config.optimizer)
    return System(
        lambda: {name: each.full_tensor() for name, each in model.named_parameters()},
        plain_step(mean_loss, optimizer, config, communicator, data),
    )


def horovod(config: Config, communicator: Communicator, data: DataSet) -> System:
    """Horovod's DistributedOptimizer without compression."""
    return _horovod(config, communicator, data, "none")


def horovod_fp16(config: Config, communicator: Communicator, data: DataSet) -> System:
    """Horovod's DistributedOptimizer with Compression.fp16."""
    return _horovod(config, communicator, data, "fp16")


def torchft_diloco(config: Config, communicator: Communicator, data: DataSet) -> System:
    """Streaming DiLoCo of torchft (torchft_diloco.py)."""
    from compare.torchft_diloco import TorchftDiLoCo

    model = initial_model(config, data)
    mean_loss = MeanLoss(model, config.train.precision)
    optimizer = torch_adamw(model, config.optimizer)
    diloco = TorchftDiLoCo(model, optimizer, communicator, DILOCO_EVERY, DILOCO_OVERLAP)
    return System(diloco.averaged, plain_step(mean_loss, optimizer, config, communicator, data))


def torch_1f1b(config: Config, communicator: Communicator, data: DataSet) -> System:
    """torch.distributed.pipelining with Schedule1F1B (torch_pipeline.py)."""
    from compare.torch_pipeline import pipeline

    return pipeline("Schedule1F1B", config, communicator, data)


def torch_gpipe(config: Config, communicator: Communicator, data: DataSet) -> System:
    """torch.distributed.pipelining with ScheduleGPipe (torch_pipeline.py)."""
    from compare.torch_pipeline import pipeline

    return pipeline("ScheduleGPipe", config, communicator, data)


def deepspeed_zero2(config: Config, communicator: Communicator, data: DataSet) -> System:
    """DeepSpeed's ZeRO, stage 2 (deepspeed_zero.py)."""
    from compare.deepspeed_zero import zero

    return zero(2, config, communicator, data)


def deepspeed_zero3(config: Config, communicator: Communicator, data: DataSet) -> System:
    """DeepSpeed's ZeRO, stage 3 (deepspeed_zero.py)."""
    from compare.deepspeed_zero import zero

    return zero(3, config, communicator, data)


def _hvdlm(config: Config, communicator: Communicator, data: DataSet) -> System:
    trainer = Trainer(config, communicator, data, data.vocab_size, torch.device("cpu"))
    loader = trainer.open_loader()

    def step() -> StepReport:
        trainer.train_step(loader, stop_here=False)
        return StepReport(trainer.timer.seconds()["wait"], trainer.strategy.traffic.wire_bytes)

    return System(lambda: _whole_parameters(trainer), step, trainer.strategy.arrive)


def _whole_parameters(trainer: Trainer) -> Mapping[str, Tensor]:
    """Those that ranks have among them, on every rank. Collective."""
    held = trainer.strategy.held_parts()
    if held is None:
        return trainer.parameters
    whole = {name: torch.zeros(shape) for name, shape in held.shapes.items()}
    for name, own in trainer.parameters.items():
        if held.saves(name):
            put(whole[name], held.runs_of(name), own)
    for each in whole.values():
        trainer.communicator.all_reduce_(each)
    return whole


class MeanLoss(nn.Module):
    """The model and its loss under autocast, as one module that DDP can wrap."""

    def __init__(self, model: Transformer, precision: Precision) -> None:
        super().__init__()
        self.model, self.dtype = model, DTYPES[precision]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs, targets: (B, T) int64. Returns the mean loss in nats per token."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return token_loss(self.model(inputs), self.model.output_weight, targets, self.dtype) / targets.numel()


def _ddp(
    config: Config, communicator: Communicator, data: DataSet, register: Callable[[DistributedDataParallel], None]
) -> System:
    model = initial_model(config, data)
    optimizer = torch_adamw(model, config.optimizer)
    replica = DistributedDataParallel(MeanLoss(model, config.train.precision), gradient_as_bucket_view=True)
    register(replica)
    step = plain_step(
        replica, optimizer, config, communicator, data, lambda is_last: nullcontext() if is_last else replica.no_sync()
    )
    return System(lambda: dict(model.named_parameters()), step)


def plain_step(
    mean_loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    communicator: Communicator,
    data: DataSet,
    around: Callable[[bool], AbstractContextManager[None]] = lambda is_last: nullcontext(),
) -> Callable[[], None]:
    """A step as plain PyTorch has it, in which the module or the optimizer communicates by itself. `around`: of the
    passes of a micro-batch, given whether it is the step's last one.
    """
    loader = open_loader(config, data, communicator)

    def step() -> None:
        batch = loader.next()
        set_learning_rate(optimizer, learning_rate(batch.index, config.train.steps, config.optimizer))
        optimizer.zero_grad()
        micro_batches = divide(batch, config)
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            with around(number == len(micro_batches)):
                (mean_loss(inputs, targets) / len(micro_batches)).backward()
        nn.utils.clip_grad_norm_(mean_loss.parameters(), config.optimizer.clip_norm)
        optimizer.step()

    return step


def divide(batch: Batch, config: Config) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of its micro-batches, (b, T) int64 each. All have as many sequences."""
    size = config.train.micro_batch_size
    return list(zip(batch.inputs.split(size), batch.targets.split(size), strict=True))


def _horovod(config: Config, communicator: Communicator, data: DataSet, compression: str) -> System:
    import horovod.torch as hvd

    model = initial_model(config, data)
    mean_loss = MeanLoss(model, config.train.precision)
    optimizer = hvd.DistributedOptimizer(
        torch_adamw(model, config.optimizer),
        # Horovod identifies tensors by name, and two of its optimizers may share a job
        named_parameters=[(f"{compression}.{name}", parameter) for name, parameter in model.named_parameters()],
        compression=getattr(hvd.Compression, compression),
        backward_passes_per_step=config.train.global_batch_size // communicator.size // config.train.micro_batch_size,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    loader = open_loader(config, data, communicator)

    def step() -> None:
        batch = loader.next()
        set_learning_rate(optimizer, learning_rate(batch.index, config.train.steps, config.optimizer))
        optimizer.zero_grad()
        micro_batches = divide(batch, config)
        for inputs, targets in micro_batches:
            (mean_loss(inputs, targets) / len(micro_batches)).backward()
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        with optimizer.skip_synchronize():
            optimizer.step()

    return System(lambda: dict(model.named_parameters()), step)


def initial_model(config: Config, data: DataSet) -> Transformer:
    """Its parameters begin with the same numbers in all systems."""
    model = Transformer(config.model, data.vocab_size)
    model.initialise(config.train.seed)
    return model
