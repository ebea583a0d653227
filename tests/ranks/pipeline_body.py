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
SCHEDULES = ["gpipe", "1f1b", "eager_1f1b", "interleaved", "zero_bubble", "zero_bubble_h2"]

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
    pipeline.add_tied_gradients(dict(model.named_parameters()))
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


@check(sizes=[2, 4], schedule=SCHEDULES, recomputes=[False, True])
def check_gradients(comm: Communicator, schedule: str, recomputes: bool) -> None:
    """Those of plain PyTorch, of every parameter of this rank, for a GPT whose last micro-batch is smaller."""
    config = shape("gpt", layers=2 * comm.size)
    settings = settings_of(comm, schedule)
    model, plain = make_stages(comm, config, settings), make_whole(config)
    model.activation_checkpointing = recomputes
    begin = dict(plain.named_parameters())
    assert all(torch.equal(parameter, begin[name]) for name, parameter in model.named_parameters())
    assert model.activation_checkpointing or not recomputes
    pipeline = Pipeline(model, comm, settings)
    losses = passes(pipeline, model, micro_batches(0))
    loss = plain_loss(plain, 0)
    loss.backward()
    assert_gradients_are(model, plain, 1e-5)
    counted = int((batch(0)[1] != IGNORE).sum())
    assert len(losses) == (4 if model.has_last_stage else 0)
    if losses:
        assert abs(float(sum(losses)) / counted / float(loss) - 1) < 1e-6
    pipeline.close()


@check(sizes=[2, 4], engines=["mpi"], schedule=SCHEDULES, name=["gpt", "llama"])
def check_fifty_steps(comm: Communicator, schedule: str, name: str) -> None:
    """AdamW with gradients clipped to a norm that counts each parameter once; stages are uneven, documents masked."""
    layers = 2 * comm.size + 1
    config = shape(name, layers=layers, document_mask=True)
    stages = settings_of(comm, schedule).stages
    counts = [layers - stages + 1, *[1] * (stages - 1)]
    settings = settings_of(comm, schedule, split=",".join(map(str, counts)))
    model, plain = make_stages(comm, config, settings), make_whole(config)
    pipeline = Pipeline(model, comm, settings)
    # With eps = 1e-8 gradients that are nearly 0 make whole steps: the norm of step 18 is then 8e-5 off that of float64
    # in plain PyTorch, too
    steps = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-6}
    ours, expected = (torch.optim.AdamW(each.parameters(), **steps) for each in (model, plain))
    clipped = 0
    for step in range(50):
        ours.zero_grad()
        parts = micro_batches(step, masks=True)
        losses = passes(pipeline, model, parts)
        counted = sum(int((each.targets != IGNORE).sum()) for each in parts)
        mean = comm.broadcast_(sum(losses, torch.zeros(())) / counted, root=comm.size - 1)
        norm = norm_of_all(comm, model)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, 0.6 / norm)
        ours.step()
        expected.zero_grad()
        loss = plain_loss(plain, step, masks=True)
        loss.backward()
        plain_norm = float(nn.utils.clip_grad_norm_(plain.parameters(), 0.6))
        expected.step()
        clipped += plain_norm > 0.6
        assert abs(norm / plain_norm - 1) < 1e-4, (step, norm, plain_norm)
        assert abs(float(mean) / float(loss) - 1) < 1e-6, (step, float(mean), float(loss))
    assert 0 < clipped < 50
    assert float(loss) < 3.9  # it has learned something: it began at log 61, 4.11
    if config.tie_embeddings and (model.has_first_stage or model.has_last_stage):
        peer = comm.size - 1 - comm.rank
        weight = model.token_embedding.weight.detach()
        send = comm.send_async(weight.clone(), peer)
        assert torch.equal(comm.receive_(torch.empty_like(weight), peer), weight)
        send.wait()
    pipeline.close()


def norm_of_all(comm: Communicator, model: StageModel) -> float:
    """Of the gradients of all ranks."""
    left_out = model.not_counted()
    squares = [float(each.grad.pow(2).sum()) for name, each in model.named_parameters() if name not in left_out]
    return float(comm.all_reduce_(torch.tensor([sum(squares)]))) ** 0.5


@check(sizes=[2, 4], engines=["mpi"], schedule=SCHEDULES, sequences=[0, 1, 3])
def check_fewer_micro_batches_than_ranks(comm: Communicator, schedule: str, sequences: int) -> None:
    """Nothing hangs, and what is to happen before the last gradients happens once."""
    config = shape("gpt", layers=2 * comm.size)
    model = make_stages(comm, config, settings_of(comm, schedule))
    pipeline = Pipeline(model, comm, settings_of(comm, schedule))
    called: list[int] = []
    parts = micro_batches(0, sequences=sequences) if sequences else []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    losses = passes(pipeline, model, parts, before_last=lambda: called.append(1))
    assert called == [1]
    assert len(losses) == (len(parts) if model.has_last_stage else 0)
    pipeline.close()


