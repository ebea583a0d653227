"""Averaged gradients against plain PyTorch on the joined batch."""

from __future__ import annotations

import time

import torch
from checks import check
from torch import nn
from torch.nn import functional

from hvdlm.comm.communicator import Communicator
from hvdlm.config import CommSection, CompressionSection, Config, ModelSection, TrainSection
from hvdlm.gradients.sync import GradientSync
from hvdlm.model.loss import token_loss
from hvdlm.model.transformer import Transformer
from hvdlm.training.model import make_model as make_whole_model

VOCABULARY, LENGTH = 61, 32
SMALL_BUCKET = 40_000 / 2**20  # MiB: several buckets, some parameters larger than one


def make_model() -> Transformer:
    model = Transformer(ModelSection(layers=2, heads=2, width=32, context_length=LENGTH), VOCABULARY)
    model.initialise(seed=3)
    return model


def make_sync(model: nn.Module, comm: Communicator, algorithm: str, bucket_mb: float = SMALL_BUCKET) -> GradientSync:
    return GradientSync(model, comm, CommSection(bucket_mb=bucket_mb, algorithm=algorithm), CompressionSection())


def joined_batch(sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCABULARY, (sequences, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def plain_gradients(sequences: int) -> dict[str, torch.Tensor]:
    """What one process without hvdlm's loss, buckets or communicator computes: the mean over all tokens."""
    model = make_model()
    inputs, targets = joined_batch(sequences)
    logits = functional.linear(model(inputs), model.token_embedding.weight)
    functional.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_joined_batch(comm: Communicator, algorithm: str) -> None:
    """Shares are equal, unequal, cut into micro-batches of unequal size, or empty on some ranks."""
    for sequences, at_once in ((12, 12), (7, 2), (7, 1), (2, 1), (1, 1)):
        model = make_model()
        sync = make_sync(model, comm, algorithm)
        assert len(sync.buckets) > 3
        first = comm.rank * sequences // comm.size
        last = (comm.rank + 1) * sequences // comm.size
        inputs, targets = (part[first:last] for part in joined_batch(sequences))
        for repetition in range(2):  # the second step must not remember the first
            sync.zero_grad()
            starts = list(range(0, last - first, at_once))
            for start in starts:
                loss = token_loss(model(inputs[start:][:at_once]), model.output_weight, targets[start:][:at_once])
                if start == starts[-1]:
                    sync.set_last_micro_batch()
                loss.backward()
            sync.wait()
            sync.scale_(1 / (sequences * LENGTH))
            expected = plain_gradients(sequences)
            for name, parameter in model.named_parameters():
                difference = (parameter.grad - expected[name]).abs().max()
                assert difference <= 1e-6, (name, sequences, at_once, repetition, difference)
            norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
            assert torch.allclose(sync.norm(), norm, rtol=1e-5)


def check_norm(comm: Communicator, algorithm: str) -> None:
    """Equal on all ranks, bit for bit, even where their buckets are not; each looks at its own part alone."""
    model = make_model()
    sync = make_sync(model, comm, algorithm)
    backward_pass(model, sync)
    expected = torch.cat([bucket.buffer for bucket in sync.buckets]).norm()
    for bucket in sync.buckets:
        parts = bucket.buffer.tensor_split(comm.size)
        for rank, part in enumerate(parts):
            if rank != comm.rank:
                part.fill_(float("nan"))
    norm = sync.norm()
    assert torch.allclose(norm, expected, rtol=1e-6)
    assert len(set(comm.all_gather_object(float(norm)))) == 1


@check(is_timing=True)
def check_overlap(comm: Communicator, algorithm: str) -> None:
    """The first bucket leaves while the backward pass has half of the gradients still to make."""
    model = make_model()
    sync, made = make_sync(model, comm, algorithm), note_gradients(model)
    backward_pass(model, sync)
    assert sync.traffic.first_sent < made[len(made) // 2]  # not only before the last gradient
    # a ring sends 2 (n-1)/n of the buffer; where the chunks of a bucket are unequal, an element more or less
    ring = 2 * (comm.size - 1) * 4 * sum(parameter.numel() for parameter in model.parameters()) / comm.size
    slack = 8 * comm.size * len(sync.buckets)
    assert abs(sync.traffic.dense_bytes - ring) <= slack
    assert abs(sync.traffic.wire_bytes - ring) <= slack


# compiling takes long, and is the same everywhere
@check(sizes=[2], engines=["mpi"], is_timing=True, algorithm=["ring"])
def check_overlap_when_compiled(comm: Communicator, algorithm: str) -> None:
    """As `train.compile` compiles it, and in bf16, it leaves long before the backward pass ends."""
    # blocks of tests/parallel/test_fast_path.py: what is compiled for one serves the other
    shape = {"layers": 8, "heads": 2, "width": 32, "context_length": LENGTH}
    config = Config(model=ModelSection(**shape), train=TrainSection(precision="bf16", compile=True))
    model = make_whole_model(config, VOCABULARY, torch.device("cpu"))
    sync, made = make_sync(model, comm, algorithm), note_gradients(model)
    backward_pass(model, sync, sequences=8)
    shares = []
    for _ in range(5):  # the least counts: what else the machine does only delays
        made.clear()
        begin = backward_pass(model, sync, sequences=8)
        shares.append((sync.traffic.first_sent - begin) / (made[-1] - begin))
    assert min(shares) < 0.7  # compiled as a whole, the model would have no gradient complete by then


def note_gradients(model: Transformer) -> list[float]:
    """A list that fills with the times at which gradients are complete."""
    made: list[float] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: made.append(time.perf_counter()))
    return made


def backward_pass(model: Transformer, sync: GradientSync, sequences: int = 4) -> float:
    """Returns when it began."""
    inputs, targets = joined_batch(sequences)
    sync.zero_grad()
    sync.set_last_micro_batch()
    loss = token_loss(model(inputs), model.output_weight, targets, model.dtype)
    begin = time.perf_counter()
    loss.backward()
    sync.wait()
    return begin


def check_missing_gradients(comm: Communicator, algorithm: str) -> None:
    """A parameter that got no gradient, on one rank or on all, counts as zero and nobody waits for ever."""
    model = nn.ModuleDict({"first": nn.Linear(50, 50), "second": nn.Linear(50, 50), "never": nn.Linear(50, 50)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    sync = make_sync(model, comm, algorithm, bucket_mb=1000 / 2**20)
    sync.zero_grad()
    sync.set_last_micro_batch()
    x = torch.ones(1, 50)
    (model["first"](x) if comm.rank == 0 else model["first"](x) + model["second"](x)).sum().backward()
    sync.wait()
    # d sum(W x + b) / dW = 1 for each rank that used the layer
    assert torch.equal(model["first"].weight.grad, torch.full((50, 50), float(comm.size)))
    assert torch.equal(model["second"].bias.grad, torch.full((50,), float(comm.size - 1)))
    assert torch.equal(model["never"].weight.grad, torch.zeros(50, 50))


def check_cleared_gradients_are_noticed(comm: Communicator, algorithm: str) -> None:
    model = make_model()
    sync = make_sync(model, comm, algorithm)
    sync.zero_grad()
    token_loss(model(*joined_batch(1)[:1]), model.output_weight, joined_batch(1)[1]).backward()
    for parameter in model.parameters():
        parameter.grad = None
    try:
        sync.wait()
    except RuntimeError as error:
        assert "GradientSync.zero_grad()" in str(error)
    else:
        raise AssertionError("a gradient outside its bucket went unnoticed")
