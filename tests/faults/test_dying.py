"""The places of `dying.py`: each names a function of hvdlm, which a change of hvdlm may have given another name."""

from __future__ import annotations

import sys
from pathlib import Path

from launcher import run

EVERY_PLACE = """
import inspect
import dying
functions = filter(inspect.isfunction, vars(dying).values())
places = [each for each in functions if list(inspect.signature(each).parameters) == ["step"]]
for place in places:
    place(0)
print(len(places))
"""


def test_every_place_is_there() -> None:
    folder = str(Path(__file__).parent)
    result = run([sys.executable, "-c", EVERY_PLACE], deadline=60, extra={"PYTHONPATH": folder, "PMIX_RANK": "0"})
    assert result.status == 0, result.output
    assert int(result.output.split()[-1]) > 30
