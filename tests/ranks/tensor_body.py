"""Tensor parallelism against one rank that has the whole model, with PyTorch's cross-entropy over all logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import training_body
from checks import check
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mesh import Mesh
from hvdlm.config import ModelSection, ParallelSection
from hvdlm.errors import JobError
from hvdlm.model.transformer import Transformer, document_ids
from hvdlm.parallel.tensor.layout import cut, is_divided, parameter_regions
from hvdlm.parallel.tensor.model import TensorParallelTransformer
from hvdlm.targets import IGNORE

VOCABULARY, LENGTH, SEQUENCES, SEED = 61, 16, 4, 5
GPT2: dict[str, Any] = {"layers": 2, "heads": 4, "width": 32, "context_length": LENGTH}
LLAMA = {
    **GPT2,
    **{"kv_heads": 2, "norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False},
    "tie_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 untied": {**GPT2, "tie_embeddings": False, "mlp_width": 51},
    "llama": LLAMA,
    "llama tied": {**LLAMA, "kv_heads": 4, "tie_embeddings": True, "qkv_bias": True, "document_mask": True},
}


def tensor_ranks(comm: Communicator) -> Communicator:
    return Mesh(comm, {"pipeline": 1, "data": 1, "shard": 1, "tensor": comm.size})["tensor"]


def make_models(
    comm: Communicator, shape: str | ModelSection, sequence: bool = False
) -> tuple[TensorParallelTransformer, Transformer]:
    """This rank's part, and the whole; with biases and norms that are not all alike."""
    config = ModelSection.model_validate(SHAPES[shape]) if isinstance(shape, str) else shape
    whole = Transformer(config, VOCABULARY)
    whole.initialise(SEED)
    ours = TensorParallelTransformer(config, VOCABULARY, comm, sequence)
    ours.initialise(SEED)
    generator = torch.Generator().manual_seed(1)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            own[name].copy_(cut(parameter, ours.regions[name]))
    return ours, whole


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of two sequences in four, (SEQUENCES, LENGTH) each; some targets do not count."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    tokens[:, 1::2] = tokens[:, :-1:2]  # something to learn: each token twice
    targets = tokens[:, 1:].clone()
    targets[0, 3:5] = IGNORE
    return tokens[:, :-1], targets


def documents_of(model: Transformer, inputs: Tensor) -> Tensor | None:
    return document_ids(inputs, 7) if model.config.document_mask else None


def whole_loss(model: Transformer, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model.logits(model(inputs, documents_of(model, inputs)))
    return functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), targets.reshape(-1), reduction="sum", ignore_index=-100
    )


def our_loss(model: Transformer, inputs: Tensor, targets: Tensor) -> Tensor:
    return model.token_loss(model(inputs, documents_of(model, inputs)), targets)


def backward(model: Transformer, loss_of: Any, step: int, at_once: int = 2) -> float:
    """The mean loss of a batch, whose gradients are added up over micro-batches."""
    inputs, targets = batch(step)
    count = int((targets != IGNORE).sum())
    total = 0.0
    for start in range(0, SEQUENCES, at_once):
        loss = loss_of(model, inputs[start:][:at_once], targets[start:][:at_once]) / count
        loss.backward()
        total += loss.item()
    return total


def largest_error(ours: TensorParallelTransformer, whole: Transformer) -> float:
    """Of gradients, relative to the norm of each parameter's."""
    expected = dict(whole.named_parameters())
    errors = []
    for name, parameter in ours.named_parameters():
        wanted = cut(expected[name].grad, ours.regions[name])
        errors.append(float((parameter.grad - wanted).norm() / expected[name].grad.norm()))
    return max(errors)


def assert_equal_on_all(comm: Communicator, tensors: Sequence[Tensor]) -> None:
    flat = torch.cat([each.detach().flatten() for each in tensors])
    assert all(torch.equal(flat, each) for each in comm.all_gather(flat))


