"""The characters by which byte-level models write bytes in their vocabulary."""

from __future__ import annotations


def byte_vocabulary() -> dict[str, int]:
    """Maps the printable character that byte-level models use for each byte value to that value.

    Printable characters of Latin-1 stand for their own value, U+0100 and on for the others (Radford et al. 2019).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}
