"""What all servers answer alike: letters that bring what a server keeps, or ask for it."""

from __future__ import annotations

from hvdlm.comm.activity import Activity
from hvdlm.comm.mailbox import Letter
from hvdlm.strategies.server.group import Kind, ServerGroup
from hvdlm.strategies.server.owned import OwnedParameters


class Server:
    """A server and its part of the model."""

    def __init__(self, owned: OwnedParameters, group: ServerGroup, activity: Activity) -> None:
        """`activity`: of this rank."""
        self._owned, self._group, self._mailbox, self._activity = owned, group, group.mailbox, activity

    def answer_about_kept(self, letter: Letter) -> None:
        """Answers LOAD and GIVE. Raises RuntimeError for any other letter, which nobody sends to servers."""
        kind, number, second, _ = letter.header
        if kind == Kind.LOAD:
            self._owned.load(number, bool(second), letter.data)
        elif kind == Kind.GIVE:
            for bucket in range(self._owned.buckets):
                self._mailbox.post([letter.source], (Kind.KEPT, bucket, number), self._owned.kept(bucket, bool(number)))
        else:
            raise RuntimeError(f"rank {letter.source} has sent a server a letter of kind {kind}")