@check(sizes=[2, 4], shape=list(SHAPES), checkpointing=[False, True], sequence=[False, True])
def check_gradients(comm: Communicator, shape: str, checkpointing: bool, sequence: bool) -> None:
    """Of a batch in two micro-batches, some of whose targets do not count; and the numbers of validation.

    `sequence`: between blocks each rank has some tokens of a sequence.
    """
    if comm.size > SHAPES[shape].get("kv_heads", 4):
        return
    ranks = tensor_ranks(comm)
    config = ModelSection.model_validate(SHAPES[shape] | ({"mlp_width": 52} if sequence else {}))
    ours, whole = make_models(ranks, config, sequence)
    ours.activation_checkpointing = checkpointing
    loss, expected = backward(ours, our_loss, 0), backward(whole, whole_loss, 0)
    assert abs(loss / expected - 1) <= 1e-6, (loss, expected)
    assert (error := largest_error(ours, whole)) <= 1e-5, error
    assert_equal_on_all(ranks, [each.grad for each in ours.replicated_parameters().values()])
    with torch.no_grad():
        inputs, targets = batch(1)
        hidden, logits = (each(inputs, documents_of(whole, inputs)) for each in (ours, whole))
        assert hidden.shape[1] == (LENGTH // comm.size if sequence else LENGTH)
        statistics, logits = ours.token_statistics(hidden, targets), whole.logits(logits)
        assert torch.allclose(ours.logits(hidden), logits, rtol=0, atol=1e-5)
        assert abs(float(ours.token_loss(hidden, targets) / whole_loss(whole, inputs, targets)) - 1) <= 1e-6
    counted = targets != IGNORE
    assert int(statistics.target_count) == int(counted.sum())
    assert int(statistics.correct_count) == int((logits.argmax(dim=-1) == targets)[counted].sum())
    ranks.close()


@check(sizes=[2], engines=["mpi"], shape=list(SHAPES))
def check_fifty_steps(comm: Communicator, shape: str) -> None:
    """The loss of each."""
    ranks = tensor_ranks(comm)
    ours, whole = make_models(ranks, shape)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.5) for each in (ours, whole)]
    losses = []
    for step in range(50):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append((backward(ours, our_loss, step % 5, SEQUENCES), backward(whole, whole_loss, step % 5, SEQUENCES)))
        for optimizer in optimizers:
            optimizer.step()
    worst = max(abs(own / expected - 1) for own, expected in losses)
    assert worst <= 1e-6, worst
    assert losses[-1][1] < losses[0][1] - 0.2
    assert_equal_on_all(ranks, list(ours.replicated_parameters().values()))
    ranks.close()


@check(sizes=[2], shape=["gpt2 untied", "llama"])
def check_initial_values_and_memory(comm: Communicator, shape: str) -> None:
    """Cut from the whole model's, bit for bit; a rank has half of what is not replicated."""
    config = ModelSection.model_validate(SHAPES[shape])
    whole = Transformer(config, VOCABULARY)
    whole.initialise(SEED)
    ours = TensorParallelTransformer(config, VOCABULARY, tensor_ranks(comm))
    ours.initialise(SEED)
    expected = dict(whole.named_parameters())
    regions = parameter_regions(config, VOCABULARY, comm.rank, comm.size)
    assert [name for name, _ in ours.named_parameters()] == list(expected)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, cut(expected[name], regions[name])), name
    divided = sum(each.numel() for name, each in expected.items() if is_divided(name))
    replicated = sum(each.numel() for each in expected.values()) - divided
    held = sum(each.numel() for each in ours.parameters())
    # The first of two ranks has one of 61 tokens more in each embedding, and of 51 hidden numbers
    uneven = 2 * 32 + (2 * (32 + 1 + 32) if "untied" in shape else 0)
    assert held == (divided + (uneven if comm.rank == 0 else -uneven)) // 2 + replicated


@check(sizes=[2], shape=["gpt2", "llama tied"], checkpointing=[False, True])
def check_bfloat16(comm: Communicator, shape: str, checkpointing: bool) -> None:
    """As far from the gradients in fp32 as the whole model in bfloat16 is, within a quarter more."""
    ranks = tensor_ranks(comm)
    ours, whole = make_models(ranks, shape)
    _, low = make_models(ranks, shape)
    for each in (ours, low):
        each.set_compute_dtype(torch.bfloat16)
        each.update_low_precision_weights()
    ours.activation_checkpointing = checkpointing
    losses = [backward(ours, our_loss, 0), backward(low, our_loss, 0), backward(whole, whole_loss, 0)]
    assert abs(losses[0] / losses[2] - 1) <= 2e-3, losses
    expected, rounded = dict(whole.named_parameters()), dict(low.named_parameters())
    squares = torch.zeros(3)  # of our error, of the rounded model's, of the gradients
    for name, parameter in ours.named_parameters():
        wanted, other = (cut(each[name].grad, ours.regions[name]) for each in (expected, rounded))
        squares += torch.stack([(x**2).sum() for x in (parameter.grad - wanted, other - wanted, wanted)])
    ratios = (ranks.all_reduce_(squares)[:2] / squares[2]).sqrt()
    assert ratios[0] <= 1.25 * ratios[1] <= 0.05, ratios
    ranks.close()


