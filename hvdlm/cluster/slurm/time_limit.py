"""A job's time limit: parsed from sbatch's notation, and how long before it training stops to save."""

from __future__ import annotations

import re

from hvdlm.errors import HvdlmError

# The forms of `man sbatch`, --time: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes,
# days-hours:minutes:seconds.
_FORMS = [
    re.compile(form)
    for form in (
        r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",
        r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
        r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
    )
]
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}

# Seconds in which a step ends and the checkpoint of a large model is written.
_MAX_LEAD = 300


def limit_seconds(text: str) -> int:
    """The limit `text` in seconds, rounded up to full minutes as Slurm does.

    Raises HvdlmError if sbatch does not accept it, or if it is zero or UNLIMITED.
    """
    match = next((match for form in _FORMS if (match := form.fullmatch(text))), None)
    total = sum(int(count or 0) * _SECONDS[unit] for unit, count in match.groupdict().items()) if match else 0
    if not total:
        raise HvdlmError(
            f"--time {text!r} is no time limit: give minutes, hours:minutes:seconds or days-hours, "
            "as in --time 90, --time 4:00:00 or --time 2-12"
        )
    return -(-total // 60) * 60


def default_lead(limit: int) -> int:
    """Seconds before the end of a job of `limit` seconds at which training is asked to save and stop."""
    return min(_MAX_LEAD, limit // 4)
