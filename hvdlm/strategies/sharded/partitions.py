"""A model as partitions, and which of them its parts read."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from hvdlm.comm.communicator import Communicator
from hvdlm.gradients.bucket import group_parameters
from hvdlm.model.linear import Linear
from hvdlm.model.parameter_access import EMBEDDING, OUTPUT, Part
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.sharded.partition import Partition, free


def make_partitions(
    model: Transformer,
    device: torch.device,
    stage: int,
    bucket_bytes: int,
    owners: Communicator,
    are_rounded: bool = False,
    alone: Collection[str] = (),
) -> list[Partition]:
    """Partitions of all parameters of `model`, in the order in which a backward pass completes their gradients.

    The model then computes with their `weights`. In 16 bits those of linear layers, and their biases, are gathered in
    16 bits, and the float32 parameters have no memory at all: they are there for their shapes and gradients. In stages
    1 and 2 a partition has about `bucket_bytes` of gradients, or one of the parameters that are to be `alone`; in stage
    3 it is what one part of the model reads, and parameters of norms, which are small, are kept. `are_rounded`: whether
    weights may differ from the masters.
    """
    parameters = dict(model.named_parameters())
    linear = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, Linear)
        for kind, _ in module.named_parameters()
        if kind == "weight" or module.casts_bias or model.dtype == torch.float32
    }
    groups: list[tuple[dict[str, nn.Parameter], bool]] = []
    if stage == 3:
        by_part: dict[Part, dict[str, nn.Parameter]] = {}
        for name, parameter in reversed(parameters.items()):
            is_norm = name not in linear and parameter.dim() < 2  # or a bias that is added in float32
            by_part.setdefault("norms" if is_norm else part_of(name, model), {})[name] = parameter
        groups = [(group, part == "norms") for part, group in by_part.items()]
    else:
        others = [name for name in parameters if name not in alone]
        kinds = [others]
        if model.dtype != torch.float32:
            kinds = [[name for name in others if (name in linear) == is_linear] for is_linear in (True, False)]
        for kind in [*kinds, *([name] for name in alone)]:
            some = {name: parameters[name] for name in kind}
            groups += [(group, True) for group in group_parameters(some, bucket_bytes)]
    position = {name: index for index, name in enumerate(reversed(list(parameters)))}
    groups.sort(key=lambda group: max(position[name] for name in group[0]))
    made = []
    for group, is_kept in groups:
        dtype = model.dtype if linear.issuperset(group) else torch.float32
        partition = Partition(group, device, dtype, owners.rank, owners.size, is_kept, are_rounded)
        if stage > 1:
            free(partition.buffer)  # before the next one: there may be no memory for all
        _attach(model, partition, device)
        made.append(partition)
    return made


def _attach(model: Transformer, partition: Partition, device: torch.device) -> None:
    """Lets `model` compute with the weights of a partition."""
    # A view by way of `.data` has a version of its own: what autograd has saved stays valid when it is gathered again
    views = partition.by_name(partition.weights.data)
    partition.parameters = []
    for name, view in views.items():
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        if view.dtype == torch.float32:
            parameter = nn.Parameter(view)
        else:
            assert isinstance(module, Linear)
            setattr(module, f"low_precision_{leaf}", view)
            parameter = nn.Parameter(torch.empty(view.shape, dtype=torch.float32, device=device))
            free(parameter)
        module.register_parameter(leaf, parameter)
        partition.parameters.append(parameter)
    if not partition.is_kept:
        free(partition.weights)


def part_of(name: str, model: Transformer) -> Part:
    """The part of the model that reads a parameter first; norms after the last block are its own."""
    if name.startswith("blocks."):
        return int(name.split(".")[1])
    if name.startswith("final_norm"):
        return len(model.blocks) - 1
    return OUTPUT if name.startswith("output.") else EMBEDDING


def readers_of(model: Transformer, partitions: Sequence[Partition]) -> dict[Part, list[Partition]]:
    """The partitions that each part of a model reads, in the order of the forward pass."""
    parts: list[Part] = [EMBEDDING, *range(len(model.blocks)), OUTPUT]
    readers: dict[Part, list[Partition]] = {part: [] for part in parts}
    for partition in reversed(partitions):
        read_by = {part_of(name, model) for name in partition.names}
        if model.output is None and "token_embedding.weight" in partition.names:
            read_by.add(OUTPUT)
        for part in parts:
            if part in read_by:
                readers[part].append(partition)
    return readers
