"""What doctor finds wrong, and how it says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Something wrong: `what`, with the place, and `remedy`, a phrase each; an error if the job should not run."""

    severity: Literal["error", "warning"]
    what: str
    remedy: str


def tell(findings: Sequence[Finding]) -> int:
    """Prints findings, errors first, a line each, or that there are none; the exit status: 1 if any is an error."""
    for finding in sorted(findings, key=lambda finding: finding.severity):  # "error" sorts before "warning"
        print(f"{finding.severity}: {finding.what}: {finding.remedy}", flush=True)
    if not findings:
        print("nothing was found wrong", flush=True)
    return int(any(finding.severity == "error" for finding in findings))
