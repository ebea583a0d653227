"""Text files divided into documents, or one document into parts: nothing is lost, characters and lines stay whole."""

from __future__ import annotations

import io
import itertools
import random
import re

import pytest

from hvdlm.data import splitting
from hvdlm.data.splitting import split_into_parts, split_text

LINES = "".join(f"line {i} of Grüße und 🙂\n" for i in range(500)).encode()
NO_LINES = "Grüße🙂世界".encode() * 800


def test_lines() -> None:
    pieces = list(split_text(io.BytesIO(b"one\r\n\n  two \n \t\nthree"), "lines"))
    assert [(piece.line, piece.content) for piece in pieces] == [(1, b"one"), (3, b"  two "), (5, b"three")]


def test_paragraphs() -> None:
    text = b"\n\none\ntwo\n\n \t\r\n  three\nfour\n\nfive\n"
    pieces = list(split_text(io.BytesIO(text), "blank-lines"))
    assert [(piece.line, piece.content) for piece in pieces] == [(3, b"one\ntwo"), (7, b"  three\nfour"), (10, b"five")]


def test_of_what_is_too_long_the_beginning_is_given_and_what_follows_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "MAX_DOCUMENT_BYTES", 10)
    lines = split_text(io.BytesIO(b"short\n" + b"x" * 35 + b"\nlast\n"), "lines")
    assert [(piece.line, piece.content) for piece in lines] == [(1, b"short"), (2, b"x" * 11), (3, b"last")]
    paragraphs = split_text(io.BytesIO(b"one\n\n" + b"12345\n" * 5 + b"\nlast\n"), "blank-lines")
    assert [(piece.line, piece.content) for piece in paragraphs] == [(1, b"one"), (3, b"12345\n12345"), (9, b"last")]


@pytest.mark.parametrize("size", [1, 3, 7, 100, 1000, 50_000, 10**6])
@pytest.mark.parametrize("text", [LINES, NO_LINES], ids=["lines", "no lines"])
def test_pieces_of_a_size(text: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "BLOCK_BYTES", 4096)  # so that pieces lie across what is read at once
    pieces = list(split_text(io.BytesIO(text), size))
    assert b"".join(piece.content for piece in pieces) == text
    assert all(piece.content.decode() for piece in pieces)  # whole characters, none empty
    assert all(len(piece.content) <= max(size, 4) for piece in pieces)
    if size >= 4:
        assert all(len(piece.content) >= 0.75 * size - 3 for piece in pieces[:-1])
    if text is LINES and size >= 1000:  # lines of 28 bytes
        assert all(piece.content.endswith(b"\n") for piece in pieces)
    before = 0
    for piece in pieces:
        assert piece.line == text.count(b"\n", 0, before) + 1
        before += len(piece.content)


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("text", [LINES, NO_LINES], ids=["lines", "no lines"])
@pytest.mark.parametrize("block", [1000, 2**20])
def test_parts_of_a_document(text: bytes, count: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "BLOCK_BYTES", block)
    ends = [len(text) * (i + 1) // count for i in range(count)]
    parts = list(split_into_parts(io.BytesIO(text), ends))
    assert b"".join(part.piece.content for part in parts) == text
    assert [part.index for part in parts] == sorted(part.index for part in parts)
    assert all(part.piece.content.decode() and len(part.piece.content) <= block for part in parts)
    lengths = []
    for index, pieces in itertools.groupby(parts, lambda part: part.index):
        own = list(pieces)
        assert [part.is_last for part in own] == [False] * (len(own) - 1) + [True]
        lengths.append(sum(len(part.piece.content) for part in own))
        if text is LINES and index < count - 1:
            assert own[-1].piece.content.endswith(b"\n")
    assert len(lengths) == count
    for end, reached in zip(ends, itertools.accumulate(lengths), strict=True):
        assert end - 40 < reached <= end  # lines of up to 28 bytes


def test_lines_and_paragraphs_agree_with_regular_expressions() -> None:
    generator = random.Random(0)
    for _ in range(200):
        text = "".join(generator.choices("ab \t\n", k=60))
        lines = [piece.content.decode() for piece in split_text(io.BytesIO(text.encode()), "lines")]
        assert lines == [line for line in text.split("\n") if line.strip()]
        paragraphs = [piece.content.decode() for piece in split_text(io.BytesIO(text.encode()), "blank-lines")]
        expected = re.split(r"\n(?:[ \t]*\n)+", re.sub(r"\A(?:[ \t]*\n)+", "", text + "\n\n"))
        assert paragraphs == [paragraph for paragraph in expected if paragraph.strip()]
