"""What an elastic horovodrun knows of its ranks: who is which of how many, where each listens, which hosts come and go.

horovodrun (0.28, `runner/elastic`) serves a key-value store over HTTP, which it empties for each new group of ranks. A
rank that asks it for `rank_and_size` is told of its place in the next group, once every other rank of the present one
has asked too or has ended (`registration.py`). Processes that horovodrun then starts find theirs in the environment.
Only rank 0 is told when hosts come or go (`driver.py`, `_notify_workers_host_changes`).
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from typing import Any, NamedTuple

from hvdlm.comm.death_watch import has_died
from hvdlm.comm.failure import DeadRankError, LeftOutError, LostRankError, RunningTime, result_within, timeout_error
from hvdlm.comm.startup import STARTUP_TIMEOUT
from hvdlm.comm.tcp_connections import Endpoint

# Seconds between two questions for what is not there yet, and between two whether the process still lives
_ASK_EVERY = 0.05
_CHECK_EVERY = 0.5

# Seconds for horovodrun to answer what it knows
_ANSWER_TIMEOUT = 30.0

_SCOPE = "hvdlm"


class Member(NamedTuple):
    """Where a rank of a group listens."""

    watch: Endpoint
    messages: Endpoint
    collective: Endpoint


def starts_elastically(environment: Mapping[str, str]) -> bool:
    """Whether an elastic horovodrun, one with a host-discovery script, has started this process."""
    return environment.get("HOROVOD_ELASTIC") == "1" and "HOROVOD_GLOO_RENDEZVOUS_ADDR" in environment


class ElasticRendezvous:
    """This process's place among those of an elastic horovodrun."""

    def __init__(self, environment: Mapping[str, str], timeout: float) -> None:
        """`timeout`: seconds that it waits for other ranks."""
        self._address = environment["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
        self._port = int(environment["HOROVOD_GLOO_RENDEZVOUS_PORT"])
        self._host = environment["HOROVOD_HOSTNAME"]
        self._slot = f"{self._host}:{environment['HOROVOD_LOCAL_RANK']}"
        self._timeout = timeout
        self.rank, self.size = int(environment["HOROVOD_RANK"]), int(environment["HOROVOD_SIZE"])
        self.local_rank, self.local_size = (
            int(environment["HOROVOD_LOCAL_RANK"]),
            int(environment["HOROVOD_LOCAL_SIZE"]),
        )

    # ---- groups of ranks

    def regroup(self) -> None:
        """Waits until all ranks that live ask for a new group, and learns of this rank's place in it.

        Raises LeftOutError if it has none: horovodrun drops all ranks of a host on which one has failed.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="hvdlm-rendezvous")
        answer = thread.submit(self._request, "GET", "rank_and_size", self._slot, None, None)
        thread.shutdown(wait=False)
        text = result_within(answer, self._timeout, self.rank, "horovodrun to regroup the ranks that are left") or b""
        rank, size, *_ = (int(word) for word in text.split(b","))
        if rank < 0:
            raise LeftOutError(
                f"rank {self.rank} on {socket.gethostname()} ends: horovodrun has no place for it any more, since "
                f"another rank of {self._host} has failed, or that host was taken away"
            )
        self.rank, self.size = rank, size

    def announce(self, watch: Endpoint, trains: bool) -> None:
        """Says that this process is there, and whether it has been training."""
        self._trains = trains
        self._put(f"here.{self.rank}", [watch, trains])

    def others_train(self) -> bool:
        """Whether this process has been started to join ranks that train. Once it is announced."""
        if self.rank == 0:
            return False  # the process that is there longest
        _, trains = self._wait_for("here.0", self._timeout)
        return bool(trains)

    def meet(self, own: Member) -> list[Member]:
        """All ranks of the group, once each has called this.

        Raises DeadRankError if one has died meanwhile, or does not come: those that live meet in the next group.
        """
        self._put(f"member.{self.rank}", own)
        if self.rank == 0:
            self._gather()
        # Rank 0 gives up first
        members = self._wait_for("members", 2 * self._timeout, lambda: self._check_lives(0))
        return [Member(*(Endpoint(*end) for end in each)) for each in members]

    def _gather(self) -> None:
        """Rank 0 collects what ranks have put: so each has one question to horovodrun, not one for each other."""
        members: list[Any] = []
        try:
            for rank in range(self.size):
                # A process that was started to join may have ended before it could say anything
                self._wait_for(f"here.{rank}", min(self._timeout, STARTUP_TIMEOUT) if self._trains else self._timeout)
            for rank in range(self.size):
                members.append(self._wait_for(f"member.{rank}", self._timeout, self._check_all_live))
        except LostRankError as error:
            raise DeadRankError(str(error)) from error
        self._put("members", members)

    def _check_all_live(self) -> None:
        for rank in range(1, self.size):
            self._check_lives(rank)

    def _check_lives(self, rank: int) -> None:
        announced = self._get(f"here.{rank}")
        if announced is not None and has_died(Endpoint(*announced[0])):
            raise DeadRankError(f"rank {self.rank} on {socket.gethostname()}: rank {rank} has died before all had met")

    # ---- hosts

    def listen_for_hosts(self, on_change: Callable[[], None]) -> None:
        """From now on calls `on_change`, on another thread, when hosts come or go; on rank 0 alone, whoever that is."""
        from horovod.runner.elastic.worker import WorkerNotificationManager

        manager = WorkerNotificationManager()
        manager.init()
        manager.register_listener(_Listener(on_change))

    # ---- the key-value store

    def _wait_for(self, key: str, timeout: float, check: Callable[[], None] = lambda: None) -> Any:
        """The value of a key once it is there; `check` is called now and then, and may raise.

        Raises LostRankError after `timeout` seconds.
        """
        clock, checked = RunningTime(), time.monotonic()
        while (value := self._get(key)) is None:
            if clock.seconds() > timeout:
                raise timeout_error(timeout, self.rank, "the other ranks of its group")
            if time.monotonic() - checked > _CHECK_EVERY:
                check()
                checked = time.monotonic()
            time.sleep(_ASK_EVERY)
        return value

    def _put(self, key: str, value: Any) -> None:
        self._request("PUT", _SCOPE, key, json.dumps(value).encode(), _ANSWER_TIMEOUT)

    def _get(self, key: str) -> Any:
        answer = self._request("GET", _SCOPE, key, None, _ANSWER_TIMEOUT)
        return None if answer is None else json.loads(answer)

    def _request(self, method: str, scope: str, key: str, body: bytes | None, timeout: float | None) -> bytes | None:
        """What horovodrun answers; None if it knows of no such key. Raises LostRankError if it is gone."""
        connection = HTTPConnection(self._address, self._port, timeout=timeout)
        try:
            connection.request(method, f"/{scope}/{key}", body)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, HTTPException) as error:
            raise LostRankError(
                f"rank {self.rank} on {socket.gethostname()} does not reach horovodrun at {self._address}:{self._port} "
                f"({error or type(error).__name__}): it has ended, or has ended the job"
            ) from error
        finally:
            connection.close()
        return answer if response.status == 200 else None


class _Listener:
    """As Horovod wants it."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    def on_hosts_updated(self, timestamp: int, change: int) -> None:
        """Called by Horovod. `change`: whether hosts have come, or gone, or both."""
        self._on_change()
