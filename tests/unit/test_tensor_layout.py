"""Regions of parameters that tensor ranks hold: expected ones are counted by hand, and all ranks' tile the whole."""

from __future__ import annotations

import pytest
import torch
from shapes import GPT2, LLAMA

from hvdlm.comm.solo import SoloCommunicator
from hvdlm.errors import HvdlmError, JobError
from hvdlm.model.transformer import Transformer
from hvdlm.parallel.tensor.layout import cut, flat_runs, is_divided, parameter_regions
from hvdlm.parallel.tensor.model import TensorParallelTransformer

VOCABULARY = 61


def test_regions_by_hand() -> None:
    """LLAMA: 4 query heads and 2 of keys and values, each of 16 numbers; 8/3 of 64, in 64s, is 192."""
    regions = parameter_regions(LLAMA, VOCABULARY, rank=1, size=2)
    width = slice(0, 64)
    assert regions["blocks.1.attention.qkv.weight"] == [
        (slice(32, 64), width),  # queries
        (slice(80, 96), width),  # keys, from row 64
        (slice(112, 128), width),  # values, from row 96
    ]
    assert regions["blocks.0.attention.output.weight"] == [(slice(0, 64), slice(32, 64))]
    assert regions["blocks.0.mlp.up.weight"] == [(slice(96, 192), width), (slice(288, 384), width)]
    assert regions["blocks.0.mlp.down.weight"] == [(slice(0, 64), slice(96, 192))]
    assert regions["token_embedding.weight"] == [(slice(31, 61), width)]  # the first rank has one token more
    assert regions["output.weight"] == [(slice(31, 61), width)]
    assert regions["blocks.1.mlp_norm.weight"] == [(width,)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_all_ranks_have_each_number_once_or_all(shape: str, size: int) -> None:
    config = GPT2 if shape == "gpt2" else LLAMA.model_copy(update={"kv_heads": 4, "qkv_bias": True, "mlp_width": 67})
    with torch.device("meta"):
        whole = Transformer(config, VOCABULARY)
    by_rank = [parameter_regions(config, VOCABULARY, rank, size) for rank in range(size)]
    for name, parameter in whole.named_parameters():
        held = torch.zeros(parameter.shape, dtype=torch.int64)
        for regions in by_rank:
            for region in regions[name]:
                held[region] += 1
        times = 1 if is_divided(name) else size
        assert (held == times).all(), name
    assert all(list(regions) == [name for name, _ in whole.named_parameters()] for regions in by_rank)


def test_cut_stacks_regions() -> None:
    whole = torch.arange(12).view(6, 2)
    regions = [(slice(0, 1), slice(0, 2)), (slice(4, 6), slice(0, 2))]
    assert cut(whole, regions).tolist() == [[0, 1], [8, 9], [10, 11]]


@pytest.mark.parametrize("name", ["attention.qkv.weight", "attention.qkv.bias", "attention.output.weight"])
def test_runs_are_what_is_cut(name: str) -> None:
    regions = parameter_regions(GPT2, VOCABULARY, rank=1, size=2)[f"blocks.0.{name}"]
    shapes = {"attention.qkv.weight": (192, 64), "attention.qkv.bias": (192,), "attention.output.weight": (64, 64)}
    whole = torch.arange(torch.Size(shapes[name]).numel()).view(shapes[name])
    runs = flat_runs(regions, shapes[name])
    assert torch.equal(torch.cat([whole.flatten()[start:end] for start, end in runs]), cut(whole, regions).flatten())
    assert len(runs) == (64 if "output" in name else 3)


def test_heads_that_cannot_be_divided() -> None:
    with pytest.raises(HvdlmError, match="4 tensor ranks do not divide the 2 key and value heads"):
        parameter_regions(LLAMA, VOCABULARY, rank=0, size=4)


def test_more_ranks_than_there_is_to_divide() -> None:
    communicator = SoloCommunicator()
    communicator.size = 2
    narrow = GPT2.model_copy(update={"mlp_width": 67})
    with pytest.raises(JobError, match="2 is more than the 1 tokens"):
        TensorParallelTransformer(GPT2, 1, communicator)
    with pytest.raises(JobError, match="needs an MLP whose 67 hidden numbers"):
        TensorParallelTransformer(narrow, VOCABULARY, communicator, divides_sequence=True)
