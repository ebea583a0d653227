"""JSON records in a file that is not JSON Lines: in an array, or one after the other."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from enum import Enum
from itertools import islice

MAX_DOCUMENT_BYTES = 64 * 2**20  # bounds memory: whole documents are held in memory, a few at a time

_FIRST_READ = 2**16
_BLANKS = re.compile(r"[ \t\n\r]*")


class JsonShape(Enum):
    """How a file that calls itself JSON is made."""

    LINES = "an object in each line, at least two"
    VALUES = "an array that begins with an object, or several objects"
    OBJECT = "one object"
    OTHER = "anything else, or no JSON"


def json_shape(stream: io.BufferedIOBase) -> JsonShape:
    """The shape of a file, by its first two values. Raises what reading `stream` raises."""
    lines = _first_line(stream).removeprefix(codecs.BOM_UTF8).lstrip() or _first_line(stream).lstrip()
    if lines.startswith(b"[") and not lines[1:].strip():
        lines += _first_line(stream)
    if lines.startswith(b"["):
        return JsonShape.VALUES if lines[1:].lstrip().startswith(b"{") else JsonShape.OTHER
    if not lines.startswith(b"{"):
        return JsonShape.OTHER
    try:
        is_object = isinstance(json.loads(lines), dict)
    except (ValueError, RecursionError):
        is_object = False
    if is_object:
        return JsonShape.LINES if _first_line(stream) else JsonShape.OBJECT
    stream.seek(0)
    try:
        values = len(list(islice(json_values(stream), 2)))
    except (ValueError, RecursionError):
        return JsonShape.OTHER
    return (JsonShape.OTHER, JsonShape.OBJECT, JsonShape.VALUES)[values]


def _first_line(stream: io.BufferedIOBase) -> bytes:
    """The next line that is not blank; empty at the end of the file."""
    while line := stream.readline(MAX_DOCUMENT_BYTES):
        if line.strip():
            return line
    return b""


def json_values(stream: io.BufferedIOBase) -> Iterator[str]:
    """The source text of each element of the array that a file is, or of the values that stand in it.

    Memory holds a few times the longest of them. Raises ValueError (UnicodeDecodeError is one) where the file is not
    JSON or a value is longer than MAX_DOCUMENT_BYTES, RecursionError for too deep a nesting, and what reading `stream`
    raises.
    """
    text = _Text(stream)
    is_array = text.next_character() == "["
    if is_array:
        text.position += 1
        if text.next_character() == "]":
            return
    while text.next_character():
        yield text.value()
        if is_array:
            separator = text.next_character()
            if separator == "]":
                return
            if separator != ",":
                raise ValueError(f"a comma or ] is missing before {separator or 'the end of the file'!r}")
            text.position += 1
    if is_array:
        raise ValueError("] is missing at the end of the file")


class _Text:
    """The text of a stream from `position` on, read as it is needed."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._is_whole = False
        self.position = 0

    def next_character(self) -> str:
        """The next character that is not blank, where `position` then is; empty at the end of the file."""
        while True:
            blanks = _BLANKS.match(self._text, self.position)
            self.position = blanks.end() if blanks else self.position
            if self.position < len(self._text) or self._is_whole:
                return self._text[self.position : self.position + 1]
            self._read_more()

    def value(self) -> str:
        """The source text of the value at `position`, which then is behind it."""
        decoder = json.JSONDecoder()
        while True:
            try:
                _, end = decoder.raw_decode(self._text, self.position)
            except ValueError:
                if self._is_whole:
                    raise
                if len(self._text) - self.position > MAX_DOCUMENT_BYTES:
                    raise ValueError(f"there is no whole value in {MAX_DOCUMENT_BYTES // 2**20} MiB") from None
            else:
                if end < len(self._text) or self._is_whole:  # a number may go on
                    value = self._text[self.position : end]
                    self.position = end
                    return value
            self._read_more()

    def _read_more(self) -> None:
        """Twice as much as is there, so that parsing from the beginning again costs little in all."""
        rest = self._text[self.position :]
        read = self._stream.read(max(_FIRST_READ, len(rest)))
        self._is_whole = not read
        self._text, self.position = rest + self._decoder.decode(read, final=not read), 0
