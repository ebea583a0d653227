"""Every command of README.md and docs/ runs as it stands, on a shorter quickstart and a smaller study.

Those for many hosts run in the hosts of the fabric that the documents themselves start.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import assert_same_curve, losses, records
from launcher import run
from waiting import wait_for

ROOT = Path(__file__).parents[2]
STEPS = 10  # of the shorter quickstart

# Where commands run; the first pattern that matches one says it.
PLACES = {
    "make (train|test|quick)": "elsewhere",
    "source ": "elsewhere",
    "salloc ": "elsewhere",
    "python benchmarks/scaling.py strong benchmarks/studies/slurm.toml": "elsewhere",
    "hvdlm wheelhouse runs/wheelhouse$": "elsewhere",
    "hvdlm fabric ": "machine of the fabric",
    r"python benchmarks/(scaling|report)\.py ": "study",
    "hvdlm (fit|predict) ": "study",
    r"(horovodrun|mpirun|hvdlm doctor) .*--hostfile hostfiles/": "fabric",
    "hvdlm slurm ": "fabric",
    "squeue": "fabric",
    "(hvdlm|horovodrun|mpirun) ": "one machine",
}

# Commands that no test of this file runs, and why
ELSEWHERE = {
    "make train": "test_quickstart.py runs it",
    "make test": "it is what runs this",
    "source ": "tests find the programs of their own environment",
    "salloc ": "it waits for a user; test_slurm.py has a study in an allocation",
    "hvdlm wheelhouse runs/wheelhouse": "`make thorough` installs from it, without a network",
    "python benchmarks/scaling.py strong benchmarks/studies/slurm.toml": "the study of test_slurm.py is smaller",
}


@dataclass(frozen=True)
class Command:
    """A line of a shell block."""

    document: str
    heading: str
    line: str

    @property
    def place(self) -> str:
        """Where it is to run, "" if nowhere."""
        return next((place for pattern, place in PLACES.items() if re.match(pattern, self.line)), "")


def documents() -> list[Path]:
    """README.md, and the folder docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[Command]:
    """The lines of all shell blocks, in order; each once, for documents repeat one another."""
    found: dict[str, Command] = {}
    for document in documents():
        heading, is_shell = "", False
        for line in document.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            if line.startswith("```"):
                is_shell = line == "```bash"
            elif is_shell and line and not line.startswith("#"):
                name = document.relative_to(ROOT).as_posix()
                found.setdefault(line, Command(name, heading, line))
            elif line.startswith("#"):
                heading = line.lstrip("# ")
    return list(found.values())


def lines(place: str) -> list[str]:
    """What runs there, in order; not nothing."""
    found = [command.line for command in commands() if command.place == place]
    assert found, place
    return found


def test_every_command_runs_somewhere() -> None:
    nowhere = [command for command in commands() if not command.place]
    assert not nowhere, f"say in PLACES where these run: {nowhere}"
    for line in lines("elsewhere"):
        assert any(line.startswith(start) for start in ELSEWHERE), f"say in ELSEWHERE why no test runs {line!r}"
    for start in ELSEWHERE:
        assert any(line.startswith(start) for line in lines("elsewhere")), f"no document has {start!r} any more"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (
            "one machine",
            ["horovodrun", "mpirun", "prepare", "inspect", "evaluate", "lm-eval", "generate", "--resume latest"],
        ),
        ("fabric", ["horovodrun", "mpirun", "hvdlm slurm", "hvdlm doctor"]),
        ("machine of the fabric", ["fabric up", "fabric run", "fabric link", "fabric status", "fabric down"]),
        ("study", ["scaling.py", "report.py", "hvdlm fit", "hvdlm predict"]),
    ],
)
def test_the_documents_have_commands(place: str, words: list[str]) -> None:
    said = "\n".join(lines(place))
    assert [word for word in words if word not in said] == []


