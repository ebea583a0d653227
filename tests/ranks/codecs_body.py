"""Every codec over hundreds of steps, on real ranks."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch
from checks import check
from torch import Tensor, nn

from hvdlm.comm.communicator import Communicator
from hvdlm.config import CommSection, CompressionSection
from hvdlm.gradients.channel import open_channels
from hvdlm.gradients.codecs.registry import CODECS, codec_factory
from hvdlm.gradients.sync import GradientSync
from hvdlm.strategies.sharded.partition import Partition

STEPS = 200
SIGN = f"{Path(__file__).parents[2] / 'examples' / 'custom_codec' / 'sign.py'}:Sign"


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(96, 80), nn.LayerNorm(80), nn.Linear(80, 70, bias=False))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def make_sync(model: nn.Module, comm: Communicator, algorithm: str, codec: str, **settings: object) -> GradientSync:
    sizes = CommSection(bucket_mb=30_000 / 2**20, algorithm=algorithm)  # two buckets
    return GradientSync(model, comm, sizes, CompressionSection(codec=codec, **settings))


@check(codec=[*CODECS, SIGN])
def check_replicas_stay_identical_and_nothing_is_lost(comm: Communicator, algorithm: str, codec: str) -> None:
    """The parameters are the sums of all that was delivered: with the residuals, of all gradients that were made."""
    model = make_model()
    sync = make_sync(model, comm, algorithm, codec)
    assert len(sync.buckets) == 2
    made = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in model.parameters()]
    generators = [torch.Generator().manual_seed(rank) for rank in range(comm.size)]
    sent = 0
    for _ in range(STEPS):
        sync.zero_grad()
        for parameter, total in zip(model.parameters(), made, strict=True):
            everyone = [torch.randn(parameter.shape, generator=generator) for generator in generators]
            parameter.grad = everyone[comm.rank]
            total += sum(each.double() for each in everyone)
        sync.wait()
        sent += sync.traffic.wire_bytes
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad)
    residuals = sync.codec_state()
    for (name, parameter), total in zip(model.named_parameters(), made, strict=True):
        values = parameter.detach()
        assert all(torch.equal(values, other) for other in comm.all_gather(values)), name
        residual = residuals.get(f"residual.{name}", torch.zeros_like(values))
        together = values.double() + comm.all_gather(residual).double().sum(0)
        assert (together - total).abs().max() <= 1e-3, name
    if comm.size == 2:
        # of two matrices and 240 numbers that are no matrix; dense by a ring: each number goes once
        dense = STEPS * 4 * (96 * 80 + 240 + 80 * 70)
        # topk: 3 of 4 bytes for each hundredth number; powersgd: 4 vectors a side; both: 240 numbers as they are
        # int8, int4, int2: a byte, a half, a quarter, and 4 bytes for 256; beside them 240 numbers as they are
        # topk2: an index and a quarter of a byte for each hundredth number, and 4 bytes for 256 of these
        shares = {"none": 1.0, "topk": 0.0075 + 0.018, "powersgd": 0.097 + 0.018, "topk2": 0.0032 + 0.018}
        shares |= {f"int{bits}": (bits / 32 + 1 / 256) * 0.982 + 0.018 for bits in (8, 4, 2)}
        shares |= {"fp16": 0.5, "bf16": 0.5}  # whatever the engine can sum
        share = shares.get(codec, 1 / 32)  # one bit a number
        assert 0.98 * share <= sent / dense <= 1.05 * share, sent / dense


# Numbers that each codec sends as they are, whatever else is in their block
EXACT = {
    "none": (-1e6, 1.0, 1e6),
    **dict.fromkeys(("fp16", "bf16"), (-3.0, 0.0, 64.0)),
    "int8": (-127.0, 0.0, 127.0),
    "int4": (-7.0, 0.0, 7.0),
    "int2": (-2.0, 2.0),
}


def make_partition(comm: Communicator) -> Partition:
    """Of two matrices and two small tensors, none of whose ends is that of a part."""
    shapes = {"a": (80, 97), "b": (80,), "c": (71, 80), "d": (3, 7)}
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    return Partition(parameters, torch.device("cpu"), torch.float32, comm.rank, comm.size, is_kept=True)


def reduced_to_owners(comm: Communicator, algorithm: str, codec: str, steps: int, **settings: object) -> list[Tensor]:
    """The parts that ranks own, joined: what all were delivered, what they had, and what they have kept, in float64."""
    partition, compression = make_partition(comm), CompressionSection(codec=codec, **settings)
    used = sum(parameter.numel() for parameter in partition.parameters)
    (channel,) = open_channels(comm, torch.device("cpu"), CommSection(algorithm=algorithm), compression, used)
    codec_of_it = codec_factory(codec)(partition, compression)
    delivered, had = torch.zeros(2, len(partition.buffer), dtype=torch.float64)
    for step in range(steps):
        numbers = torch.Generator().manual_seed(10 * step + comm.rank)
        partition.buffer.zero_()
        if steps == 1:
            levels = torch.tensor(EXACT[codec])
            partition.buffer[:used] = levels[torch.randint(len(levels), (used,), generator=numbers)]
        else:
            partition.buffer[:used].normal_(generator=numbers)
        had += partition.buffer.double()
        codec_of_it.reduce_to_owners_(partition.buffer, channel.exchange, step)
        delivered[partition.part] += partition.own_slot.double()
    kept = torch.zeros_like(delivered)
    for values in codec_of_it.state().values():
        kept += values.double()
    channel.close()
    own = torch.stack([delivered, had, kept])
    return list(comm.all_gather(own.view(torch.int64)).view(torch.float64).sum(0))  # as numbers that all engines send


@check(codec=list(EXACT))
def check_owners_have_the_sums(comm: Communicator, algorithm: str, codec: str) -> None:
    """Of numbers that the codec does not round: exactly, and nothing is left."""
    delivered, had, kept = reduced_to_owners(comm, algorithm, codec, 1)
    assert had.abs().sum() > 0
    assert torch.equal(delivered, had)
    assert not kept.any()


@check(codec=[name for name in EXACT if name != "none"])
def check_owners_lose_nothing(comm: Communicator, algorithm: str, codec: str) -> None:
    """What was delivered in all steps, with what is kept, is all that there was; without error feedback it is not."""
    delivered, had, kept = reduced_to_owners(comm, algorithm, codec, 10)
    assert kept.abs().max() > 1e-4
    assert (delivered + kept - had).abs().max() <= 1e-4, (delivered + kept - had).abs().max()
    rounded, had, kept = reduced_to_owners(comm, algorithm, codec, 10, error_feedback=False)
    assert not kept.any() and (rounded - had).abs().max() > 1e-3


def distance_after(comm: Communicator, algorithm: str, codec: str, error_feedback: bool) -> float:
    """To the optimum of a convex problem, from 1 at its beginning.

    Each rank's loss is |W - optimum - noise|^2 / 2, whose noise changes its sign from step to step: it is small in
    number and rank, but ten times as large as what is to be learned, so that it is what a codec finds.
    """
    generator = torch.Generator().manual_seed(7)
    optimum = torch.randn(80, 96, generator=generator)
    noise = torch.zeros(80, 96)
    noise[:, ::20] = 10.0
    model = nn.Linear(96, 80, bias=False)
    nn.init.zeros_(model.weight)
    sync = make_sync(model, comm, algorithm, codec, error_feedback=error_feedback, density=0.05)
    for step in range(STEPS):
        sync.zero_grad()
        model.weight.grad = model.weight.detach() - optimum - (-1) ** step * noise
        sync.wait()
        with torch.no_grad():
            model.weight.sub_(model.weight.grad, alpha=0.05 / comm.size)
    return float((model.weight.detach() - optimum).norm() / optimum.norm())


@check(codec=["topk", "topk2", "powersgd"])
def check_what_error_feedback_is_for(comm: Communicator, algorithm: str, codec: str) -> None:
    assert distance_after(comm, algorithm, codec, error_feedback=True) < 0.3
    assert distance_after(comm, algorithm, codec, error_feedback=False) > 0.5


@check(sizes=[2, 4], needs="split")
def check_who_gets_the_residuals_of_a_checkpoint(comm: Communicator, algorithm: str) -> None:
    """With hierarchical sums the leader of each node, whoever had them before; within one node all, until sent."""
    with patch("socket.gethostname", lambda: f"n{comm.rank // 2}"):
        sync = make_sync(make_model(), comm, algorithm, "topk", hierarchical=True)
    residuals = sync.codec_state()
    assert len(residuals) == 5  # of all parameters
    for values in residuals.values():
        values.fill_(comm.rank + 1)
    sync.restore_residuals_(2.0)
    if comm.size > 2:
        own = 2 * (comm.rank + 1 + comm.rank + 2) if comm.rank % 2 == 0 else 0
        assert all(torch.equal(values, torch.full_like(values, own)) for values in residuals.values())
        return
    sync.zero_grad()
    sync.wait()
    assert all((bucket.buffer == 2 + 4).all() for bucket in sync.buckets)
    assert not any(values.any() for values in sync.codec_state().values())


def check_nothing_is_lost_while_auto_measures(comm: Communicator, algorithm: str) -> None:
    """Codec auto tries codecs in buckets of different sizes: the residual of one is the next one's to deliver."""

    def bucket_bytes(_: CommSection, settings: CompressionSection, *__: object) -> int:
        return 10**6 if settings.codec in ("topk", "powersgd") else 30_000  # one bucket, or two

    with (
        patch("hvdlm.gradients.codecs.registry.bucket_bytes", bucket_bytes),
        patch("hvdlm.gradients.sync.bucket_bytes", bucket_bytes),
        patch("hvdlm.gradients.auto.tuner._FORECAST_ERROR", 1e9),
    ):
        model = make_model()
        sync = make_sync(model, comm, algorithm, "auto", candidates="none,topk,powersgd")
        made = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in model.parameters()]
        generators = [torch.Generator().manual_seed(rank) for rank in range(comm.size)]
        plans = set()
        for _ in range(40):
            sync.zero_grad()
            sync.set_last_micro_batch()
            for parameter, total in zip(model.parameters(), made, strict=True):
                everyone = [torch.randn(parameter.shape, generator=generator) for generator in generators]
                (parameter * everyone[comm.rank]).sum().backward()
                total += sum(each.double() for each in everyone)
            sync.wait()
            plans.add((len(sync.buckets), *sorted({codec.name for codec in sync.codecs})))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(parameter.grad)
    assert {(2, "none"), (1, "topk"), (1, "powersgd")} <= plans
    residuals = sync.codec_state()
    for (name, parameter), total in zip(model.named_parameters(), made, strict=True):
        values = parameter.detach()
        assert all(torch.equal(values, other) for other in comm.all_gather(values)), name
        together = values.double() + comm.all_gather(residuals[f"residual.{name}"]).double().sum(0)
        assert (together - total).abs().max() <= 1e-3, name
