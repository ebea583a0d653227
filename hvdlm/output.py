"""stdout and stderr that may fail: a full disk, a closed terminal, a reader that has gone.

What a command prints on the way is a view, and never a reason to end: training goes on, what it saves is kept. What a
command prints as its product (`hvdlm evaluate > table.txt`) is not: if that is lost, the command says so and fails.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Exit status of a program whose reader has gone, as shells know it from SIGPIPE: 128 + 13
READER_GONE = 141


class TolerantStream:
    """A text stream whose failures are remembered in `failure` instead of raised.

    After the first one its file descriptor leads to /dev/null, so that libraries written in C may go on printing too.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """`stream`: None if its file descriptor was closed when the process began; what is written is then dropped."""
        self._stream: TextIO = io.StringIO() if stream is None else stream
        self._is_closed = stream is None
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        if not self._is_closed:
            self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        if not self._is_closed:
            self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            self.failure = self.failure or error
            self._discard()
        except ValueError:  # somebody has closed it
            self._is_closed = True

    def _discard(self) -> None:
        """Leads the file descriptor to /dev/null, where what is still buffered goes too."""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()
        except (OSError, ValueError):  # it has no file descriptor, as a test's stream
            self._is_closed = True


@contextmanager
def tolerant_output() -> Iterator[TolerantStream]:
    """Makes stdout and stderr tolerant within the block, and yields stdout, of which one may ask for its failure."""
    _reopen_standard_files()
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal's encoding lacks
    output, errors = (TolerantStream(stream) for stream in before)
    sys.stdout, sys.stderr = output, errors
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


def product_status(output: TolerantStream) -> tuple[int, str | None]:
    """Exit status and sentence of a command whose product is what it prints: (0, None) if all of it was written."""
    output.flush()
    if output.failure is None:
        return 0, None
    if output.failure.errno == errno.EPIPE:  # as of `hvdlm inspect data | head`: nobody needs to be told
        return READER_GONE, None
    return 1, f"cannot write to stdout: {output.failure.strerror}"


def _reopen_standard_files() -> None:
    """Opens /dev/null where stdin, stdout or stderr is closed: the next file to be opened would get its number, and
    with it all that libraries written in C print there."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
