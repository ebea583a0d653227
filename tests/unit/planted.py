"""Made-up points of a scaling study, with step times that are computed from a few known numbers."""

from __future__ import annotations

from hvdlm.config_reader import from_dict
from hvdlm.model.presets import PRESETS
from hvdlm.scaling.point import Bucket, Machine, Place, Point, Repetition

ELEMENTS = 1_000_000
_PARAMETERS = 52  # of preset tiny: two embeddings, 4 blocks of 12, two of the last norm; all but one are empty here
LATENCY, EFFICIENCY = 4e-4, 0.8


def make_point(ranks: int, link: float, codec: str = "none", seconds: float | None = None) -> Point:
    """One bucket, ready when the backward pass ends, so that the length of a step follows by hand."""
    sent = 2 * (ranks - 1) / ranks * (4 if codec == "none" else 2) * ELEMENTS
    hops = 2 * (ranks - 1)
    # A chunk is what a rank sends per hop, in segments of 64 Ki numbers; the latency of the last segment is exposed
    chunk = sent / max(1, hops)
    segment = min(chunk, 2**18 if codec == "none" else 2**17 + 4)
    latency = hops * LATENCY * segment / chunk if hops else 0.0
    travel = 8 * (sent + segment) / (EFFICIENCY * link) + latency
    whole = seconds or 0.01 + 0.1 + 0.2 + 0.03 + (travel if ranks > 1 else 0.0)
    phases = {"data": 0.01, "forward": 0.1, "backward": 0.2, "wait": whole - 0.34, "optimizer": 0.03}
    repetition = Repetition(
        step_seconds=[[whole, whole]] * ranks,
        seconds=whole,
        phase_seconds=[phases] * ranks,
        codec_seconds=0.0,
        exchange_seconds=travel,
        core_seconds=0.0,
        wire_bytes=sent,
        start_seconds=3.0 + ranks,
        parameter_hashes=["a"] * ranks,
    )
    config = from_dict({"train": {"global_batch_size": 4 * ranks}, "compression": {"codec": codec}}, "test", PRESETS)
    return Point(
        study="planted",
        mode="weak",
        date="2026-11-21",
        revision="0",
        versions={"torch": "2", "mpi": "5"},
        machine=Machine(cpu="a", cores=64, memory=1, gpu=None, kernel="6", machines=ranks),
        place=Place(
            kind="hostfile",
            ranks=ranks,
            hosts=[f"h{rank}" for rank in range(ranks)],
            ranks_per_host=1,
            link_bits_per_second=link if ranks > 1 else None,
            interface="eth0",
            launcher="mpirun",
            environment={},
        ),
        engine="mpi",
        algorithm="ring",
        channels=1,
        codec=codec,
        settings=config.model_dump(),
        seed=0,
        vocab_size=257,
        tokens_per_step=4 * ranks * config.model.context_length,
        simulated_tokens_per_second=1000.0,
        buckets=[Bucket(shapes=[[1000, 1000], *[[0]] * (_PARAMETERS - 1)], codec=codec)],
        repetitions=[repetition] * 3,
    )
