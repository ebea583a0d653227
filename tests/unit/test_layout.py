"""Parameters and memory of a rank in a layout, against hand counts and against the real module."""

from __future__ import annotations

import pytest
import torch
from shapes import GPT2, LLAMA, preset

from hvdlm.config import ModelSection
from hvdlm.model.layout import (
    Layout,
    Parameters,
    block_parameters,
    bubble_share,
    micro_batches,
    micro_batches_held,
    most_parameters,
    stage_flops_per_token,
    stage_parameters,
)
from hvdlm.model.memory import TrainingMemory, training_memory_bytes
from hvdlm.model.size import flops_per_token, parameter_count
from hvdlm.model.transformer import Transformer

GIB = 2**30


def memory(layout: Layout, config: ModelSection = GPT2, **options: object) -> TrainingMemory:
    """Of 3 sequences at once with a vocabulary of 100, in bf16 on a GPU."""
    return training_memory_bytes(config, 100, 3, "bf16", "cuda", layout=layout, **options)  # type: ignore[arg-type]


def test_parameters_of_a_block_by_hand() -> None:
    # width 64, 4 heads: 3 x 64 x 64 and 64 x 64 in attention, 2 x 64 x 256 in the MLP; biases 192, 64, 256, 64 and two
    # norms of 128
    assert block_parameters(GPT2, Layout()) == Parameters(16384 + 32768, 0, 192 + 64 + 256 + 64 + 256)
    # Of two tensor ranks each has half of every matrix, of the biases of 192 and 256, and all of the others
    assert block_parameters(GPT2, Layout(tensor=2)) == Parameters(24576, 0, 96 + 64 + 128 + 64 + 256)
    # 2 of 4 heads of keys and values, 16 each: 128 x 64 and 64 x 64; 3 x 64 x 192 (8/3 x 64 = 170.7, rounded up to 192)
    assert block_parameters(LLAMA, Layout()) == Parameters(8192 + 4096 + 36864, 0, 128)
    assert block_parameters(LLAMA, Layout(tensor=2)) == Parameters(6144 + 18432, 0, 128)


def test_parameters_of_pipeline_stages_by_hand() -> None:
    config = GPT2.model_copy(update={"layers": 5})
    block = 49152 + 832
    found = [stage_parameters(config, 100, Layout(pipeline=2), stage) for stage in range(2)]
    assert found[0].total == 3 * block + 100 * 64 + 32 * 64  # embeddings of tokens and positions
    assert found[1].total == 2 * block + 100 * 64 + 128  # the same matrix, as the output's, and the last norm
    untied = config.model_copy(update={"tie_embeddings": False})
    assert stage_parameters(untied, 100, Layout(pipeline=2), 1) == found[1]
    assert most_parameters(config, 100, Layout(pipeline=2)) == found[0].total
    given = Layout(pipeline=2, blocks=(1, 4))
    assert [stage_parameters(config, 100, given, stage).matrices for stage in range(2)] == [49152, 4 * 49152]


@pytest.mark.parametrize("config", [GPT2, LLAMA, LLAMA.model_copy(update={"tie_embeddings": True})])
def test_one_rank_has_every_parameter(config: ModelSection) -> None:
    own = stage_parameters(config, 101, Layout(), 0)
    with torch.device("meta"):
        model = Transformer(config, 101)
    assert own.total == sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config, 101)
    assert own.vectors == sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)


def test_tensor_ranks_divide_the_vocabulary() -> None:
    whole, half = (stage_parameters(LLAMA, 101, Layout(tensor=ranks), 0) for ranks in (1, 2))
    assert (whole.embeddings, half.embeddings) == (2 * 101 * 64, 2 * 51 * 64)  # the first rank has one more token


def test_flops_of_stages_are_those_of_the_model() -> None:
    for layout in (Layout(), Layout(pipeline=2), Layout(tensor=2), Layout(tensor=2, pipeline=2)):
        stages = [stage_flops_per_token(LLAMA, 100, layout, stage) for stage in range(layout.pipeline)]
        assert 3 * layout.tensor * sum(stages) == pytest.approx(flops_per_token(LLAMA, 100))


def test_state_of_llama_70b_under_zero_by_hand() -> None:
    """70,553,706,496 parameters on 64 ranks, of which a block has 855,638,016 in matrices."""
    config, count = preset("llama-70b"), 70_553_706_496
    block, vocabulary, vectors = 855_638_016, 128256 * 8192, 161 * 8192
    assert count == 80 * block + 2 * vocabulary + vectors
    slice_, bucket = count // 64, 25 * 2**20
    options = {"activation_checkpointing": True, "bucket_bytes": bucket}
    none, *stages = (
        training_memory_bytes(config, 128256, 1, "bf16", "cuda", layout=Layout(zero, shard=64), **options)  # type: ignore[arg-type]
        for zero in range(4)
    )
    assert (none.parameters, none.gradients, none.moments) == (4 * count, 4 * count, 8 * count)
    assert none.working_parameters == 2 * 80 * block
    for memory in stages:
        assert (memory.parameters, memory.moments) == (4 * slice_, 8 * slice_)
    # The two largest parameters, embedding and output projection, are larger than a bucket and are sent as a whole
    assert [each.gradients for each in stages] == [4 * count, *[4 * slice_ + 2 * 4 * vocabulary] * 2]
    whole = 2 * 80 * block + 4 * (2 * vocabulary + vectors)
    assert [each.working_parameters for each in stages] == [whole, whole, 2 * 4 * vocabulary + 4 * vectors]
    assert len({each.activations for each in (none, *stages)}) == 1


