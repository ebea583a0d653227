"""Checks that run on the ranks of a pool: what a body file says of each, and which groups of ranks run it.

A body file holds functions called check_..., of a communicator and keywords. `check` narrows the groups that one runs
on, and gives values for its keywords; without it a check runs on every group that its body is for.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from allpairspy import AllPairs

DEADLINE = 240.0  # seconds of a check

Function = TypeVar("Function", bound=Callable[..., Any])

# Of each engine, as communicator_body.check_capabilities finds them on its ranks; tcp: of parts of Horovod's job.
CAPABILITIES = {
    "solo": {"float16", "bfloat16", "split"},
    "mpi": {"send", "split"},
    "torch": {"send", "split", "float16", "bfloat16"},
    "horovod": {"send", "split", "float16"},
    "tcp": {"send", "split"},
}


@dataclass(frozen=True)
class Group:
    """Ranks that a body runs on, and keywords for all its checks."""

    engine: str
    launcher: str
    size: int
    pool: int  # ranks of the pool
    keywords: Mapping[str, Any] = field(default_factory=dict)
    is_thorough: bool = False  # other ranks of this engine, or another engine, do much the same

    @property
    def capabilities(self) -> set[str]:
        return CAPABILITIES[self.engine]


@dataclass(frozen=True)
class _Limits:
    """What `check` was given."""

    sizes: Sequence[int] = (1, 2, 3, 4)
    engines: Sequence[str] = tuple(CAPABILITIES)
    needs: str | None = None
    lacks: str | None = None
    is_timing: bool = False
    is_thorough: bool = False
    deadline: float = DEADLINE
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def allow(self, group: Group) -> bool:
        """Whether a check is for a group."""
        if group.size not in self.sizes or group.engine not in self.engines:
            return False
        return self.needs in {None, *group.capabilities} and self.lacks not in group.capabilities


def check(
    sizes: Sequence[int] = (1, 2, 3, 4),
    engines: Sequence[str] = tuple(CAPABILITIES),
    needs: str | None = None,
    lacks: str | None = None,
    is_timing: bool = False,
    is_thorough: bool = False,
    deadline: float = DEADLINE,
    **values: Sequence[Any],
) -> Callable[[Function], Function]:
    """Limits a check to groups of some sizes and engines, that have one capability and have not another.

    `is_timing`: it compares clocks, so its items are marked `timing`. `is_thorough`: another check does nearly the
    same in less time. `deadline`: seconds.

    `values`: of keywords, all of which run: see `cases_of`. If the group has a value of its own for the keyword, the
    check runs on that group if it is one of them.
    """

    def mark(function: Function) -> Function:
        function.limits = _Limits(sizes, engines, needs, lacks, is_timing, is_thorough, deadline, values)  # type: ignore[attr-defined]
        return function

    return mark


@dataclass(frozen=True)
class Case:
    """One check on one group: an item of the test session."""

    body: Path
    function: str
    group: Group
    keywords: Mapping[str, Any]
    is_timing: bool
    is_thorough: bool  # other cases have its size and each of its values, though not together
    deadline: float

    def __str__(self) -> str:
        values = [Path(str(value)).name.replace(":", ".") for value in self.keywords.values()]
        name = f"{self.body.stem.removesuffix('_body')}.{self.function.removeprefix('check_')}"
        where = f"{self.group.engine} {self.group.launcher.replace(' --', ' ')} {self.group.size}"
        return "-".join([name, where, *values])


def checks_of(body: ModuleType) -> dict[str, Callable[..., Any]]:
    """The checks of a body by name, in their order."""
    return {name: function for name, function in vars(body).items() if name.startswith("check_")}


def cases_of(body: ModuleType, groups: Sequence[Group]) -> list[Case]:
    """Every check of a body on the groups that it is for.

    On the groups of one engine and launcher every two values of keywords meet, and each meets every size: not all
    products of three and more, which for some checks are 36, and take minutes. Those that bring no new value or size,
    but two that have not met, are `thorough`.
    """
    assert body.__file__ is not None
    found = []
    for alike in _alike(groups):
        for name, function in checks_of(body).items():
            limits: _Limits = getattr(function, "limits", _Limits())
            fitting = [group for group in alike if limits.allow(group)]
            for group, keywords, has_nothing_new in _pairwise(function, limits, fitting):
                is_thorough = group.is_thorough or limits.is_thorough or has_nothing_new
                case = Path(body.__file__), name, group, keywords, limits.is_timing, is_thorough, limits.deadline
                found.append(Case(*case))
    return found


def _alike(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that differ in nothing but their sizes."""
    found: list[list[Group]] = []
    for group in groups:
        for others in found:
            if replace(others[0], size=group.size) == group:
                others.append(group)
                break
        else:
            found.append([group])
    return found


def _pairwise(
    function: Callable[..., Any], limits: _Limits, groups: Sequence[Group]
) -> Iterator[tuple[Group, dict[str, Any], bool]]:
    """Groups that differ in nothing but their sizes, and the keywords of each run of a check on them; and whether those
    before have had each size and each value of this one."""
    if not groups:
        return
    wanted = list(inspect.signature(function).parameters)[1:]
    given = groups[0].keywords
    if any(value not in limits.values.get(name, [value]) for name, value in given.items()):
        return
    own = {name: value for name, value in given.items() if name in wanted}
    free = {name: values for name, values in limits.values.items() if name not in given}
    ranges = [range(len(values)) for values in (groups, *free.values())]
    chosen = AllPairs(ranges) if len(ranges) > 1 else itertools.product(*ranges)
    had: set[tuple[int, int]] = set()
    for indices in chosen:
        new = set(enumerate(indices)) - had
        had |= new
        first, *others = indices
        values = (values[index] for values, index in zip(free.values(), others, strict=True))
        yield groups[first], {**own, **dict(zip(free, values, strict=True))}, not new


def assert_every_check_runs(body: ModuleType, cases: Sequence[Case]) -> None:
    """Fails for a body without checks, and for a check that no group is for: it would pass by not being run."""
    assert body.__file__ is not None
    assert checks_of(body), f"{body.__name__} has no checks"
    left = set(checks_of(body)) - {case.function for case in cases if case.body == Path(body.__file__)}
    assert not left, f"no group runs {', '.join(sorted(left))} of {body.__name__}"
