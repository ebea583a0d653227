"""Every codec over hundreds of steps, on real ranks; on each: `codecs_body.py ENGINE ALGORITHM`."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import torch
from checks import run_checks
from hvdlm.gradients.codecs.choice import CODECS
from torch import nn

from hvdlm.comm.communicator import Communicator
from hvdlm.config import CommSection, CompressionSection
from hvdlm.gradients.sync import GradientSync

ALGORITHM = sys.argv[2]
STEPS = 200
SIGN = f"{Path(__file__).parents[2] / 'examples' / 'custom_codec' / 'sign.py'}:Sign"


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(96, 80), nn.LayerNorm(80), nn.Linear(80, 70, bias=False))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def make_sync(model: nn.Module, comm: Communicator, codec: str, **settings: object) -> GradientSync:
    sizes = CommSection(bucket_mb=30_000 / 2**20, algorithm=ALGORITHM)  # two buckets
    return GradientSync(model, comm, sizes, CompressionSection(codec=codec, **settings))


def check_replicas_stay_identical_and_nothing_is_lost(comm: Communicator) -> None:
    """The parameters are the sums of all that was delivered: with what is owed, of all gradients that were made."""
    for codec in [*CODECS, SIGN]:
        model = make_model()
        sync = make_sync(model, comm, codec)
        assert len(sync.buckets) == 2
        made = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in model.parameters()]
        generators = [torch.Generator().manual_seed(rank) for rank in range(comm.size)]
        sent = 0
        for _ in range(STEPS):
            sync.begin()
            for parameter, total in zip(model.parameters(), made, strict=True):
                everyone = [torch.randn(parameter.shape, generator=generator) for generator in generators]
                parameter.grad = everyone[comm.rank]
                total += sum(each.double() for each in everyone)
            sync.wait()
            sent += sync.traffic.wire_bytes
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(parameter.grad)
        owed = sync.codec_state()
        for (name, parameter), total in zip(model.named_parameters(), made, strict=True):
            values = parameter.detach()
            assert all(torch.equal(values, other) for other in comm.all_gather(values)), (codec, name)
            residual = owed.get(f"residual.{name}", torch.zeros_like(values))
            together = values.double() + comm.all_gather(residual).double().sum(0)
            # an engine sums fp16 numbers as such, and what that rounds is owed by nobody
            if ALGORITHM == "ring" or codec not in ("fp16", "bf16"):
                assert (together - total).abs().max() <= 1e-3, (codec, name)
        if comm.size == 2:
            # of two matrices and 240 numbers that are no matrix; dense by a ring: each number goes once
            dense = STEPS * 4 * (96 * 80 + 240 + 80 * 70)
            # topk: 3 of 4 bytes for each hundredth number; powersgd: 4 vectors a side; both: 240 numbers as they are
            # int8, int4: a byte, a half, and a scale for 256; beside them 240 numbers as they are
            shares = {"none": 1.0, "topk": 0.0075 + 0.018, "powersgd": 0.097 + 0.018}
            shares |= {"int8": (1 / 4 + 1 / 256) * 0.982 + 0.018, "int4": (1 / 8 + 1 / 256) * 0.982 + 0.018}
            for half, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):  # which not every engine can sum
                shares[half] = 0.5 if ALGORITHM == "ring" or comm.supports(dtype) else 1.0
            share = shares.get(codec, 1 / 32)  # one bit a number
            assert 0.98 * share <= sent / dense <= 1.05 * share, (codec, sent / dense)


def distance_after(comm: Communicator, codec: str, error_feedback: bool) -> float:
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
    sync = make_sync(model, comm, codec, error_feedback=error_feedback, density=0.05)
    for step in range(STEPS):
        sync.begin()
        model.weight.grad = model.weight.detach() - optimum - (-1) ** step * noise
        sync.wait()
        with torch.no_grad():
            model.weight.sub_(model.weight.grad, alpha=0.05 / comm.size)
    return float((model.weight.detach() - optimum).norm() / optimum.norm())


def check_what_error_feedback_is_for(comm: Communicator) -> None:
    for codec in ("topk", "powersgd"):
        assert distance_after(comm, codec, error_feedback=True) < 0.3, codec
        assert distance_after(comm, codec, error_feedback=False) > 0.5, codec


def check_who_owes_what_a_checkpoint_held(comm: Communicator) -> None:
    """By node, it is the rank that speaks for a node, whoever owed it before; within one node all, until it is sent."""
    if not comm.supports("split"):
        return
    with patch("socket.gethostname", lambda: f"n{comm.rank // 2}"):
        sync = make_sync(make_model(), comm, "topk", by_node=True)
    owed = sync.codec_state()
    assert len(owed) == 5  # of all parameters
    for values in owed.values():
        values.fill_(comm.rank + 1)
    sync.adopt_owed_(2.0)
    if comm.size > 2:
        own = 2 * (comm.rank + 1 + comm.rank + 2) if comm.rank % 2 == 0 else 0
        assert all(torch.equal(values, torch.full_like(values, own)) for values in owed.values())
        return
    sync.begin()
    sync.wait()
    assert all((bucket.buffer == 2 + 4).all() for bucket in sync.buckets)
    assert not any(values.any() for values in sync.codec_state().values())


def check_nothing_is_lost_in_a_race(comm: Communicator) -> None:
    """Codec auto lets codecs race in buckets of different sizes: what one owes the next one delivers, or owes too."""

    def bucket_bytes(_: CommSection, settings: CompressionSection, __: int) -> int:
        return 10**6 if settings.codec in ("topk", "powersgd") else 30_000  # one bucket, or two

    with patch("hvdlm.gradients.sync.bucket_bytes", bucket_bytes), patch("hvdlm.gradients.chooser._DOUBT", 1e9):
        model = make_model()
        sync = make_sync(model, comm, "auto", candidates="none,topk,powersgd")
        made = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in model.parameters()]
        generators = [torch.Generator().manual_seed(rank) for rank in range(comm.size)]
        plans = set()
        for _ in range(40):
            sync.begin()
            sync.last_micro_batch()
            for parameter, total in zip(model.parameters(), made, strict=True):
                everyone = [torch.randn(parameter.shape, generator=generator) for generator in generators]
                (parameter * everyone[comm.rank]).sum().backward()
                total += sum(each.double() for each in everyone)
            sync.wait()
            plans.add((len(sync.buckets), *sorted({codec.name for codec in sync.codecs})))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(parameter.grad)
    if comm.size > 1:
        assert {(2, "none"), (1, "topk"), (1, "powersgd")} <= plans
    owed = sync.codec_state()
    for (name, parameter), total in zip(model.named_parameters(), made, strict=True):
        values = parameter.detach()
        assert all(torch.equal(values, other) for other in comm.all_gather(values)), name
        together = values.double() + comm.all_gather(owed[f"residual.{name}"]).double().sum(0)
        assert (together - total).abs().max() <= 1e-3, name


if __name__ == "__main__":
    run_checks(sys.argv[1], globals())
