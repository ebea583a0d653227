"""How long a schedule takes, and how much of it ranks wait: simulated from the seconds of its parts."""

from __future__ import annotations

from dataclasses import dataclass

from hvdlm.parallel.pipeline.schedules import Kind, Message, Operation, Schedule, received_by, sent_by
from hvdlm.timing import Span, total_seconds


@dataclass(frozen=True)
class PassSeconds:
    """Of one micro-batch over one stage; the same for all stages."""

    forward: float
    input_gradient: float
    weight_gradient: float
    message: float = 0.0  # from the end of an operation until another rank has what it sends

    def of(self, kind: Kind) -> float:
        """Seconds of an operation."""
        if kind is Kind.BACKWARD:
            return self.input_gradient + self.weight_gradient
        return {
            Kind.FORWARD: self.forward,
            Kind.INPUT_GRADIENT: self.input_gradient,
            Kind.WEIGHT_GRADIENT: self.weight_gradient,
        }[kind]


@dataclass(frozen=True)
class Simulation:
    """What each rank does when."""

    spans: list[list[Span]]  # by rank

    @property
    def seconds(self) -> float:
        """From the first operation to the end of the last one."""
        return max((span.end for own in self.spans for span in own), default=0.0)

    @property
    def bubble(self) -> float:
        """The share of the time of all ranks in which they wait."""
        busy = sum(total_seconds(own) for own in self.spans)
        return 1 - busy / (len(self.spans) * self.seconds) if self.seconds else 0.0


def simulate(schedule: Schedule, seconds: PassSeconds, chunks: int = 1) -> Simulation:
    """Runs a schedule in which sending takes no time of a rank.

    Raises ValueError if all ranks that are not at their end wait for each other.
    """
    ranks = len(schedule)
    arrived: dict[Message, float] = {}
    spans: list[list[Span]] = [[] for _ in range(ranks)]
    has_advanced = True
    while has_advanced:
        has_advanced = False
        for rank, operations in enumerate(schedule):
            for operation in operations[len(spans[rank]) :]:
                needed = received_by(operation, rank, ranks, chunks)
                if needed is not None and needed not in arrived:
                    break
                free = spans[rank][-1].end if spans[rank] else 0.0
                begin = max(free, arrived[needed]) if needed is not None else free
                end = begin + seconds.of(operation.kind)
                spans[rank].append(Span(_name(operation), begin, end))
                sent = sent_by(operation, rank, ranks, chunks)
                if sent is not None:
                    arrived[sent] = end + seconds.message
                has_advanced = True
    for rank, operations in enumerate(schedule):
        if len(spans[rank]) < len(operations):
            raise ValueError(f"rank {rank} waits for ever before {_name(operations[len(spans[rank])])}")
    return Simulation(spans)


def most_in_flight(schedule: Schedule) -> list[int]:
    """By rank, of how many passes at most it holds activations at once: those that a forward pass leaves behind are
    needed until the last gradient of that micro-batch and chunk has been made.
    """
    most = []
    for operations in schedule:
        counts = [0]
        for operation in operations:
            change = {Kind.FORWARD: 1, Kind.INPUT_GRADIENT: 0}.get(operation.kind, -1)
            counts.append(counts[-1] + change)
        most.append(max(counts))
    return most


def _name(operation: Operation) -> str:
    return f"{operation.kind.value} of micro-batch {operation.micro_batch} on chunk {operation.chunk}"
