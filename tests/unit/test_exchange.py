"""What an exchange counts: bytes of two threads, and encoding apart from sending; and which ranks time the ring."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import CommSection, CompressionSection
from hvdlm.gradients import channel, exchange
from hvdlm.gradients.channel import Channel, open_channels
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.exchange import Exchange


class TwoRanks(SoloCommunicator):
    """A rank of two whose messages reach nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.node_count = 2, 2
        self.capabilities = frozenset({"send", "split"})

    def split(self, color: int, key: int) -> TwoRanks:
        return self


class Clock:
    """Goes on only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class RingWithEncoding:
    """Sends for 5 seconds, encodes for 2 and decodes for 1."""

    def all_reduce_(self, values: Tensor, encoding: Any, residual: Tensor | None) -> int:
        clock.now += 5
        if encoding is not None:
            encoding.encode(values, torch.empty(0), residual)
            encoding.decode(torch.empty(0), values)
        return 100


class Encoding:
    def nbytes(self, elements: int) -> int:
        return 2 * elements

    def encode(self, values: Tensor, message: Tensor, residual: Tensor | None) -> None:
        clock.now += 2

    def decode(self, message: Tensor, values: Tensor) -> None:
        clock.now += 1


clock = Clock()


@pytest.fixture(autouse=True)
def made_up_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (exchange, channel):
        monkeypatch.setattr(module, "time", clock)


def test_bytes_that_the_backward_pass_counts_while_the_ring_runs_are_not_lost() -> None:
    class RingBesideTheEngine:
        def all_reduce_(self, values: Tensor, encoding: Any, residual: Tensor | None) -> int:
            own.all_reduce_by_engine_async_(torch.zeros(30))  # by the hook of the next bucket
            return 100

    own = Exchange(TwoRanks(), RingBesideTheEngine(), [])  # type: ignore[arg-type]
    own.all_reduce_(torch.zeros(10))
    assert own.wire_bytes == 100 + 30 * 4  # two ranks send half of a float32 buffer twice


def test_seconds_of_encoding_are_the_codec_s_and_not_those_of_the_exchange() -> None:
    own = Exchange(TwoRanks(), RingWithEncoding(), [])  # type: ignore[arg-type]

    class Cast(Codec):
        def __init__(self) -> None:
            pass

        def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
            clock.now += 0.5
            exchange.all_reduce_(gradients, Encoding())

        def state(self) -> dict[str, Tensor]:
            return {}

    one = Channel(TwoRanks(), None, own, torch.device("cpu"), False)
    one.reduce_(Cast(), torch.zeros(10), 0, "bucket 1")
    assert own.seconds == 5
    assert one.codec_seconds == 0.5 + 2 + 1
    one.reset_counters()
    assert (own.seconds, one.codec_seconds, own.wire_bytes) == (0, 0, 0)
    own.all_reduce_(torch.zeros(10))  # as float32
    assert own.seconds == 5


@pytest.mark.parametrize(("is_leader", "probes"), [(True, 1), (False, 0)])
def test_only_local_leaders_time_the_ring(monkeypatch: pytest.MonkeyPatch, is_leader: bool, probes: int) -> None:
    """The others of a node send nothing between nodes, and would disturb the leaders."""
    timed = []
    monkeypatch.setattr(channel, "Hierarchy", lambda own: SimpleNamespace(leaders=own, is_leader=is_leader))
    monkeypatch.setattr(channel, "probe_algorithms", lambda *_: timed.append(1) or [])
    settings = CompressionSection(codec="fp16", hierarchical=True)
    opened = open_channels(TwoRanks(), torch.device("cpu"), CommSection(), settings, 1000)
    assert (len(opened), len(timed)) == (2, probes)
