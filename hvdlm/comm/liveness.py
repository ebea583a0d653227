"""A liveness probe: a TCP port of each process that answers with the process's token, from a thread of its own."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable
from contextlib import suppress

# Seconds for the client to say something or to close the connection; clients of ours do one of both at once.
_CLIENT_TIMEOUT = 1.0


class LivenessServer:
    """Sends its token, its `state`, and what its process is `doing` to whoever connects, from now until `close`."""

    def __init__(
        self, token: str, poll_interval: float = 0.5, password: str = "", on_end: Callable[[], None] | None = None
    ) -> None:
        """`poll_interval`: seconds between checks whether to stop, and so the longest time that `close` takes.

        `on_end`: called when a client sends `password`, which is how it asks this process to end.
        """
        self.state = ""
        self.doing: Callable[[], str] = lambda: ""
        liveness = self

        class Answer(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError):
                    self.request.sendall(f"{token}{liveness.state}\t{liveness.doing()}\n".encode())
                    if on_end is not None:
                        self.request.settimeout(_CLIENT_TIMEOUT)
                        if self.request.recv(len(password), socket.MSG_WAITALL) == password.encode():
                            on_end()

        class Server(socketserver.TCPServer):
            request_queue_size = 4096  # all ranks may connect at once

        self._server = Server(("", 0), Answer)
        self.port: int = self._server.server_address[1]
        options = {"poll_interval": poll_interval}
        threading.Thread(target=self._server.serve_forever, kwargs=options, name="hvdlm-liveness", daemon=True).start()

    def close(self) -> None:
        """Stops answering and frees the port."""
        self._server.shutdown()
        self._server.server_close()


def is_alive(address: str, port: int, token: str, timeout: float) -> bool:
    """Whether the server at `address` and `port` answers with `token`; `timeout`: seconds for each wait."""
    return ask_state(address, port, token, timeout) is not None


def ask_state(address: str, port: int, token: str, timeout: float, password: str = "") -> str | None:
    """The state of the server at `address` and `port`; for the rest see `ask`."""
    answer = ask(address, port, token, timeout, password)
    return None if answer is None else answer[0]


def ask(address: str, port: int, token: str, timeout: float, password: str = "") -> tuple[str, str] | None:
    """The state of the server at `address` and `port`, and what its process is doing; None if nobody there answers with
    `token` within `timeout` seconds for each wait. With its `password`, its process is then asked to end."""
    try:
        with socket.create_connection((address, port), timeout=timeout) as connection:
            if connection.recv(len(token), socket.MSG_WAITALL) != token.encode():
                return None
            answer = b""
            while not answer.endswith(b"\n") and (part := connection.recv(256)):
                answer += part
            connection.sendall(password.encode())
            state, _, doing = answer.decode().rstrip("\n").partition("\t")
            return state, doing
    except OSError:
        return None
