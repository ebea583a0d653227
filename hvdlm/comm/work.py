"""`Work`: a handle of an operation in progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Work(Generic[T]):
    """A handle of an operation in progress: its tensors must not be read, written or freed before `wait` returns."""

    def __init__(self, finish: Callable[[], T]) -> None:
        """`finish` blocks until the operation has ended and returns its result; once it has, it is not called again."""
        self._finish: Callable[[], T] | None = finish
        self._result: T

    @staticmethod
    def done(result: U) -> Work[U]:
        """Work that has already ended with `result`."""
        return Work(lambda: result)

    def wait(self) -> T:
        """Blocks until the operation has ended and returns its result; a second call returns it again.

        For tensors on a GPU it may return earlier, once the current stream is ordered after the operation.
        """
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None
        return self._result

    def then(self, function: Callable[[T], U]) -> Work[U]:
        """Work whose result is `function` of this one's result, applied by the thread that calls `wait`."""
        return Work(lambda: function(self.wait()))
