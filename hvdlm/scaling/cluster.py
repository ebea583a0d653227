"""Where a forecast without measurements runs: what a rank computes, and what its links carry."""

from __future__ import annotations

from dataclasses import dataclass

# Of a link's rate, as large messages of NCCL attain it, and seconds of a hop: assumptions, which published runs check
# (published_runs.py).
LINK_SHARE = 0.8
INSIDE_LATENCY = 3e-6
BETWEEN_LATENCY = 10e-6


@dataclass(frozen=True)
class Link:
    """What carries messages."""

    bytes_per_second: float  # each way
    latency: float  # seconds of a hop


@dataclass(frozen=True)
class Cluster:
    """Equal hosts, joined by a network."""

    flops: float  # that a rank attains while it computes
    memory_bandwidth: float  # bytes/s of a rank's memory; infinite where `flops` includes the optimizer's step
    ranks_per_host: int
    inside: Link  # of each rank, to the others of its host
    between: Link  # of each host

    def ring(self, nbytes: float, ranks: int, stride: int) -> float:
        """Seconds in which each of `ranks` ranks, `stride` apart, sends so many bytes round a ring.

        An all-gather or reduce-scatter of b bytes sends b (n - 1) / n, an all-reduce twice that (Patarasuk & Yuan,
        JPDC 2009, section 3). Each of the other groups of this kind does so at the same time. A ring crosses every
        host's link once, whatever the number of its ranks there, and those rings that cross it share it.
        """
        if ranks == 1:
            return 0.0
        per_host = self._per_host(ranks, stride)
        seconds, hops = nbytes / self.inside.bytes_per_second if per_host > 1 else 0.0, ranks - 1
        if per_host == ranks:
            return seconds + hops * self.inside.latency
        rings = self.ranks_per_host / per_host
        seconds = max(seconds, nbytes * rings / self.between.bytes_per_second)
        return seconds + hops * (self.between.latency + (per_host - 1) * self.inside.latency) / per_host

    def message(self, nbytes: float, stride: int) -> float:
        """Seconds in which every rank sends so many bytes to the one `stride` ranks on."""
        if stride < self.ranks_per_host:
            return nbytes / self.inside.bytes_per_second + self.inside.latency
        return nbytes * self.ranks_per_host / self.between.bytes_per_second + self.between.latency

    def _per_host(self, ranks: int, stride: int) -> int:
        """How many of a group's ranks are on one host."""
        return max(1, min(ranks, self.ranks_per_host // stride))
