"""A liveness probe: a TCP port of each process that answers with the process's token, from a thread of its own."""

from __future__ import annotations

import socket
import socketserver
import threading


class LivenessServer:
    """Sends its token to whoever connects, from now until `close`."""

    def __init__(self, token: str, poll_interval: float = 0.5) -> None:
        """`poll_interval`: seconds between checks whether to stop, and so the longest time that `close` takes."""

        class Answer(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.sendall(token.encode())

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
    try:
        with socket.create_connection((address, port), timeout=timeout) as connection:
            return connection.recv(len(token), socket.MSG_WAITALL) == token.encode()
    except OSError:
        return False
