"""The worker pool: an error or Ctrl-C in the parent ends its workers at once, whatever they are at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_prepare import make_texts, write_lines

DEADLINE = 60.0  # seconds


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "RuntimeError"])
def test_workers_that_hang_end_with_the_parent_s_error(error: str) -> None:
    program = (
        "import time; from hvdlm.data.worker_pool import WorkerPool\n"
        "with WorkerPool(2) as pool:\n"
        "    for result in pool.map(time.sleep, [0, *[3600] * 9]):\n"
        f"        raise {error}"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert process.wait(DEADLINE) != 0
    finally:
        left = [each for each in psutil.process_iter() if os_group(each.pid) == process.pid]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(left, timeout=DEADLINE)
    assert not alive


def test_a_worker_killed_while_it_writes_its_result(tmp_path: Path) -> None:
    # The executor of the standard library waits for the rest of the result for ever.
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal\n"
        "from multiprocessing.connection import Connection\n"
        "from hvdlm.data.worker_pool import WorkerPool\n"
        "def send_half(connection, content):\n"
        "    os.write(connection.fileno(), bytes(content)[: len(content) // 2])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def work(item):\n"
        "    if item == 3:\n"
        "        Connection._send = send_half\n"
        "    return item\n"
        "if __name__ == '__main__':\n"
        "    with WorkerPool(2) as pool:\n"
        "        list(pool.map(work, range(9)))\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=DEADLINE)
    assert done.stderr.splitlines()[-1].startswith("hvdlm.errors.HvdlmError: a worker process was killed, most likely")


def os_group(pid: int) -> int:
    """The process group of a process, or 0 if it is gone."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def blocks_interrupts(process: psutil.Process) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    blocked = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(blocked >> (signal.SIGINT - 1) & 1)


def is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return False


def test_ctrl_c_while_workers_start_says_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", make_texts(20_000))
    command = [sys.executable, "-m", "hvdlm", "prepare", "--input", "a.jsonl", "--output", "out", "--workers", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    parent = psutil.Process(process.pid)
    workers: list[psutil.Process] = []
    while len(workers) < 2:
        assert process.poll() is None, "it ended before it could be interrupted"
        workers = [each for each in parent.children() if is_worker(each)]
        time.sleep(0.002)
    assert all(map(blocks_interrupts, workers))
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too, which import modules now
    _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (130, "")
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl"}
