"""How a worker that is a process of its own introduces itself to servers, and is told its number or refused.

    worker: the servers' token, then what it says of itself
    server: its number, and what else it needs to know; or a sentence why it is not wanted

The first server gives the number; the others are told it. Whoever does not show the token gets no answer. What is said
is JSON, of a bounded length.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from hvdlm.comm.tcp_connections import fill, greet, greeting
from hvdlm.errors import HvdlmError

_LENGTH_BYTES = 4
_LONGEST_TEXT = 2**18

# Of a server that is not the first one, for sentences
_OTHER = "the server, of which that at server.address has told, at"

# Seconds for what a worker says of itself, and for a host to accept a connection
_SECONDS_TO_SPEAK = 10.0
_SECONDS_TO_CONNECT = 30.0


class Entrance(NamedTuple):
    """Where a server listens, but the first one."""

    addresses: Sequence[str]  # of its host; none if that is the first server's
    port: int


class Admission(NamedTuple):
    """What a worker is told; of `shares` and `others` by the first server alone."""

    number: int
    shares: int = 0  # of a batch
    others: Sequence[Entrance] = ()


def introduction(connection: socket.socket, token: str) -> dict[str, Any] | None:
    """What whoever has connected says of itself; None if it does not show the `token`, or what it says is no use."""
    if greeting(connection, token) is None:
        return None
    try:
        connection.settimeout(_SECONDS_TO_SPEAK)
        said = _receive(connection)
        connection.settimeout(None)
    except (OSError, ValueError, RecursionError):
        return None
    return said


def admit(connection: socket.socket, admission: Admission) -> None:
    """Raises OSError."""
    _send(connection, admission._asdict())


def refuse(connection: socket.socket, reason: str) -> None:
    """Raises OSError."""
    _send(connection, {"refused": reason})


def number_in(said: Mapping[str, Any]) -> int | None:
    """The number that the first server has given to whoever says this to another one; None if it says none."""
    number = said.get("number")
    return number if type(number) is int and number >= 0 else None


def join_all(
    host: str, port: int, token: str, said: Mapping[str, Any], timeout: float
) -> tuple[list[socket.socket], Admission]:
    """Connects to the server at this address, then to the others of which that tells: returns the connections, in the
    order of servers, and what the first one tells. Arguments and errors are those of `join`.
    """
    connection, admission = join(host, port, token, said, timeout)
    connections = [connection]
    try:
        for entrance in admission.others:
            connections.append(_join_other(entrance, host, token, admission.number, timeout))
    except HvdlmError:
        for each in connections:
            each.close()
        raise
    return connections, admission


def _join_other(entrance: Entrance, first_host: str, token: str, number: int, timeout: float) -> socket.socket:
    """By the first of its addresses that answers."""
    *others, last = entrance.addresses or [first_host]
    for address in others:
        with suppress(HvdlmError):
            return join(address, entrance.port, token, {"number": number}, timeout, _OTHER)[0]
    return join(last, entrance.port, token, {"number": number}, timeout, _OTHER)[0]


def join(
    host: str, port: int, token: str, said: Mapping[str, Any], timeout: float, what: str = "server.address ="
) -> tuple[socket.socket, Admission]:
    """Connects to a server as a worker, which says something of itself: returns the connection, and what it is told.

    `timeout`: seconds for an answer, which a server gives once it has read its checkpoint. `what`: the address is, for
    sentences. Raises HvdlmError if nobody listens there, if the token is another one, or if the server does not want
    the worker.
    """
    where = f"{what} {host}:{port}"
    try:
        connection = socket.create_connection((host, port), timeout=_SECONDS_TO_CONNECT)
    except OSError as error:
        reason = error.strerror or str(error)
        raise HvdlmError(
            f"{where} cannot be reached: {reason}; see that hvdlm serve listens there, and that no firewall is between"
        ) from None
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(timeout)
        greet(connection, token, 0)
        _send(connection, said)
        answer = _receive(connection)
        connection.settimeout(None)
        refusal = answer.get("refused")
        admission = None if refusal else _admission(answer)
    except ConnectionError:
        connection.close()
        raise HvdlmError(
            f"{where} has closed the connection: give the token that hvdlm serve has written to its run directory"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        connection.close()
        raise HvdlmError(
            f"{where} does not answer as hvdlm serve would ({error}): see what listens there, and how busy it is"
        ) from None
    if admission is None:
        connection.close()
        raise HvdlmError(f"{where} does not take this worker: {refusal}")
    return connection, admission


def _admission(answer: Mapping[str, Any]) -> Admission:
    """Raises ValueError, KeyError or TypeError if it is none."""
    others = [Entrance([str(each) for each in addresses], int(port)) for addresses, port in answer["others"]]
    return Admission(int(answer["number"]), int(answer["shares"]), others)


def _send(connection: socket.socket, said: Mapping[str, Any]) -> None:
    text = json.dumps(said).encode()
    connection.sendall(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Raises OSError; ValueError or RecursionError if it is no JSON object, or too long."""
    length = memoryview(bytearray(_LENGTH_BYTES))
    fill(connection, length)
    announced = int.from_bytes(length, "little")
    if announced > _LONGEST_TEXT:
        raise ValueError(f"{announced} bytes are too many")
    text = memoryview(bytearray(announced))
    fill(connection, text)
    said = json.loads(bytes(text))
    if not isinstance(said, dict):
        raise ValueError("it is no JSON object")
    return said
