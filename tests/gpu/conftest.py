"""For checks on GPUs: a data set, what each check measured, and the table of all of them at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from gpu_jobs import STEPS, train
from launcher import run

ROOT = Path(__file__).parents[2]

# Their tests start jobs of their own, and need not wait for each other
_SEPARATE = ("test_train.py", "test_layouts.py", "test_strategies.py", "test_benchmarks_run.py")

_HEAD = (("check", "result", "seconds", "measured, or why not"), ("---",) * 4)
_LONGEST = 160  # characters of the last column


@pytest.fixture(scope="session")
def data(small_data: Path) -> Path:
    """Some packages of Python's standard library, as bytes."""
    return small_data


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source text of Python's standard library, as bytes: enough for steps of many tokens."""
    directory = tmp_path_factory.mktemp("data") / "python-stdlib"
    result = run(["hvdlm", "prepare", "--input", "python-stdlib", "--output", str(directory)], deadline=120)
    assert result.status == 0, result.output
    return directory


@pytest.fixture(scope="session")
def cpu_curve(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Of one process on the CPU, in fp32."""
    curve = train("none", 1, data, tmp_path_factory.mktemp("cpu") / "run", "--train.device", "cpu")
    assert sorted(curve) == list(range(1, STEPS + 1))
    return curve


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Puts a phrase into the table, in the row of this check."""
    return lambda phrase: record_property("measured", phrase)


@pytest.hookimpl(tryfirst=True)  # before the tests of a file are kept together
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets tests of jobs run on any worker of pytest-xdist."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name in _SEPARATE:
            item.add_marker(pytest.mark.xdist_group(item.nodeid))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A row for each check; also added to those of earlier runs in HVDLM_GPU_RESULTS/table.md, if that is set."""
    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if "tests/gpu" in report.nodeid and (report.when == "call" or outcome != "passed"):
                rows.append((_name(report), outcome, f"{report.duration:.1f}", _phrase(report)))
    if all(phrase.startswith("needs_gpu") for *_, phrase in rows):
        return
    head, body = ([f"| {' | '.join(row)} |" for row in part] for part in (_HEAD, sorted(rows)))
    terminalreporter.section("checks on GPUs")
    for line in [*head, *body]:
        terminalreporter.write_line(line)
    if folder := os.environ.get("HVDLM_GPU_RESULTS"):
        file = Path(folder) / "table.md"
        earlier = file.read_text(encoding="utf-8").splitlines() if file.exists() else head
        file.write_text("\n".join([*earlier, *body]) + "\n", encoding="utf-8")


def _name(report: pytest.TestReport) -> str:
    """Of the test, without the group that pytest-xdist adds."""
    return report.nodeid.partition("::")[2].partition("@")[0]


def _phrase(report: pytest.TestReport) -> str:
    """What a check measured; of one that failed or was skipped, the line that says why."""
    phrases = [str(value) for name, value in report.user_properties if name == "measured"]
    if report.skipped and isinstance(report.longrepr, tuple):
        phrases.append(str(report.longrepr[2]).removeprefix("Skipped: "))
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        phrases.append(str(getattr(crash, "message", report.longrepr)).strip().partition("\n")[0])
    return "; ".join(phrases).replace("|", "/")[:_LONGEST]
