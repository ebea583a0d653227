"""Engine `horovod` under an elastic horovodrun, with `comm.elastic`: ranks may die, and others may join.

horovodrun starts the ranks and numbers them; all they exchange goes over TCP connections of our own (tcp.py), their
sums too. Horovod's library is not initialised: a rank that dies while others are in its `init` ends them, as an
exception leaves its background thread there (horovod/common/operations.cc, BackgroundThreadLoop: `Initialize` of the
Gloo context stands outside of any `try`).
"""

from __future__ import annotations

import os

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.death_watch import DeathWatch
from hvdlm.comm.elastic_rendezvous import ElasticRendezvous, Member
from hvdlm.comm.tcp import TcpCommunicator


class ElasticTcpCommunicator(TcpCommunicator):
    """All ranks of an elastic horovodrun."""

    engine = "horovod"
    capabilities = frozenset({"send", "split", "shrink", "join"})

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds that a rank waits for another.

        A rank that finds others in training is new: a group of its own, which gets ready while the others wait for it
        in `regroup_`, and joins them by calling that.
        """
        Communicator.__init__(self)
        self._timeout = timeout
        self._rendezvous = ElasticRendezvous(os.environ, timeout)
        self._own_watch = DeathWatch()
        self._rendezvous.announce(self._own_watch.endpoint, trains=False)
        self.is_new = self._is_apart = self._rendezvous.others_train()
        if self._is_apart:
            self._listen(None)
            self._open(0, [self._messages.endpoint], [self._collective.endpoint])
        else:
            self._meet()
        self._locate()
        if self._is_apart:  # it shares cores and GPUs of its host with others
            self.local_rank, self.local_size = self._rendezvous.local_rank, self._rendezvous.local_size
        self._rendezvous.listen_for_hosts(self._note_hosts)

    def _note_hosts(self) -> None:
        self.hosts_have_changed = True

    def _meet(self) -> None:
        """Connects this rank with all others of its group, once each has called this."""
        self._listen(self._own_watch)
        own = Member(self._own_watch.endpoint, self._messages.endpoint, self._collective.endpoint)
        members = self._rendezvous.meet(own)
        rank, following = self._rendezvous.rank, (self._rendezvous.rank + 1) % len(members)
        if following != rank:
            self._own_watch.watch(rank, members[following].watch)
        self._open(rank, [each.messages for each in members], [each.collective for each in members])

    def _regroup(self) -> None:
        self.activity.idle()  # waits for others have deadlines of their own here
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._messages.close()
        self._collective.close()
        if not self._is_apart:  # otherwise it has a place in the group that it was started for
            self.hosts_have_changed = False
            self._rendezvous.regroup()
            self._own_watch = DeathWatch()
            self._rendezvous.announce(self._own_watch.endpoint, trains=not self.is_new)
        self._is_apart = False
        self._meet()

    def _close(self) -> None:
        super()._close()
        self._own_watch.close()
