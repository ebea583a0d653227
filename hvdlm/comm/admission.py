"""How a worker that is a process of its own introduces itself to a server, and is told its number or refused.

    worker: the server's token, then what it says of itself
    server: its number, and what else it needs to know; or a sentence why it is not wanted

Whoever does not show the token gets no answer. What is said is JSON, of a bounded length.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

from hvdlm.comm.tcp_connections import fill, greet, greeting
from hvdlm.errors import HvdlmError

_LENGTH_BYTES = 4
_LONGEST_TEXT = 2**18

# Seconds for what a worker says of itself, and for a host to accept a connection
_SECONDS_TO_SPEAK = 10.0
_SECONDS_TO_CONNECT = 30.0


class Admission(NamedTuple):
    """What a worker is told."""

    number: int
    shares: int  # of a batch


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


def join(host: str, port: int, token: str, said: Mapping[str, Any], timeout: float) -> tuple[socket.socket, Admission]:
    """Connects to a server as a worker, which says something of itself: returns the connection, and what it is told.

    `timeout`: seconds for an answer, which a server gives once it has read its checkpoint. Raises HvdlmError if nobody
    listens there, if the token is another one, or if the server does not want the worker.
    """
    where = f"server.address = {host}:{port}"
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
        admission = None if refusal else Admission(int(answer["number"]), int(answer["shares"]))
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