@check(sizes=[2, 4], sequence=[False, True])
def check_dropout(comm: Communicator, sequence: bool) -> None:
    """Equal on all ranks in the residual stream, another one on each in attention; again in a recomputed forward pass.

    What is dropped comes from the global seed, whatever the ranks have computed before.
    """
    ranks = tensor_ranks(comm)
    config = ModelSection.model_validate({**GPT2, "dropout": 0.3})
    gradients = []
    for checkpointing in (False, True):
        ours, _ = make_models(ranks, config, sequence)
        ours.activation_checkpointing = checkpointing
        torch.manual_seed(4 + (comm.rank if sequence else 0))
        backward(ours, our_loss, 0)
        gradients.append(torch.cat([each.grad.flatten() for each in ours.parameters()]))
        assert_equal_on_all(ranks, [each.grad for each in ours.replicated_parameters().values()])
        if not sequence:
            assert_equal_on_all(ranks, [torch.rand(3)])
    assert torch.equal(*gradients)
    attention = ours.blocks[0].attention
    queries = torch.ones(1, 2, LENGTH, 8)
    torch.manual_seed(4)
    masks = ranks.all_gather(attention.attend(queries, queries, queries, None, 0.5))
    assert not any(torch.equal(masks[0], each) for each in masks[1:])
    ranks.close()


@check(is_thorough=True, sizes=[2], engines=["mpi"], shape=["gpt2", "llama"], sequence=[False, True])
def check_compiled_blocks(comm: Communicator, shape: str, sequence: bool) -> None:
    """Each block is one graph, collectives included."""
    ranks = tensor_ranks(comm)
    ours, whole = make_models(ranks, shape, sequence)
    torch.compiler.reset()  # a length other than that of the check before would be a variable of the graph
    counters.clear()
    for block in ours.blocks:
        block.compile()
    backward(ours, our_loss, 0)
    backward(whole, whole_loss, 0)
    assert (error := largest_error(ours, whole)) <= 1e-5, error
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 1
    ranks.close()


@check(sizes=[2, 4], clip_norm=[0.0, 0.3])
def check_trainer(comm: Communicator, clip_norm: float) -> None:
    """Steps of SGD on 1 or 2 pairs of tensor ranks: parameters, loss and norm are those of PyTorch on the joined batch.

    Pairs have different numbers of sequences, which their ranks divide if gradients are clipped. A wish to stop of the
    last rank is heard by all.
    """
    config = training_body.make_config("fp32", clip_norm)
    config = config.model_copy(update={"parallel": ParallelSection(tensor=2, sequence=clip_norm > 0)})
    trainer = training_body.make_trainer(comm, config)
    batches = training_body.Batches(trainer.readers, 0, ignored=True)
    plain = training_body.make_plain_model(config)
    optimizer = torch.optim.SGD(plain.parameters(), lr=training_body.RATE)
    begin = {name: each.detach().clone() for name, each in plain.named_parameters()}
    trainer.start()
    assert isinstance(trainer.model, TensorParallelTransformer)
    for step in range(5):
        assert trainer.train_step(batches, stop_here=step == 4 and comm.rank == comm.size - 1) == (step == 4)
        optimizer.zero_grad()
        loss = training_body.plain_loss(plain, step, ignored=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_norm or float("inf"))
        optimizer.step()
        record = trainer.metrics.train[-1]
        assert abs(record["loss"] / float(loss) - 1) <= 1e-6
        assert abs(record["grad_norm"] / float(norm) - 1) <= 1e-5
        squares = torch.zeros(2)
        for name, parameter in plain.named_parameters():
            regions = trainer.model.regions[name]
            moved = trainer.parameters[name].detach() - cut(begin[name], regions)
            expected = cut(parameter.detach() - begin[name], regions)
            squares += torch.stack([(moved - expected).square().sum(), expected.square().sum()])
        assert squares[0] <= 1e-10 * squares[1], squares
    trainer._replica_check.compare()
    trainer.strategy.close()


@check(sizes=[4])
def check_replicas_by_part(comm: Communicator) -> None:
    """Of two pairs: a part that differs from the other pair's, and a norm that differs from its neighbour's."""
    config = training_body.make_config("fp32", 0.0)
    config = config.model_copy(update={"parallel": ParallelSection(tensor=2)})
    trainer = training_body.make_trainer(comm, config)
    trainer._replica_check.compare()
    with torch.no_grad():
        trainer.model.blocks[0].mlp.up.weight[0, 0] += float(comm.rank == 3)
    said = refused(trainer._replica_check.compare)
    assert "rank 3 on" in said and "heal" not in said  # which needs the whole model
    with torch.no_grad():
        trainer.model.blocks[0].mlp.up.weight[0, 0] -= float(comm.rank == 3)
        trainer.model.blocks[0].mlp.up.weight.copy_(trainer.readers.broadcast_(trainer.model.blocks[0].mlp.up.weight))
        trainer.model.final_norm.weight += comm.rank % 2  # in both pairs alike
    assert "rank 1 on" in refused(trainer._replica_check.compare)
    trainer.strategy.close()


def refused(action: Callable[[], object]) -> str:
    """The sentence by which all ranks are told."""
    try:
        action()
    except JobError as error:
        return str(error)
    raise AssertionError("nothing was refused")
