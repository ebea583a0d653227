"""Problems that doctor finds, and how it prints them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """A problem: `what` is wrong and where, and its `remedy`, each a phrase. An error means: do not start the job."""

    severity: Literal["error", "warning"]
    what: str
    remedy: str


def print_findings(findings: Sequence[Finding]) -> int:
    """Prints one line for each finding, errors first, or that there is none. Returns the exit status: 1 on an error."""
    for finding in sorted(findings, key=lambda finding: finding.severity):  # "error" sorts before "warning"
        print(f"{finding.severity}: {finding.what}: {finding.remedy}", flush=True)
    if not findings:
        print("nothing was found wrong", flush=True)
    return int(any(finding.severity == "error" for finding in findings))


def counted(number: int, noun: str) -> str:
    """ "1 core", "4 cores" or "no cores"."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
