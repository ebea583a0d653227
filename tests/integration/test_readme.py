"""Every command of the README runs as it stands, on a shorter quickstart; those of many hosts in the named fabric."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
from cluster import Cluster, skip_without_fabric
from launcher import run

ROOT = Path(__file__).parents[2]
HOSTS = "Many hosts"
STUDIES = "Scaling studies"


def commands() -> dict[str, list[str]]:
    """The lines of the README's shell blocks by heading, in order, without those that the Makefile's tests cover."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = {}
    for section in text.split("\n## ")[1:]:
        blocks = re.findall(r"^```bash\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines() if line]
        found[section.partition("\n")[0]] = [line for line in lines if not line.startswith(("make ", "source "))]
    return found


@pytest.fixture(scope="module")
def checkout(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout after `make setup data`, with a quickstart of 20 steps."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "hostfiles", "README.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    shutil.copytree(small_data, folder / "data" / "python-stdlib")
    quickstart = folder / "examples" / "quickstart.toml"
    settings = quickstart.read_text(encoding="utf-8")
    short = re.sub(r"^steps = \d+", "steps = 20", settings, flags=re.MULTILINE)
    short = re.sub(r"^warmup_steps = \d+", "warmup_steps = 5", short, flags=re.MULTILINE)
    assert short != settings
    quickstart.write_text(short, encoding="utf-8")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results"))
    study = folder / "benchmarks" / "studies" / "fabric.toml"
    plan = study.read_text(encoding="utf-8")
    small = {"ranks": "[1, 2]", "links": '["1gbit"]', "codecs": '["none", "fp16"]', "layers": "1", "steps": "1"}
    for key, value in small.items():
        plan, changed = re.subn(rf"^{key} = .*", f"{key} = {value}", plan, flags=re.MULTILINE)
        assert changed == 1, key
    study.write_text(f"repetitions = 1\n{plan}", encoding="utf-8")
    return folder


def test_the_readme_has_commands() -> None:
    said = "\n".join(line for lines in commands().values() for line in lines)
    for word in ("horovodrun", "mpirun", "hvdlm prepare", "hvdlm evaluate", "hvdlm generate", "--resume latest"):
        assert word in said
    on_hosts = "\n".join(commands()[HOSTS])
    for word in ("horovodrun", "mpirun", "hvdlm slurm", "hvdlm doctor", "hvdlm fabric"):
        assert word in on_hosts


def test_every_command_for_one_machine(checkout: Path) -> None:
    """In order: later ones use what earlier ones made."""
    for heading, lines in commands().items():
        for line in lines if heading not in (HOSTS, STUDIES) else []:
            result = run(["bash", "-c", line], cwd=checkout)
            assert result.status == 0, f"{line}\n{result.output}"
    assert (checkout / "runs" / "horovodrun" / "loss.png").exists()
    assert (checkout / "data" / "mine" / "manifest.json").exists()


@pytest.mark.timeout(600)
def test_every_command_for_many_hosts(checkout: Path, tmp_path: Path) -> None:
    """Those that make the fabric stand last in the README, for who has hosts; here they come first."""
    skip_without_fabric(slurm=True)
    lines = commands()[HOSTS]
    outside = [line for line in lines if line.startswith("hvdlm fabric")]
    state = {"HVDLM_FABRIC": str(tmp_path / "fabric")}
    up, *rehearsal, down = outside
    result = run(["bash", "-c", up], extra=state, cwd=checkout)
    assert result.status == 0, result.output
    try:
        cluster = Cluster(tmp_path / "fabric", hosts=2)
        for line in [line for line in lines if line not in outside]:
            # a job that was submitted goes on after its command
            goes_on = "--submit" in line or line == "squeue"
            result = cluster.run("h1", line, deadline=200, cwd=checkout, may_go_on=goes_on)
            assert result.status == 0, f"{line}\n{result.output}"
        for line in rehearsal:
            result = run(["bash", "-c", line], extra=state, cwd=checkout)
            assert result.status == 0, f"{line}\n{result.output}"
        deadline = time.monotonic() + 120
        while not (checkout / "runs" / "slurm" / "loss.png").exists() and time.monotonic() < deadline:
            time.sleep(1)
        for run_dir in ("hosts", "hosts-mpi", "slurm"):
            assert (checkout / "runs" / run_dir / "loss.png").exists(), run_dir
    finally:
        result = run(["bash", "-c", down], extra=state, cwd=checkout)
        assert result.status == 0, result.output


def test_links_lead_somewhere() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), f"{document} links to {target}"


def test_a_study_from_its_plan_to_its_forecast(checkout: Path) -> None:
    """Those for Slurm are in test_slurm.py."""
    skip_without_fabric(slurm=False)
    lines = [line for line in commands()[STUDIES] if "slurm" not in line and not line.startswith("salloc")]
    assert [line.split()[1] for line in lines] == ["benchmarks/scaling.py", "benchmarks/report.py", "fit", "predict"]
    for line in lines:
        result = run(["bash", "-c", line], cwd=checkout, deadline=200)
        assert result.status == 0, f"{line}\n{result.output}"
    assert "extrapolated" in result.output