@pytest.fixture(scope="module")
def checkout(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout after `make setup data`, with a quickstart of 10 steps."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "hostfiles", "README.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results"))
    shutil.copytree(small_data, folder / "data" / "python-stdlib")
    quickstart = folder / "examples" / "quickstart.toml"
    set_keys(quickstart, {"steps": str(STEPS), "warmup_steps": "5", "evaluate_sequences": "32"})
    set_keys(quickstart, {"every": "1"}, section="[log]")
    set_keys(folder / "examples" / "continued.toml", {"steps": "10", "warmup_steps": "5", "evaluate_sequences": "32"})
    small = {"ranks": "[1, 2]", "links": '["1gbit"]', "codecs": '["none", "fp16"]', "layers": "1", "steps": "1"}
    study = folder / "benchmarks" / "studies" / "fabric.toml"
    set_keys(study, small)
    study.write_text(f"repetitions = 1\n{study.read_text(encoding='utf-8')}", encoding="utf-8")
    return folder


def set_keys(file: Path, values: dict[str, str], section: str = "") -> None:
    """Changes lines `key = value` from `section` on in a TOML file, each of which must be there once."""
    text = file.read_text(encoding="utf-8")
    start = text.index(section)
    before, text = text[:start], text[start:]
    for key, value in values.items():
        text, changed = re.subn(rf"^{key} = [^#\n]*", f"{key} = {value} ", text, flags=re.MULTILINE)
        assert changed == 1, key
    file.write_text(before + text, encoding="utf-8")


@pytest.fixture(scope="module")
def curve_alone(checkout: Path) -> dict[int, float]:
    """What the quickstart's loss is on one process, which is what it is on any number of ranks."""
    words = ["hvdlm", "train", "examples/quickstart.toml", "--train.run_dir", "alone"]
    result = run(words, cwd=checkout)
    assert result.status == 0, result.output
    curve = losses(checkout / "alone")
    assert sorted(curve) == list(range(1, STEPS + 1))
    return curve


def assert_runs(checkout: Path, world_sizes: dict[str, int], expected: dict[int, float]) -> None:
    """That these runs are there, on so many ranks, with the expected curve."""
    for name, ranks in world_sizes.items():
        run_dir = checkout / "runs" / name
        assert {record["world_size"] for record in records(run_dir)} == {ranks}, name
        assert_same_curve(losses(run_dir), expected, relative=1e-4)
        assert (run_dir / "loss.png").exists(), name


def run_lines(lines: Sequence[str], checkout: Path, **options: object) -> None:
    """Runs lines one after another, as a shell takes them."""
    for line in lines:
        result = run(["bash", "-c", line], cwd=checkout, **options)  # type: ignore[arg-type]
        assert result.status == 0, f"{line}\n{result.output}"


@pytest.mark.xdist_group("commands for one machine")
@pytest.mark.timeout(1200)
def test_every_command_for_one_machine(checkout: Path, curve_alone: dict[int, float]) -> None:
    """In order: later ones use what earlier ones made."""
    run_lines(lines("one machine"), checkout)
    assert_runs(checkout, {"horovodrun": 2, "mpirun": 2, "alone": 1}, curve_alone)
    assert (checkout / "data" / "mine" / "manifest.json").exists()


@pytest.mark.needs_slurm
@pytest.mark.xdist_group("commands for many hosts")
@pytest.mark.timeout(1200)
def test_every_command_for_many_hosts(checkout: Path, tmp_path: Path, curve_alone: dict[int, float]) -> None:
    """Those of the fabric stand last in the documents, for who has hosts; here the first of them comes first."""
    state = {"HVDLM_FABRIC": str(tmp_path / "fabric")}
    up, *rehearsal, down = lines("machine of the fabric")
    assert "fabric up" in up and "fabric down" in down
    run_lines([up], checkout, extra=state)
    try:
        cluster = Cluster(tmp_path / "fabric", hosts=2)
        for line in lines("fabric"):
            # a job that was submitted goes on after its command
            goes_on = "--submit" in line or line == "squeue"
            result = cluster.run("h1", line, deadline=400, cwd=checkout, may_go_on=goes_on)
            assert result.status == 0, f"{line}\n{result.output}"
        run_lines(rehearsal, checkout, extra=state)
        wait_for((checkout / "runs" / "slurm" / "loss.png").exists, 400, "end of the job under Slurm")
    finally:
        run_lines([down], checkout, extra=state)
    assert_runs(checkout, {"hosts": 8, "hosts-mpi": 8, "slurm": 8}, curve_alone)


@pytest.mark.needs_root
@pytest.mark.timeout(1200)
def test_a_study_from_its_plan_to_its_forecast(checkout: Path) -> None:
    result = None
    for line in lines("study"):
        result = run(["bash", "-c", line], cwd=checkout, deadline=400)
        assert result.status == 0, f"{line}\n{result.output}"
    assert result is not None and "Links are taken to carry" in result.output  # of the last one, on GPUs


def test_links_lead_somewhere() -> None:
    count = 0
    for document in [*documents(), ROOT / "CONTRIBUTING.md"]:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (document.parent / target).exists(), f"{document} links to {target}"
            count += 1
    assert count > 10
