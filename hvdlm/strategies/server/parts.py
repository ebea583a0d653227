"""Which part of a model each server keeps: as many numbers of each bucket as the others.

So servers have equal bytes to receive, to send and to step by, also of a bucket that is a single matrix, and all are at
work on a bucket as soon as its gradients are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvdlm.config import Config
from hvdlm.gradients.bucket import group_parameters
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.registry import bucket_bytes, codec_factory
from hvdlm.model.linear import Linear
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.held_parts import STEP
from hvdlm.strategies.server.group import ServerGroup
from hvdlm.strategies.sharded.partition import Partition
from hvdlm.strategies.sharded.partitions import readers_of


class ServedBucket(NamedTuple):
    """Parameters of which each server keeps a part."""

    partition: Partition
    pulled_as: torch.dtype  # in which workers get them
    layers: list[Linear]  # of the model, which may compute with low-precision copies of them


def make_buckets(model: Transformer, config: Config, group: ServerGroup) -> list[ServedBucket]:
    """Buckets of all parameters, in the order in which a backward pass completes them: the same on all ranks."""
    parameters = dict(model.named_parameters())
    layers = {name: each for name, each in model.named_modules() if isinstance(each, Linear)}
    of_layers = {name: name.rpartition(".")[0] for name in parameters if name.rpartition(".")[0] in layers}
    kinds = [list(parameters)]
    if model.dtype != torch.float32:  # products round matrices: nothing is lost if they travel so
        kinds = [[name for name in parameters if (name in of_layers) == is_layer] for is_layer in (True, False)]
    nbytes = bucket_bytes(config.comm, config.compression, group.everyone.node_count)
    groups = [each for kind in kinds for each in group_parameters({name: parameters[name] for name in kind}, nbytes)]
    position = {name: index for index, name in enumerate(reversed(list(parameters)))}
    groups.sort(key=lambda each: max(position[name] for name in each))
    owner = group.own_server if group.is_server else group.servers  # whom nothing belongs to
    made = []
    for each in groups:
        cpu, ranks = torch.device("cpu"), group.servers
        partition = Partition(each, cpu, torch.float32, owner, ranks, is_kept=True, is_rounded=group.is_server)
        # A worker's own steps move float32 numbers by less than a rounding
        only_products_read = model.dtype != torch.float32 and not config.local_steps.every
        rounds = config.server.pull == "bf16" or (only_products_read and of_layers.keys() >= each.keys())
        own_layers = dict.fromkeys(layers[of_layers[name]] for name in each if name in of_layers)
        made.append(ServedBucket(partition, torch.bfloat16 if rounds else torch.float32, [*own_layers]))
    return made


def compute_with(bucket: ServedBucket) -> None:
    """Lets the model of a worker compute with the bucket's weights, which become what its parameters were."""
    views = bucket.partition.split(bucket.partition.weights.data)
    for parameter, view in zip(bucket.partition.parameters, views, strict=True):
        view.copy_(parameter.data)
        parameter.data = view


def in_order_of_reading(model: Transformer, buckets: Sequence[ServedBucket]) -> list[int]:
    """The numbers of buckets in the order in which a forward pass reads them: that in which they are sent."""
    numbers = {each.partition: number for number, each in enumerate(buckets)}
    read = readers_of(model, [each.partition for each in buckets]).values()
    return list(dict.fromkeys(numbers[partition] for partitions in read for partition in partitions))


def make_codecs(buckets: Sequence[ServedBucket], config: Config) -> list[Codec]:
    """The codec of each bucket. Raises HvdlmError if there is none of that name."""
    make = codec_factory(config.compression.codec)
    return [make(each.partition, config.compression) for each in buckets]


def pieces_of_state(
    partition: Partition, server: int, kinds: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, slice, bool]]:
    """What a server keeps of a bucket beside the parameters, in the order in which it travels: the name of each tensor,
    which of its flattened numbers these are, and whether it is a count of steps, which is one number.
    """
    for name, piece in partition.pieces_of(server).items():
        for kind in kinds[name]:
            yield f"{kind}.{name}", slice(0, 1) if kind == STEP else slice(piece.start, piece.stop), kind == STEP


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers, one behind the other."""
    return torch.cat([each.detach().reshape(-1) for each in tensors]) if tensors else torch.empty(0)
