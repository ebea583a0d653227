"""Messages between the stages of one step: received early, sent while the rank computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.work import Work
from hvdlm.parallel.pipeline.boundary import Boundary, decode, empty_message, encode
from hvdlm.parallel.pipeline.schedules import Message

_AHEAD = 2  # receives that are posted beyond the one that is waited for, from each rank


class Connections:
    """The ranks of a pipeline, connected in both directions.

    Messages to a higher rank and to a lower one have a communicator each: NCCL has one queue for the messages of two
    ranks, in which a receive that waits would hold up a send. Otherwise a thread waits for sends: MPI moves large
    messages only while some thread is in it.
    """

    def __init__(self, pipeline: Communicator) -> None:
        """Collective."""
        self.rank = pipeline.rank
        self._upward, self._downward = (pipeline.split(0, pipeline.rank) for _ in range(2))
        self._thread = ThreadPoolExecutor(1, "hvdlm-pipeline-sends")

    def send(self, message: Tensor, destination: int) -> Callable[[], None]:
        """Sends a tensor that must not be changed any more. What is returned, returns when it has arrived."""
        direction = self._upward if destination > self.rank else self._downward
        work = direction.send_async(message, destination)
        if direction.supports("cuda"):  # to wait would let the device wait, not the host
            return partial(_finish, work, message)
        return self._thread.submit(_finish, work, message).result

    def receive_(self, message: Tensor, source: int) -> Work[Tensor]:
        """Begins to receive."""
        direction = self._upward if source < self.rank else self._downward
        return direction.receive_async_(message, source)

    def close(self) -> None:
        """Collective."""
        self._thread.shutdown()
        self._downward.close()
        self._upward.close()


class StepMessages:
    """What one rank sends and receives in one step."""

    def __init__(
        self,
        connections: Connections,
        arrivals: Mapping[int, Sequence[Message]],
        shape_of: Callable[[int], tuple[int, int, int]],
        boundary: Boundary,
        device: torch.device,
    ) -> None:
        """`arrivals`: from `schedules.arrivals`. `shape_of`: (b, T, D) of a micro-batch, by its number.

        Posts the first receives.
        """
        self._connections, self._arrivals = connections, arrivals
        self._shape_of, self._boundary, self._device = shape_of, boundary, device
        self._source = {message: source for source, messages in arrivals.items() for message in messages}
        self._posted = dict.fromkeys(arrivals, 0)
        self._receives: dict[Message, Work[Tensor]] = {}
        self._sends: list[Callable[[], None]] = []
        for source in arrivals:
            self._post(source, _AHEAD)

    def send(self, tensor: Tensor, destination: int) -> None:
        """tensor: (b, T, D)."""
        self._sends.append(self._connections.send(encode(tensor.detach(), self._boundary), destination))

    def receive(self, message: Message) -> Tensor:
        """(b, T, D) float32, when it is there. Raises LostRankError if it does not come."""
        source = self._source[message]
        self._post(source, self._arrivals[source].index(message) + 1 + _AHEAD)
        return decode(self._receives.pop(message).wait(), self._boundary)

    def finish(self) -> None:
        """Returns when all that was sent has been received."""
        for send in self._sends:
            send()

    def _post(self, source: int, stop: int) -> None:
        """Receives of one rank are posted in the order in which it sends."""
        for message in self._arrivals[source][self._posted[source] : stop]:
            room = empty_message(self._shape_of(message.micro_batch), self._boundary, self._device)
            self._receives[message] = self._connections.receive_(room, source)
            self._posted[source] += 1


def _finish(work: Work[None], message: Tensor) -> None:
    """`message` is kept until it has been sent."""
    work.wait()
