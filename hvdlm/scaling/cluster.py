"""Where a forecast without measurements runs: what a rank computes, and what its links carry."""

from __future__ import annotations

from dataclasses import dataclass

# Of a link's rate, as large messages of NCCL attain it, and seconds of a hop: assumptions, which published runs check
# (published_runs.py).
LINK_SHARE = 0.8
INSIDE_LATENCY = 3e-6
BETWEEN_LATENCY = 10e-6

# The same of TCP over Ethernet, by which ranks on CPUs exchange: of 1,538 bytes on the wire, with headers, preamble and
# gap, 1,448 are a message's
TCP_SHARE = 1448 / 1538

# Of a core, for a byte that is sent over TCP, received by another rank and added: as `hvdlm fit` has it of codec none
# in benchmarks/results/scaling/fabric-weak
TCP_CORE_SECONDS = 1.15e-9

# The same within a host, where gradients are copied to and from buckets: as the steps of layouts.py take it of data
# parallelism (benchmarks/results/layouts.md), which has nothing else to exchange
SHARED_MEMORY_CORE_SECONDS = 0.6e-9


@dataclass(frozen=True)
class Link:
    """What carries messages."""

    bytes_per_second: float  # each way
    latency: float  # seconds of a hop


@dataclass(frozen=True)
class Cluster:
    """Equal hosts, joined by a network."""

    flops: float  # FLOP/s of a rank's matrix products
    memory_bandwidth: float  # bytes/s of a rank's memory, for all between the products; infinite: `flops` includes that
    optimizer_seconds: float  # of an optimizer's step, for a parameter
    ranks_per_host: int
    inside: Link  # of each rank, to the others of its host
    between: Link  # of each host
    device: str = "cuda"  # or "cpu": what ranks compute on
    core_seconds_per_byte: float = 0.0  # sent to another host, of the cores that compute; none of a GPU's
    burst: float = 0.0  # bytes that a link between hosts carries at once when it was idle: of an emulated one

    def gather(self, nbytes: float, ranks: int, stride: int, messages: int = 1) -> float:
        """Seconds of an all-gather or a reduce-scatter of so many bytes among `ranks` ranks, `stride` apart, in so many
        messages; an all-reduce takes twice as long.

        On a ring each rank sends b (n - 1) / n bytes in n - 1 hops (Patarasuk & Yuan, JPDC 2009, section 3). A ring
        crosses every host's link once, whatever the number of its ranks there; all other groups of this kind exchange
        theirs at the same time, and share that link.
        """
        if ranks == 1:
            return 0.0
        per_host = self._ranks_of_host(ranks, stride)
        sent, hops = nbytes * (ranks - 1) / ranks, messages * (ranks - 1)
        seconds = sent / self.inside.bytes_per_second if per_host > 1 else 0.0
        if per_host == ranks:
            return seconds + hops * self.inside.latency
        rings = self.ranks_per_host / per_host
        seconds = max(seconds, sent * rings / self.between.bytes_per_second)
        return seconds + hops * (self.between.latency + (per_host - 1) * self.inside.latency) / per_host

    def gather_core_seconds(self, nbytes: float, ranks: int, stride: int) -> float:
        """For which the messages of a `gather` keep a rank from computing: on a CPU it is the cores that move them."""
        if ranks == 1 or self.device != "cpu":
            return 0.0
        sent = nbytes * (ranks - 1) / ranks
        if self._ranks_of_host(ranks, stride) == ranks:
            return sent * max(SHARED_MEMORY_CORE_SECONDS, 1 / self.inside.bytes_per_second)
        return sent * self.core_seconds_per_byte

    def reduction(self, nbytes: float, ranks: int, stride: int) -> float:
        """Seconds of an all-reduce of so many bytes that finds the link idle."""
        seconds = 2 * self.gather(nbytes, ranks, stride)
        if ranks == 1 or self._ranks_of_host(ranks, stride) == ranks:
            return seconds
        return seconds - min(self.burst, 2 * nbytes * (ranks - 1) / ranks) / self.between.bytes_per_second

    def _ranks_of_host(self, ranks: int, stride: int) -> int:
        """How many of `ranks` ranks, `stride` apart, one host has."""
        return max(1, min(ranks, self.ranks_per_host // stride))

    def message(self, nbytes: float, stride: int) -> float:
        """Seconds in which every rank sends so many bytes to the one `stride` ranks on, and finds the link idle."""
        if stride < self.ranks_per_host:
            return nbytes / self.inside.bytes_per_second + self.inside.latency
        of_host = nbytes * self.ranks_per_host
        return (of_host - min(self.burst, of_host)) / self.between.bytes_per_second + self.between.latency
