"""Peers `PyTorch 1F1B` and `PyTorch GPipe`: torch.distributed.pipelining, each rank one stage.

A stage is the model without the other stages' parameters, as in PyTorch's tutorial on pipelines, under autocast like
the other peers. Blocks are divided as hvdlm divides them. PyTorch leaves three things to its users: all stages' norms
make that of the gradients, and where the output matrix is the token embedding, the first stage and the last one both
hold it, add up its gradients, and one of them counts it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn
from torch.distributed import pipelining
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.batches import open_loader
from common.torch_adamw import torch_adamw
from compare.systems import System, initial_model
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.model.loss import token_loss
from hvdlm.model.transformer import Transformer
from hvdlm.parallel.pipeline.stages import Stage, blocks_by_cost, divide, flops
from hvdlm.strategies.optimizer import set_learning_rate
from hvdlm.training.precision import DTYPES
from hvdlm.training.schedule import learning_rate


def pipeline(schedule_name: str, config: Config, communicator: Communicator, data: DataSet) -> System:
    """A pipeline of all ranks; `schedule_name`: of a class of torch.distributed.pipelining."""
    rank, ranks, train = communicator.rank, communicator.size, config.train
    dtype = DTYPES[train.precision]
    costs = flops(config.model, data.vocab_size)
    stages = divide(blocks_by_cost(config.model.layers, ranks, costs))
    model = initial_model(config, data)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    stage = _StageModule(model, stages[rank], dtype)
    optimizer = torch_adamw(model, config.optimizer)
    ends = distributed.new_group([0, ranks - 1])
    shared = model.token_embedding if config.model.tie_embeddings else None  # None between the ends, too
    is_copy = shared is not None and rank > 0
    counted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not (is_copy and name.startswith("token_embedding"))
    }

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return token_loss(hidden, model.output_weight, targets, dtype) / targets.numel()

    schedule = getattr(pipelining, schedule_name)(
        pipelining.PipelineStage(stage, rank, ranks, torch.device("cpu")),
        train.global_batch_size // train.micro_batch_size,
        loss_fn=loss,
    )
    loader = open_loader(config, data, SoloCommunicator())  # every stage has all sequences

    def step() -> None:
        batch = loader.next()
        set_learning_rate(optimizer, learning_rate(batch.index, train.steps, config.optimizer))
        optimizer.zero_grad()
        inputs = [batch.inputs] if rank == 0 else []
        schedule.step(*inputs, target=batch.targets if rank == ranks - 1 else None, return_outputs=False)
        if shared is not None:
            distributed.all_reduce(shared.weight.grad, group=ends)
        norm = get_total_norm([each.grad for each in counted.values() if each.grad is not None]) ** 2
        distributed.all_reduce(norm)
        clip_grads_with_norm_(model.parameters(), config.optimizer.clip_norm, norm**0.5)
        optimizer.step()

    def parameters() -> Mapping[str, Tensor]:
        whole = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for name, parameter in counted.items():
            whole[name] = parameter.detach().clone()
        for each in whole.values():
            communicator.all_reduce_(each)
        return whole

    return System(parameters, step)


class _StageModule(nn.Module):
    """What one rank has of a model, whose other parameters are removed."""

    def __init__(self, model: Transformer, stage: Stage, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.stage, self.dtype = model, stage, dtype
        held = {name for name, _ in model.named_parameters() if stage.holds(name, model.config.tie_embeddings)}
        for layer in range(len(model.blocks)):
            if layer not in stage.layers:
                model.blocks[layer] = nn.Identity()
        for name in ("token_embedding", "position_embedding", "final_norm", "output"):
            if not any(parameter.partition(".")[0] == name for parameter in held):
                setattr(model, name, None)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, T) int64 tokens on the first stage, else (b, T, D). Returns (b, T, D)."""
        positions = torch.arange(x.shape[1])
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            if self.stage.is_first:
                x = self.model.embed(x, positions)
            x = self.model.apply_blocks(self.stage.layers, x, positions, None)
            return self.model.final_norm(x) if self.stage.is_last else x
