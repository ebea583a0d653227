"""What horovodrun prints of rank 0 has nothing before each line; what it prints of others has."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from launcher import environment, launcher_command, run

from hvdlm.comm.launcher_output import _open_files

# Each rank joins a job and prints a line on either stream
PROGRAM = """
import os, sys
from hvdlm.training.job import job

with job("auto", 60, "", engine_sums=False) as communicator:
    communicator.barrier()
    print(f"out {communicator.rank}", flush=True)
    print(f"err {communicator.rank}", file=sys.stderr, flush=True)
    communicator.barrier()
"""


def lines(output: str) -> list[str]:
    """Those of PROGRAM, without what horovodrun puts before them if that names the rank and the stream."""
    return sorted(line for line in output.replace("\r", "").splitlines() if "out " in line or "err " in line)


@pytest.mark.parametrize("launcher", ["horovodrun --mpi", "horovodrun --gloo"])
def test_rank_0_prints_where_horovodrun_does(launcher: str) -> None:
    done = run([*launcher_command(launcher, 2), sys.executable, "-c", PROGRAM], deadline=120)
    assert done.status == 0, done.output
    first, second, *others = lines(done.output)
    assert [line.rpartition(">:")[2].strip() for line in (first, second)] == ["err 1", "out 1"]
    assert all(line.startswith("[") for line in (first, second))
    assert others == ["err 0", "out 0"]


# Has its stdout open for ever, and others for a moment, as a launcher that answers its ranks
BUSY = """
import os
os.write(1, b".")
while True:
    for each in [os.open(os.devnull, os.O_RDONLY) for _ in range(50)]:
        os.close(each)
"""


def test_a_launcher_that_closes_files_meanwhile() -> None:
    """What has gone between listing and looking hides nothing that stays."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.read(1)
            pipe = Path(f"/proc/{process.pid}/fd/1").readlink()
            assert all(pipe in list(_open_files(process.pid)) for _ in range(500))
        finally:
            process.kill()


def test_in_a_terminal_too() -> None:
    reading, writing = pty.openpty()
    words = [*launcher_command("horovodrun --gloo", 2), sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        words, env=environment(), stdin=subprocess.DEVNULL, stdout=writing, stderr=writing
    ) as process:
        os.close(writing)
        printed = b""
        try:
            while part := os.read(reading, 4096):
                printed += part
        except OSError:  # so a terminal says that nobody can write to it any more
            pass
        assert process.wait(timeout=60) == 0
    os.close(reading)
    assert {"err 0", "out 0"} <= set(lines(printed.decode()))


def test_files_that_a_user_has_chosen_get_everything(tmp_path: Path) -> None:
    words = launcher_command("horovodrun --gloo", 2)
    words[1:1] = ["--output-filename", str(tmp_path / "ranks")]
    done = run([*words, sys.executable, "-c", PROGRAM], deadline=120)
    assert done.status == 0, done.output
    assert "out 0" in (tmp_path / "ranks" / "rank.0" / "stdout").read_text(encoding="utf-8")
    assert "err 0" in (tmp_path / "ranks" / "rank.0" / "stderr").read_text(encoding="utf-8")
    assert not {"err 0", "out 0"} & set(lines(done.output))


def test_where_a_user_has_led_rank_0_it_stays(tmp_path: Path) -> None:
    script = tmp_path / "own.sh"
    script.write_text(f"exec {sys.executable} -c '{PROGRAM}' >{tmp_path}/own.$HOROVOD_RANK 2>&1\n")
    done = run([*launcher_command("horovodrun --gloo", 2), "sh", str(script)], deadline=120)
    assert done.status == 0, done.output
    assert lines((tmp_path / "own.0").read_text()) == ["err 0", "out 0"]
    assert lines(done.output) == []


def test_a_file_is_left_to_horovodrun(tmp_path: Path) -> None:
    """Which has a position of its own in it."""
    words = [*launcher_command("horovodrun --gloo", 2), sys.executable, "-c", PROGRAM]
    with (tmp_path / "log").open("w") as log:
        subprocess.run(words, env=environment(), stdout=log, stderr=log, timeout=120, check=True)
    assert [line[:3] for line in lines((tmp_path / "log").read_text())] == ["[0]", "[0]", "[1]", "[1]"]
