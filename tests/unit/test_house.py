"""The import rules of docs/architecture.md, and the length of files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hvdlm

HOUSE = Path(hvdlm.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))

EVERYONE = {"arrays", "config", "cores", "errors", "exit_status", "targets", "timing"}
MAY_IMPORT = {
    "arrays": set(),
    "cores": set(),
    "errors": set(),
    "devices": {"errors"},
    "exit_status": set(),
    "targets": set(),
    "paths": set(),
    "arguments": {"errors", "paths"},
    "config": {"arguments", "errors", "paths"},
    "config_reader": {"arguments", "config", "errors", "paths"},
    "timing": set(),
    "output": set(),
    "comm": EVERYONE,
    "gradients": {*EVERYONE, "comm"},
    "data": EVERYONE,
    "model": EVERYONE,
    "parallel": {*EVERYONE, "comm", "model"},
    "privacy": {*EVERYONE, "model"},
    "strategies": {*EVERYONE, "comm", "gradients", "model", "parallel"},
    "scoring": {*EVERYONE, "comm", "data", "model"},
    "training": {
        *(*EVERYONE, "config_reader", "devices", "comm", "gradients", "strategies", "scoring", "data", "model"),
        *("parallel", "privacy"),
    },
    "scaling": {*EVERYONE, "config_reader", "devices", "comm", "gradients", "strategies", "model"},
    "cluster": {*EVERYONE, "config_reader", "comm", "gradients", "data", "model"},
    "report": {*EVERYONE, "config_reader", "model", "training"},
    "hugging_face": {*EVERYONE, "config_reader", "data", "model", "training"},
    "launch": {*EVERYONE, "config_reader", "model"},
    "cli": {
        *(*EVERYONE, "arguments", "config_reader", "output", "data", "model", "training"),
        *("cluster", "scaling", "hugging_face", "report", "launch"),
    },
    "__main__": {"cli"},
    "__init__": set(),
}
ENGINES = ("horovod", "mpi4py", "torch.distributed")
# Tests an installation of Horovod itself, in a process of its own.
SMOKE_TEST = HOUSE / "cluster" / "horovod_build" / "smoke_test.py"


def room(file: Path) -> str:
    return file.relative_to(HOUSE).with_suffix("").parts[0]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported anywhere in a file, and of attributes such as torch.distributed."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def rooms_imported(file: Path) -> Iterator[tuple[int, str]]:
    names = {room(each) for each in FILES}
    for line, name in imports(file):
        parts = name.split(".")
        if parts[0] == "hvdlm" and len(parts) > 1 and parts[1] in names:
            yield line, parts[1]


def is_engine(name: str) -> bool:
    return any(name == engine or name.startswith(engine + ".") for engine in ENGINES)


def test_every_room_is_in_the_design() -> None:
    assert {room(file) for file in FILES} <= MAY_IMPORT.keys()


def test_imports_run_one_way() -> None:
    wrong = [
        f"{file.relative_to(HOUSE)}:{line} imports {other}"
        for file in FILES
        for line, other in rooms_imported(file)
        if other != room(file) and other not in MAY_IMPORT[room(file)]
    ]
    assert wrong == []


def test_only_comm_imports_what_carries_messages() -> None:
    wrong = [
        f"{file.relative_to(HOUSE)}:{line} imports {name}"
        for file in FILES
        for line, name in imports(file)
        if is_engine(name) and room(file) != "comm" and file != SMOKE_TEST
    ]
    assert wrong == []


def test_this_test_sees_imports_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "import torch\n"
        "from torch import distributed\n"
        "def f():\n    import horovod.torch as hvd\n"
        "    from hvdlm.comm import launch\n"
        "    return torch.distributed.is_initialized()\n"
        "import hvdlm.data.shard\n"
    )
    assert {(line, name) for line, name in imports(file) if is_engine(name)} == {
        (2, "torch.distributed"),
        (4, "horovod.torch"),
        (6, "torch.distributed"),
        (6, "torch.distributed.is_initialized"),
    }
    assert set(rooms_imported(file)) == {(5, "comm"), (7, "data")}


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {str(file.relative_to(HOUSE)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert len(lengths) > 100
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}
