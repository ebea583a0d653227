"""Installing where there is no network, from what was gathered where there is one."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launcher import BIN

CHECKOUT = Path(__file__).parents[2]


def checkout(there: Path) -> Path:
    """A copy of the files that git knows, or would add."""
    there.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=CHECKOUT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (CHECKOUT / name).is_file():
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, there / name)
    return there


def gather(house: Path, *words: str) -> str:
    command = [BIN / "hvdlm", "wheelhouse", house, *words]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def without_a_network(directory: Path, script: str) -> str:
    """The output of a script in a network namespace that has a loopback interface and no route, and knows no index."""
    kept = ("PATH", "HOME", "LANG")
    variables = {name: os.environ[name] for name in kept if name in os.environ}
    variables["PATH"] = os.pathsep.join(each for each in variables["PATH"].split(os.pathsep) if each != str(BIN))
    variables |= {"PIP_CONFIG_FILE": os.devnull, "HVDLM_CACHE": str(directory / "cache"), "PYTHONNOUSERSITE": "1"}
    inside = f'set -e; ip link set lo up; test -z "$(ip route)"; cd {shlex.quote(str(directory))}; {script}'
    words = ["unshare", "--net", "bash", "-c", inside]
    result = subprocess.run(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.thorough
@pytest.mark.needs_root
@pytest.mark.timeout(2400)
def test_install_train_and_test(tmp_path: Path) -> None:
    """With Horovod, which is compiled there."""
    print(gather(tmp_path / "house", "--extra", "test"))
    copy = checkout(tmp_path / "hvdlm")
    shutil.move(tmp_path / "house", copy / "house")
    tests = "tests/unit/test_doctor_rank_checks.py tests/unit/test_doctor_hosts.py tests/parallel/test_doctor.py"
    script = f"""
    make train PYTHON={sys.executable} WHEELHOUSE=house
    make .venv/test.stamp WHEELHOUSE=house
    PATH=$PWD/.venv/bin:$PATH OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 python -m pytest -q {tests}
    """
    said = without_a_network(copy, script)
    assert "== A sample of what it learned" in said
    print(said[-2000:])


@pytest.mark.thorough
@pytest.mark.needs_root
@pytest.mark.timeout(2400)
def test_a_machine_that_has_pytorch(tmp_path: Path) -> None:
    """Its packages stay as they are: only those that it lacks come from the wheelhouse, and Horovod is built for its
    PyTorch. The check of GPUs has all that it needs but a GPU."""
    have = ["torch", "numpy", "h5py", "mpi4py"]
    print(gather(tmp_path / "house", "--extra", "gpu-test", "--have", *have))
    gathered = {path.name.split("-")[0] for path in (tmp_path / "house").glob("*.whl")}
    assert "pydantic" in gathered and not gathered & {"torch", "numpy", "h5py", "mpi4py", "sympy", "networkx"}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "theirs"], check=True)
    python = tmp_path / "theirs/bin/python"
    pins = ["--constraint", CHECKOUT / "constraints.txt"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pins, *have], check=True)
    copy = checkout(tmp_path / "hvdlm")
    shutil.move(tmp_path / "house", copy / "house")
    doctor = "mpirun -np 2 --bind-to none --oversubscribe hvdlm doctor"
    root = "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    there = f"PYTHON={python} WHEELHOUSE=house"
    script = f"make setup {there}; PATH=$PWD/.venv/bin:$PATH {root} {doctor}; make gpu-check {there} || true"
    assert "gpu_check.sh: error: PyTorch finds no GPU here" in without_a_network(copy, script)
    where = [copy / ".venv/bin/python", "-c", "import torch; print(torch.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(tmp_path / "theirs"))