@check(sizes=[2], engines=["mpi"], schedule=SCHEDULES)
def check_gradients_after_the_last_call(comm: Communicator, schedule: str) -> None:
    """`before_last` comes before the last gradient, so that none is final, as hooks of autograd see it, before."""
    config = shape("gpt", layers=4)
    model = make_stages(comm, config, settings_of(comm, schedule))
    pipeline = Pipeline(model, comm, settings_of(comm, schedule))
    seen: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    at: list[int] = []
    passes(pipeline, model, micro_batches(0), before_last=lambda: at.append(len(seen)))
    after = seen[at[0] :]
    assert after, "nothing was made after the call"
    assert len(after) == len(set(after)), "a gradient was made twice after it was said to be final"
    # As many calls as plain accumulation makes: a matrix that is both embedding and output gets one a stage
    assert len(seen) == 4 * len(list(model.parameters()))
    pipeline.close()


@check(sizes=[2, 4], engines=["mpi"], boundary=["bf16", "int8"])
def check_fewer_bits_between_stages(comm: Communicator, boundary: str) -> None:
    """Gradients are near those of fp32, and not equal to them."""
    config = shape("llama", layers=comm.size)
    model, plain = make_stages(comm, config, settings_of(comm, "1f1b")), make_whole(config)
    pipeline = Pipeline(model, comm, settings_of(comm, "1f1b", boundary=boundary))
    passes(pipeline, model, micro_batches(0))
    plain_loss(plain, 0).backward()
    assert_gradients_are(model, plain, {"bf16": 0.02, "int8": 0.05}[boundary])
    name, parameter = list(model.named_parameters())[-1]
    assert not torch.allclose(parameter.grad, dict(plain.named_parameters())[name].grad, rtol=1e-5)
    pipeline.close()


@check(sizes=[2, 4], engines=["mpi"], schedule=["1f1b", "interleaved"])
def check_validation(comm: Communicator, schedule: str) -> None:
    """Forward passes alone give the hidden states of the whole model, in order, on the last stage."""
    config = shape("llama", layers=2 * comm.size)
    model, plain = make_stages(comm, config, settings_of(comm, schedule)), make_whole(config)
    pipeline = Pipeline(model, comm, settings_of(comm, schedule))
    seen: list[Tensor] = []
    for parts in (micro_batches(0), []):
        pipeline.evaluate(parts, lambda hidden, targets: seen.append(hidden))
    assert len(seen) == (4 if model.has_last_stage else 0)
    if seen:
        with torch.no_grad():
            expected = plain(batch(0)[0])
        assert (torch.cat(seen) - expected).norm() <= 1e-5 * expected.norm()
    pipeline.close()


@check(sizes=[2], engines=["mpi"], schedule=SCHEDULES)
def check_dropout_by_micro_batch_and_stage(comm: Communicator, schedule: str) -> None:
    """Masks depend on nothing but what `seed` is told: recomputed, or in another order of passes, they are the same."""
    config = shape("gpt", layers=4, dropout=0.2)
    told: list[tuple[int, int]] = []

    def seed(micro_batch: int, stage: int) -> None:
        told.append((micro_batch, stage))
        torch.manual_seed(1000 * micro_batch + stage)

    gradients = []
    for recomputes in (False, True):
        model = make_stages(comm, config, settings_of(comm, schedule))
        model.activation_checkpointing = recomputes
        pipeline = Pipeline(model, comm, settings_of(comm, schedule))
        passes(pipeline, model, micro_batches(0), seed=seed)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        pipeline.close()
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()
    stages = range(comm.rank, settings_of(comm, schedule).stages, 2)
    assert sorted(told) == sorted((each, stage) for each in range(4) for stage in stages for _ in range(2))


@check(sizes=[2], engines=["mpi"])
def check_low_precision(comm: Communicator) -> None:
    """Products in bf16 with gradients of weights made later: bit for bit those that are made at once."""
    config = shape("gpt")
    gradients = []
    for schedule in ("1f1b", "zero_bubble"):
        model = make_stages(comm, config, settings_of(comm, schedule))
        model.set_compute_dtype(torch.bfloat16)
        pipeline = Pipeline(model, comm, settings_of(comm, schedule))
        passes(pipeline, model, micro_batches(0))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        pipeline.close()
    assert torch.equal(gradients[0], gradients[1])
