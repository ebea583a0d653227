"""What ranks on GPUs must do: operations on tensors that lie there, and every codec on the communication stream."""

from __future__ import annotations

import torch
from codecs_body import make_model
from communicator_body import DTYPES, same, values

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.replicas import broadcast_tensors, check_replicas
from hvdlm.config import CommSection, CompressionSection
from hvdlm.gradients.sync import GradientSync
from hvdlm.training.hardware import choose_device

STEPS = 20


def check_operations(comm: Communicator) -> None:
    """Results lie on the GPU and are those of integers that add exactly, whatever the engine does to get them there."""
    device = choose_device("cuda", comm)
    everyone = range(comm.size)

    def of(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return values(rank, shape, dtype).to(device)

    for dtype in DTYPES:
        for shape in ((), (7,), (5, 3), (70_000,), (0,)):
            stacked = torch.stack([values(rank, shape, torch.int64) for rank in everyone]).to(device)
            own = of(comm.rank, shape, dtype)
            same(comm.all_reduce_(own.clone()), stacked.sum(0).to(dtype))
            same(comm.all_reduce_(own.clone(), ReduceOp.MAX), stacked.amax(0).to(dtype))
            same(comm.broadcast_(own.clone(), comm.size - 1), of(comm.size - 1, shape, dtype))
            same(comm.all_gather(own), stacked.to(dtype))
            assert comm.reduce_scatter(own).device == device
        lengths = [3 * rank + 1 for rank in everyone]
        for rank, part in enumerate(comm.all_gather_v(of(comm.rank, (lengths[comm.rank], 2), dtype))):
            same(part, of(rank, (lengths[rank], 2), dtype))
        parts = [of(comm.rank, (2 * comm.rank + target, 3), dtype) for target in everyone]
        for source, part in enumerate(comm.all_to_all(parts)):
            same(part, of(source, (2 * source + comm.rank, 3), dtype))


def check_start_and_replicas(comm: Communicator) -> None:
    """Parameters of rank 0 arrive in pieces; pinned memory is not held for all of them at once."""
    device = choose_device("cuda", comm)
    tensors = {str(n): torch.full((12 * 2**20,), float(comm.rank + n), device=device) for n in range(3)}  # 48 MiB each
    broadcast_tensors(comm, tensors.values())
    assert all(bool((tensor == int(name)).all()) for name, tensor in tensors.items())
    check_replicas(comm, tensors, step=0)


def check_codec(comm: Communicator, codec: str) -> None:
    """Replicas stay equal bit for bit; what was delivered and what is left are all gradients that were made."""
    device = choose_device("cuda", comm)
    model = make_model().to(device)
    settings = CommSection(bucket_mb=30_000 / 2**20)
    sync = GradientSync(model, comm, settings, CompressionSection(codec=codec, candidates="none,fp16,int4"))
    generators = [torch.Generator(device).manual_seed(rank) for rank in range(comm.size)]
    made = [torch.zeros(parameter.shape, dtype=torch.float64, device=device) for parameter in model.parameters()]
    for _ in range(STEPS):
        sync.zero_grad()
        sync.set_last_micro_batch()
        for parameter, total in zip(model.parameters(), made, strict=True):
            everyone = [torch.randn(parameter.shape, generator=each, device=device) for each in generators]
            (parameter * everyone[comm.rank]).sum().backward()
            total += sum(each.double() for each in everyone)
        sync.wait()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad)
    sync.synchronize()
    residuals = sync.codec_state()
    for (name, parameter), total in zip(model.named_parameters(), made, strict=True):
        own = parameter.detach()
        assert all(torch.equal(own, other) for other in comm.all_gather(own)), name
        residual = comm.all_gather(residuals.get(f"residual.{name}", torch.zeros_like(own))).double().sum(0)
        assert (own.double() + residual - total).abs().max() <= 1e-3, name
    sync.close()


def check_backward_pass_beside_sums(comm: Communicator) -> None:
    """A backward pass goes on making gradients while earlier buckets are sent: sums against those of a CPU."""
    device = choose_device("cuda", comm)
    width, batch = 512, 64
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(comm.size, batch, width, generator=generator)
    weights = [torch.randn(width, width, generator=generator) / width**0.5 for _ in range(12)]

    def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(model(x)).square().mean()

    def make() -> torch.nn.Module:
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in weights))
        with torch.no_grad():
            for layer, weight in zip(model, weights, strict=True):
                layer.weight.copy_(weight)
        return model

    exact = make().double()
    sum(loss_of(exact, inputs[rank].double()) for rank in range(comm.size)).backward()
    for codec in ("none", "fp16"):
        model = make().to(device)
        sync = GradientSync(model, comm, CommSection(bucket_mb=1.0), CompressionSection(codec=codec))
        sync.zero_grad()
        sync.set_last_micro_batch()
        loss_of(model, inputs[comm.rank].to(device)).backward()
        sync.wait()
        for own, expected in zip(model.parameters(), exact.parameters(), strict=True):
            error = (own.grad.cpu().double() - expected.grad).norm() / expected.grad.norm()
            assert error < (1e-4 if codec == "none" else 3e-3), error
        sync.close()
