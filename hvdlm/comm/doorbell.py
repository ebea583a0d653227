"""A port that answers whoever connects with one word: by it a process is known on a network, whatever else it does."""

from __future__ import annotations

import socket
import socketserver
import threading


class Doorbell:
    """Answers from a thread, from now until `close`."""

    def __init__(self, word: str, closes_within: float = 0.5) -> None:
        """`closes_within`: seconds; as often the thread looks up."""

        class Answer(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.sendall(word.encode())

        class Server(socketserver.TCPServer):
            request_queue_size = 4096  # all ranks may ring at once

        self._server = Server(("", 0), Answer)
        self.port: int = self._server.server_address[1]
        options = {"poll_interval": closes_within}
        threading.Thread(target=self._server.serve_forever, kwargs=options, name="hvdlm-doorbell", daemon=True).start()

    def close(self) -> None:
        """Answers no more."""
        self._server.shutdown()
        self._server.server_close()


def answers(address: str, port: int, word: str, patience: float) -> bool:
    """Whether the doorbell at `address` and `port` is the one with `word`; `patience`: seconds for each answer."""
    try:
        with socket.create_connection((address, port), timeout=patience) as bell:
            return bell.recv(len(word), socket.MSG_WAITALL) == word.encode()
    except OSError:
        return False
