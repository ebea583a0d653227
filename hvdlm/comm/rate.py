"""Rates of links, as people write them."""

from __future__ import annotations

import re

from hvdlm.errors import HvdlmError

_BITS = {"k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def parse_rate(text: str) -> int:
    """bit/s for "100mbit", "1gbit", "2.5gbit"; raises HvdlmError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", text.strip().lower())
    if not found or float(found.group(1)) == 0:
        raise HvdlmError(f"{text!r} is not a link's rate: write a number and kbit, mbit or gbit, as in 100mbit")
    return int(float(found.group(1)) * _BITS[found.group(2)])


def rate_text(rate: int) -> str:
    """The shortest way to write bit/s: 1gbit, 100mbit, 1500kbit."""
    unit = next((name for name in "gmk" if rate % _BITS[name] == 0), "")
    return f"{rate // _BITS[unit] if unit else rate}{unit}bit"