def test_zero_3_gathers_two_blocks_where_they_are_larger_than_embeddings() -> None:
    config = GPT2.model_copy(update={"layers": 3, "tie_embeddings": False})  # a block's matrices are 49152 numbers
    vectors = 3 * 832 + 128
    assert memory(Layout(3, shard=4), config).working_parameters == 2 * 2 * 49152 + 4 * vectors
    fp32 = training_memory_bytes(config, 100, 3, "fp32", "cuda", layout=Layout(3, shard=4))
    assert fp32.working_parameters == 2 * 4 * 49152 + 4 * vectors
    for zero in (1, 2):
        fp32 = training_memory_bytes(config, 100, 3, "fp32", "cuda", layout=Layout(zero, shard=4))
        assert fp32.working_parameters == 4 * parameter_count(config, 100)


def test_slices_are_rounded_up_and_buckets_are_no_more_than_all_gradients() -> None:
    count = parameter_count(GPT2, 100)
    odd = memory(Layout(2, shard=7), bucket_bytes=2**30)
    assert odd.parameters == 4 * -(-count // 7)
    assert odd.gradients == 4 * count


def test_moments_of_other_optimizers_are_divided_too() -> None:
    count, matrices = parameter_count(GPT2, 100), 2 * 49152
    for algorithm, expected in {"sgd": 4 * count // 4, "muon": 8 * count // 4 - 4 * matrices // 4}.items():
        assert memory(Layout(1, shard=4), algorithm=algorithm).moments == expected


def test_tensor_ranks_divide_heads_and_hidden_numbers_of_activations() -> None:
    """Of a token and a block: 8 x 64 for the residual stream, 2 x 2 x 64 for the norms; 2 x (192 + 64 + 2 x 256) for
    queries, keys, values, attention's output and the MLP.
    """
    tokens = 3 * 32
    assert memory(Layout()).activations == 2 * tokens * (8 * 64 + 2 * 2 * 64 + 2 * (192 + 64 + 512))
    assert memory(Layout(tensor=2)).activations == 2 * tokens * (8 * 64 + 2 * 2 * 64 + 2 * (96 + 32 + 256))
    assert memory(Layout(tensor=2)).temporary == memory(Layout()).temporary / 2


def test_a_first_stage_holds_as_many_micro_batches_as_there_are_stages() -> None:
    config = GPT2.model_copy(update={"layers": 8})
    one = memory(Layout(), config).activations
    few, many = (memory(Layout(pipeline=4), config, micro_batches=count) for count in (2, 16))
    assert (few.activations, many.activations) == (one / 4 * 2, one / 4 * 4)
    assert many.loss == 0  # the last stage, which has it, holds one micro-batch
    assert memory(Layout(pipeline=4), config, micro_batches=1).loss > 0
    deep = GPT2.model_copy(update={"layers": 32})
    recomputed = memory(Layout(pipeline=4), deep, micro_batches=16, activation_checkpointing=True)
    assert recomputed.activations == 4 * 8 * 96 * 4 * 64 + one / 8  # 4 micro-batches, 8 blocks; and one block's rest


@pytest.mark.parametrize(
    ("schedule", "chunks", "held", "share"),
    [
        ("gpipe", 1, [12, 12, 12, 12], 1),
        ("1f1b", 1, [4, 3, 2, 1], 1),
        # rank 0 begins with 2 x 3 + 4 forward passes of half its blocks, then one more before the first backward pass
        ("interleaved", 2, [5.5, 4.5, 3.5, 2.5], 1 / 2),
        ("eager_1f1b", 1, [7, 5, 3, 1], 1),
        ("zero_bubble", 1, [4, 4, 4, 4], 1 / 3),
        ("zero_bubble_h2", 1, [7, 7, 7, 7], 1 / 3),
    ],
)
def test_schedules(schedule: str, chunks: int, held: list[float], share: float) -> None:
    layout = Layout(pipeline=4, schedule=schedule, chunks=chunks)  # type: ignore[arg-type]
    assert [micro_batches_held(12, layout, stage) for stage in range(4)] == held
    assert bubble_share(layout) == share
    assert micro_batches_held(2, layout, 0) == 2


def test_micro_batches_of_the_ranks_with_most() -> None:
    assert micro_batches(32, 4, Layout(data=2, shard=2)) == 2
    assert micro_batches(33, 4, Layout(data=2, shard=2)) == 3  # 9 sequences
    assert micro_batches(1, 4, Layout(tensor=8, pipeline=8)) == 1


def test_layouts_in_words() -> None:
    assert str(Layout(3, data=2, shard=8, tensor=4, pipeline=2)) == "ZeRO 3 x 8, data 2, tensor 4, pipeline 2"
    assert str(Layout(pipeline=2, schedule="zero_bubble")) == "pipeline 2, zero bubble"
    assert (str(Layout()), Layout(3, 2, 8, 4, 2).ranks) == ("one rank", 128)
