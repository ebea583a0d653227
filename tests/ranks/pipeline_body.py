"""Pipelines of 2 and 4 ranks against plain PyTorch on one rank: gradients, losses of 50 steps, messages, validation."""

from __future__ import annotations

from typing import Any

import torch
from checks import check
from torch import Tensor, nn
from torch.nn import functional

from hvdlm.comm.communicator import Communicator
from hvdlm.config import ModelSection, ParallelSection
from hvdlm.model.loss import token_loss
from hvdlm.model.transformer import Transformer, document_ids
from hvdlm.parallel.pipeline.executor import MicroBatch, Pipeline
from hvdlm.parallel.pipeline.stage_model import StageModel
from hvdlm.parallel.pipeline.stages import blocks_by_cost, divide, flops
from hvdlm.targets import IGNORE
from hvdlm.timing import StepTimer

VOCABULARY, LENGTH, SEQUENCES = 61, 12, 7
MICRO_BATCH = 2  # so the last of 4 has one sequence
CPU = torch.device("cpu")
SCHEDULES = ["gpipe", "1f1b", "interleaved", "zero_bubble"]

GPT = {"layers": 4, "heads": 2, "width": 32, "context_length": LENGTH}
LLAMA = {
    **GPT,
    "layers": 8,
    "heads": 4,
    "kv_heads": 2,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "position": "rope",
    "bias": False,
    "tie_embeddings": False,
}


def shape(name: str, **changed: Any) -> ModelSection:
    return ModelSection.model_validate({**{"gpt": GPT, "llama": LLAMA}[name], **changed})


def settings_of(comm: Communicator, schedule: str, **changed: Any) -> ParallelSection:
    return ParallelSection.model_validate({"pipeline": comm.size, "schedule": schedule, **changed})


def make_stages(comm: Communicator, config: ModelSection, settings: ParallelSection) -> StageModel:
    counts = settings.blocks_of_stages or blocks_by_cost(config.layers, settings.stages, flops(config, VOCABULARY))
    model = StageModel(config, VOCABULARY, divide(counts)[comm.rank :: comm.size], CPU)
    model.initialise(seed=3)
    model.set_compute_dtype(torch.float32)
    return model


def make_whole(config: ModelSection) -> Transformer:
    model = Transformer(config, VOCABULARY)
    model.initialise(seed=3)
    return model


def batch(step: int, sequences: int = SEQUENCES) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (sequences, LENGTH) each, of which some do not count. A few words are frequent."""
    generator = torch.Generator().manual_seed(step)
    tokens = (torch.rand(sequences, LENGTH + 1, generator=generator) ** 2 * VOCABULARY).long()
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[-1:, 5:] = IGNORE
    return inputs, targets


def micro_batches(step: int, masks: bool = False, sequences: int = SEQUENCES) -> list[MicroBatch]:
    inputs, targets = batch(step, sequences)
    documents = document_ids(inputs, 0) if masks else None
    parts = documents.split(MICRO_BATCH) if documents is not None else [None] * len(inputs.split(MICRO_BATCH))
    return [
        MicroBatch(*each) for each in zip(inputs.split(MICRO_BATCH), targets.split(MICRO_BATCH), parts, strict=True)
    ]


def passes(pipeline: Pipeline, model: StageModel, parts: list[MicroBatch], **options: Any) -> list[Tensor]:
    """Gradients of the mean loss."""
    tokens = sum(int((each.targets != IGNORE).sum()) for each in parts)

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return token_loss(hidden, model.output_weight, targets, model.dtype)

    losses = pipeline.train(parts, loss, 1 / max(1, tokens), StepTimer(CPU), **options)
    pipeline.add_tied_gradients()
    return losses


def plain_loss(model: Transformer, step: int, masks: bool = False) -> Tensor:
    """Mean over the tokens that count, by PyTorch's own loss over all logits of the batch."""
    inputs, targets = batch(step)
    hidden = model(inputs, document_ids(inputs, 0) if masks else None)
    logits = functional.linear(hidden, model.output_weight)
    return functional.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1), ignore_index=IGNORE)


def assert_gradients_are(model: StageModel, plain: Transformer, within: float) -> None:
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and expected[name].grad is not None, name
        distance = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert distance <= within, (name, float(distance))


@check(sizes=[2, 4], schedule=SCHEDULES, name=["gpt", "llama"], recomputes=[False, True])
def check_gradients(comm: Communicator, schedule: str, name: str, recomputes: bool) -> None:
    """Of two steps that are added up: of every parameter of this rank, those of plain PyTorch."""
    config = shape(name, layers=8)
    model, plain = make_stages(comm, config, settings_of(comm, schedule)), make_whole(config)
    model.activation_checkpointing = recomputes
    begin = dict(plain.named_parameters())
    assert all(torch.equal(parameter, begin[each]) for each, parameter in model.named_parameters())
    pipeline = Pipeline(model, comm, settings_of(comm, schedule))
    losses = passes(pipeline, model, micro_batches(0))
    loss = plain_loss(plain, 0)
    loss.backward()
    assert_gradients_are(model, plain, 1e-5)
    counted = int((batch(0)[1] != IGNORE).sum())
    assert len(losses) == (4 if model.has_last_stage else 0)
    if losses:
        assert abs(float(sum(losses)) / counted / float(loss) - 1) < 1e-6
    pipeline.close()
