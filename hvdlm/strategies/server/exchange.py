"""What a worker exchanges with servers, where ranks that own parts of a model exchange it with one another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.exchange import Exchange
from hvdlm.strategies.server.group import Kind, ServerGroup, ServerLetters
from hvdlm.strategies.server.parts import ServedBucket


class ServerExchange(Exchange):
    """Owners of parts are servers; this rank owns nothing, as if it were the one after the last of them."""

    def __init__(
        self, workers: Communicator, group: ServerGroup, letters: ServerLetters, buckets: Sequence[ServedBucket]
    ) -> None:
        super().__init__(workers, None, ())
        self.rank = self.size = group.servers
        self._group, self._letters, self._buckets = group, letters, buckets
        self.task: int | None = None  # of which all that is pushed is; None: of a step
        self._numbers = {each.partition.weights.data_ptr(): number for number, each in enumerate(buckets)}

    def push(self, bucket: int, messages: Sequence[Tensor], step: int) -> None:
        """Sends each server its message about the gradients of a bucket, (n,) uint8."""
        with self.counted("push"):
            for server, message in zip(self._group.server_ranks, messages, strict=True):
                about = step if self.task is None else self.task
                self._group.mailbox.post([server], (Kind.PUSH, bucket, about, step), message)
                self.count(len(message))
            self._group.mailbox.flush()

    def all_gather_(self, values: Tensor) -> None:
        """Fills the weights of a bucket by what each server has sent of them; the model then computes with them."""
        number = self._numbers[values.data_ptr()]
        bucket = self._buckets[number]
        with self.counted("pull"):
            for server, part in enumerate(values.split(len(values) // self.size)):
                part.copy_(self._letters.expect(server, Kind.WEIGHTS, number=number).data.view(bucket.pulled_as))
        for layer in bucket.layers:
            layer.update_low_precision_weights()


class PushedCodec(Codec):
    """Sends the gradients of a bucket to servers, as another codec encodes them, which keeps what it has not sent."""

    def __init__(self, number: int, codec: Codec) -> None:
        super().__init__(codec.bucket, codec.settings)
        self._number, self._codec = number, codec

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        raise NotImplementedError("no worker gets the sum of all gradients")

    def reduce_to_owners_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        assert isinstance(exchange, ServerExchange)
        exchange.push(self._number, self._codec.messages_to_owners(gradients, exchange.size, step), step)

    def can_take_back(self, gradients: Tensor) -> bool:
        return self._codec.can_take_back(gradients)

    def take_back_(self, gradients: Tensor, rank: int) -> None:
        self._codec.take_back_(gradients, rank)

    def state(self) -> dict[str, Tensor]:
        return self._codec.state()

    def extra_state(self) -> dict[str, Tensor]:
        return self._codec.extra_state()
