"""Which stage has which parameters, and what a model of some stages is given."""

from __future__ import annotations

import itertools

import pytest
import torch
from shapes import GPT2, LLAMA

from hvdlm.config import ModelSection
from hvdlm.model.size import flops_per_token
from hvdlm.model.transformer import Transformer
from hvdlm.parallel.pipeline.stage_model import StageModel
from hvdlm.parallel.pipeline.stages import Costs, blocks_by_cost, divide, flops

VOCABULARY = 61
CPU = torch.device("cpu")


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["tied", "untied"])
@pytest.mark.parametrize("counts", [[1, 4], [2, 1, 2], [1, 1, 1, 1, 1], [5, 0]])
def test_stages_tile_the_model(config: ModelSection, counts: list[int]) -> None:
    """Each parameter is on one stage, but for a tied matrix, which the first and the last have."""
    config = config.model_copy(update={"layers": 5})
    stages = divide(counts)
    assert [len(stage.layers) for stage in stages] == counts
    for name in dict(Transformer(config, VOCABULARY).named_parameters()):
        holders = [index for index, stage in enumerate(stages) if stage.holds(name, config.tie_embeddings)]
        is_tied = config.tie_embeddings and name == "token_embedding.weight"
        assert holders == [0, len(stages) - 1] if is_tied else len(holders) == 1, (name, holders)


def test_where_parameters_are() -> None:
    first, second = divide([1, 1])
    names = ["token_embedding.weight", "position_embedding.weight", "blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"]
    names += ["final_norm.bias", "output.weight"]
    assert [first.holds(name, tied=False) for name in names] == [True, True, True, False, False, False]
    assert [second.holds(name, tied=False) for name in names] == [False, False, False, True, True, True]
    assert second.holds("token_embedding.weight", tied=True)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["tied", "untied"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_models_of_stages_begin_as_the_whole_model_does(config: ModelSection, chunks: int) -> None:
    """Bit for bit, under the same names; and they have no memory for anything else."""
    config = config.model_copy(update={"layers": 5})
    whole = Transformer(config, VOCABULARY)
    whole.initialise(seed=7)
    expected = dict(whole.named_parameters())
    stages = divide([1] * 4 + [1] if chunks == 1 else [1, 2, 1, 1])
    ranks = len(stages) // chunks
    found: set[str] = set()
    for rank in range(ranks):
        own = stages[rank::ranks]
        model = StageModel(config, VOCABULARY, own, CPU)
        model.initialise(seed=7)
        model.set_compute_dtype(torch.bfloat16)
        parameters = dict(model.named_parameters())
        assert parameters.keys() == {
            name for name in expected if any(stage.holds(name, config.tie_embeddings) for stage in own)
        }
        assert all(torch.equal(parameter, expected[name]) for name, parameter in parameters.items())
        copies = [layer.low_precision_weight for layer in model.modules() if hasattr(layer, "low_precision_weight")]
        assert len(copies) == 4 * sum(len(stage.layers) for stage in own)
        assert all(copy is not None and copy.device == CPU for copy in copies)
        left_out = model.not_counted()
        assert left_out == (["token_embedding.weight"] if config.tie_embeddings and rank == ranks - 1 else [])
        found |= parameters.keys() - set(left_out)
    assert found == expected.keys()


@pytest.mark.parametrize("layers", [1, 2, 5, 7])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("costs", [Costs(0, 1, 0), Costs(0, 1, 2.5), Costs(1.5, 1, 3), Costs(0, 1, 9)], ids=str)
@pytest.mark.parametrize("slowness", [(), (1.0, 2.0, 0.7)], ids=["equally fast", "not"])
def test_blocks_by_cost_are_the_best_of_all(
    layers: int, stages: int, costs: Costs, slowness: tuple[float, ...]
) -> None:
    def of_each(counts: tuple[int, ...]) -> list[float]:
        own = [count * costs.block for count in counts]
        own[0] += costs.embedding
        own[-1] += costs.loss
        return [cost * factor for cost, factor in zip(own, slowness or (1.0,) * stages, strict=False)]

    counts = tuple(blocks_by_cost(layers, stages, costs, slowness[:stages]))
    every = [each for each in itertools.product(range(layers + 1), repeat=stages) if sum(each) == layers]
    least = min(max(of_each(each)) for each in every)
    assert sum(counts) == layers
    assert max(of_each(counts)) == pytest.approx(least)
    level = min(sum(cost**2 for cost in of_each(each)) for each in every if max(of_each(each)) <= least + 1e-9)
    assert sum(cost**2 for cost in of_each(counts)) == pytest.approx(level)


def test_a_large_vocabulary_takes_the_place_of_blocks() -> None:
    """Of GPT-2 the loss is 6 x 50257 x 768 operations for one token, a block 6 x 12 x 768^2 and its attention."""
    config = GPT2.model_copy(update={"layers": 12, "heads": 12, "width": 768, "context_length": 1024})
    costs = flops(config, 50257)
    assert costs.loss == 6 * 50257 * 768
    assert costs.block == 6 * 12 * 768**2 + 6 * 768 * 1024
    assert costs.embedding == 0
    assert 12 * costs.block + costs.loss == flops_per_token(config, 50257)
    # 5 blocks' worth: 12 and 5 are 17 to be shared by four
    assert blocks_by_cost(12, 4, costs) == [4, 4, 4, 0]
    assert blocks_by_cost(12, 2, costs) == [8, 4]
