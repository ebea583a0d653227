"""Divides text files into documents, or into the parts of one."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hvdlm.data.json_records import MAX_DOCUMENT_BYTES
from hvdlm.errors import HvdlmError

BLANK_LINES = "blank-lines"
LINES = "lines"

BLOCK_BYTES = 2**20  # size of a work item: large enough to outweigh the cost of sending it, small in memory

# How a text file is divided into documents: at blank lines, at line ends, into pieces of so many bytes, or not at all
Split = str | int | None


@dataclass(frozen=True)
class Piece:
    """A piece of a text file. `line`: number of the line in which it begins, from 1."""

    line: int
    content: bytes


@dataclass(frozen=True)
class Part:
    """A piece of a document that is spread over shards: `index` is that of the shard; `is_last`: it ends there."""

    index: int
    piece: Piece
    is_last: bool


def parse_split(text: str | None) -> Split:
    """The value of --split. Raises HvdlmError if it is none."""
    if text is None or text in (BLANK_LINES, LINES):
        return text
    if text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_DOCUMENT_BYTES:
        return int(text)
    raise HvdlmError(
        f"--split {text}: give {BLANK_LINES}, {LINES}, or a number of bytes from 1 to {MAX_DOCUMENT_BYTES:,}"
    )


def split_text(stream: io.BufferedIOBase, split: Split) -> Iterator[Piece]:
    """The documents of a text file in order; memory holds one of them.

    Blank lines and blank paragraphs are left out. Of a document that is longer than MAX_DOCUMENT_BYTES, somewhat more
    than that is given.

    Raises what reading `stream` raises.
    """
    if split == LINES:
        return (Piece(line, content.rstrip(b"\r\n")) for line, content in _lines(stream) if content.strip())
    if split == BLANK_LINES:
        return _paragraphs(stream)
    assert isinstance(split, int)
    return _pieces_of(stream, split)


def split_into_parts(stream: io.BufferedIOBase, ends: Sequence[int]) -> Iterator[Part]:
    """One document in consecutive parts, each in pieces of up to BLOCK_BYTES; memory holds one piece.

    Part i ends at byte ends[i], or at the end of the last line before if there is one near, and never within a
    character. The last part ends with the file.

    Raises what reading `stream` raises.
    """
    near = _near(min(end - begin for begin, end in zip([0, *ends], ends, strict=False)))
    text = _Text(stream)
    for index, end in enumerate(ends):
        is_last = False
        while not (is_last or text.is_read):
            left = end - text.position if index < len(ends) - 1 else BLOCK_BYTES + 1
            piece = text.take(min(left, BLOCK_BYTES), near)
            is_last = left <= BLOCK_BYTES or text.is_read
            yield Part(index, piece, is_last)


def _near(length: int) -> int:
    """How far before the place where a piece of this length is to end a line end is taken instead."""
    return min(length // 4, 2**16)


def _lines(stream: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line, without what is beyond MAX_DOCUMENT_BYTES + 1 bytes."""
    number = 1
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        yield number, line
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_DOCUMENT_BYTES)
        number += 1


def _paragraphs(stream: io.BufferedIOBase) -> Iterator[Piece]:
    collected: list[bytes] = []
    first = size = 0
    for number, line in _lines(stream):
        if not line.strip():
            if collected:
                yield Piece(first, b"".join(collected).rstrip(b"\r\n"))
            collected, size = [], 0
        elif size <= MAX_DOCUMENT_BYTES:
            first = number if not collected else first
            collected.append(line)
            size += len(line)
    if collected:
        yield Piece(first, b"".join(collected).rstrip(b"\r\n"))


def _pieces_of(stream: io.BufferedIOBase, size: int) -> Iterator[Piece]:
    text = _Text(stream)
    while not text.is_read:
        yield text.take(size, _near(size))


class _Text:
    """A text file that is read in pieces. `position`: in bytes, where the next one begins."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self._read = stream.read(BLOCK_BYTES)
        self._start = 0  # of what is not yet taken, in `_read`
        self._line = 1
        self.position = 0

    @property
    def is_read(self) -> bool:
        return self._start == len(self._read)

    def take(self, size: int, near: int) -> Piece:
        """The next `size` bytes, or fewer: up to the last line end if that is among the last `near`.

        Only whole characters: one that is longer than `size` is taken whole.
        """
        self._read_ahead(size + 4)
        end = self._start + size
        if end < len(self._read):
            line_end = self._read.rfind(b"\n", max(end - near, self._start), end)
            end = line_end + 1 if line_end >= 0 else _character_bound(self._read, self._start, end)
        piece = Piece(self._line, self._read[self._start : end])
        self._start = min(end, len(self._read))
        self._line += piece.content.count(b"\n")
        self.position += len(piece.content)
        return piece

    def _read_ahead(self, size: int) -> None:
        """Makes sure that `size` bytes are there to be taken, if the file has as many."""
        while len(self._read) - self._start < size and (more := self._stream.read(max(BLOCK_BYTES, size))):
            self._read, self._start = self._read[self._start :] + more, 0


def _character_bound(content: bytes, start: int, end: int) -> int:
    """The bound of UTF-8 characters next to `end`: the last one before if it is behind `start`, or one behind."""
    candidates: list[int] = [*range(end, max(end - 4, start), -1), *range(end + 1, end + 4)]
    for bound in candidates:
        if bound >= len(content) or content[bound] & 0xC0 != 0x80:
            return bound
    return end  # no UTF-8, as will be found
