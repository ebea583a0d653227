"""Measures what each fault of catalogue.py costs, and writes it into docs/faults.md: `python tests/faults/measure.py`.

Each is a real job of four ranks on this machine, or on two emulated hosts, with 16 sequences a step, that ends in 40
steps, if need be by being started again with `--resume latest`, as a queue does. As root, since disks are filled and
mounted.

    seconds     from the fault to the end of the first step that no rank had ended before it
    lost        sequences that the finished run has not been trained on
    repeated    sequences of steps that had ended, and were computed again from a checkpoint
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS / folder) for folder in ("parallel", "ranks", "integration")]

from catalogue import FAULTS, Fault  # noqa: E402
from cluster import Cluster  # noqa: E402
from disks import small_disk  # noqa: E402
from jobs import command, losses, records  # noqa: E402
from launcher import start  # noqa: E402

DYING = Path(__file__).with_name("dying.py")
PAGE = TESTS.parent / "docs" / "faults.md"
MARKS = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
RANKS, STEPS, BATCH = 4, 40, 16
REST = 0.05  # seconds of each step, so that a driver outside finds its moment
SETTINGS: Mapping[str, object] = {
    "train.steps": STEPS,
    "train.threads": 1,
    "comm.algorithm": "ring",
    "comm.bucket_mb": 0.02,
    "comm.timeout": 10,
    "optimizer.lr": 0.002,
    "checkpoint.every": 0,
}
DEADLINE = 120.0  # seconds for each start of a job


@dataclass(frozen=True)
class Outcome:
    """What one fault has cost."""

    happens: str
    seconds: float
    lost: int
    repeated: int


class Faulty:
    """A run with a fault, as catalogue.py's `Run` has it."""

    def __init__(self, fault: Fault, data: Path, folder: Path, cluster: Cluster | None) -> None:
        self.fault, self.data, self._cluster = fault, data, cluster
        self.run_dir = folder / "disk" / "run"
        self._times = folder / "times"
        settings = {**SETTINGS, **fault.settings, "comm.elastic": str(fault.elastic).lower()}
        overrides = {name.replace(".", "__"): value for name, value in settings.items()}
        self._words = command(data, self.run_dir, "--resume", "latest", **overrides)[1:]
        self._tolerance = ["--with-ft", "ulfm"] if fault.elastic else []
        self._lines: list[str] = []
        self._seen: dict[int, float] = {}  # time.time() at which a step's line was seen last
        self._is_over = threading.Event()

    # ---- for the catalogue

    def wait_for(self, step: int) -> None:
        self._wait(lambda: max(self._seen, default=0) >= step)

    def wait_for_start(self) -> None:
        self._wait(lambda: len(self.ranks()) == RANKS and (self.run_dir / ".lock").exists())

    def wait_for_end(self) -> None:
        self._wait(lambda: self._job.process.poll() is not None)

    def ranks(self) -> list[psutil.Process]:
        """By rank; not the processes that they start for a moment."""
        found: dict[int, psutil.Process] = {}
        for each in self._members():
            with contextlib.suppress(psutil.Error):
                rank = each.environ().get("OMPI_COMM_WORLD_RANK")
                if rank is not None and str(DYING) in each.cmdline():
                    found[int(rank)] = min(each, found.get(int(rank), each), key=psutil.Process.create_time)
        return [found[rank] for rank in sorted(found)]

    def launcher(self) -> psutil.Process:
        return psutil.Process(self._job.process.pid)

    def note_fault(self) -> None:
        with self._times.open("a", encoding="utf-8") as file:
            print(time.time(), file=file)

    def processes_of(self, host: str) -> list[psutil.Process]:
        assert self._cluster is not None
        return self._cluster.fabric.jobs(host)

    def set_link(self, host: str, change: str) -> None:
        assert self._cluster is not None
        self._cluster.fabric.link(host, change)

    # ---- the measurement

    def measure(self, whole: Mapping[int, float]) -> Outcome:
        """`whole`: the losses of an undisturbed run. Raises AssertionError if the run does not end as it must."""
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            status = self._run(self.fault.plan, self.fault.act)
            fault = float(self._times.read_text(encoding="utf-8").split()[0])
            before = max((step for step, seen in self._seen.items() if seen < fault), default=0)
            done, statuses, resumed = max(self._seen, default=0), [status], []
            while statuses[-1] or max(losses(self.run_dir)) < STEPS:
                assert len(statuses) < 4, f"{self.fault}: it ends with {statuses}\n{''.join(self._lines)}"
                self._lines.clear()
                statuses.append(self._run("", None))
                found = re.search(r"resuming from \S+, step (\d+)", "".join(self._lines))
                resumed.append(int(found[1]) if found else 0)
        finally:
            self._is_over.set()
        ended, own = time.time(), losses(self.run_dir)
        assert list(own) == list(range(1, STEPS + 1)), f"{self.fault}: steps {list(own)}"
        if not self.fault.changes_curve:
            worst = max(abs(own[step] / whole[step] - 1) for step in whole)
            assert worst < 1e-4, f"{self.fault}: losses within {worst:.1e}"
        last = done if len(statuses) > 1 else before
        after = min((seen for step, seen in self._seen.items() if step > last and seen > fault), default=ended)
        return Outcome(self._told(statuses, resumed), after - fault, self._lost(), BATCH * sum(
            max(0, done - step) for step in resumed[:1]
        ))  # fmt: skip

    def _run(self, plan: str, act: object) -> int:
        """One start of the job; returns its status once no process of it is left."""
        variables = {"HVDLM_FAULT_TIMES": str(self._times), "HVDLM_REST": str(REST)}
        where = ["--oversubscribe"]
        if self._cluster is not None:
            where = ["--hostfile", str(self._cluster.hostfile)]
            where += [word for name in ("PATH", "OMP_NUM_THREADS", *variables) for word in ("-x", name)]
        launcher = ["mpirun", *self._tolerance, *where, "--bind-to", "none", "-np", str(RANKS)]
        words = [*launcher, sys.executable, str(DYING), plan, *self._words]
        if self._cluster is not None:
            words = self._cluster.inside("h1", words)
        with start(words, variables) as self._job:
            stdout = self._job.process.stdout
            assert stdout is not None
            reader = threading.Thread(target=self._lines.extend, args=(stdout,), daemon=True)
            reader.start()
            if callable(act):
                act(self)
            status = self._job.process.wait(DEADLINE)
            _, left = psutil.wait_procs(self._members(), timeout=20)
            assert not left, f"{self.fault}: processes are left: {left}"
            reader.join(5)
        return status

    def _members(self) -> list[psutil.Process]:
        """The job's processes, on all hosts."""
        hosts = self._cluster.hosts if self._cluster is not None else []
        return [*self._job.members(), *(each for host in hosts for each in self.processes_of(host))]

    def _watch(self) -> None:
        """Notes when lines of steps appear."""
        file = self.run_dir / "metrics.jsonl"
        while not self._is_over.wait(0.003):
            if not file.exists():
                continue
            now, steps = time.time(), set()
            for line in file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    record = json.loads(line)
                    if record["kind"] == "train":
                        steps.add(record["step"])
            for step in steps - self._seen.keys():
                self._seen[step] = now

    def _lost(self) -> int:
        """Sequences that no update has used: of steps that were left out, and of data that could not be read."""
        said = " ".join(str(each["message"]) for each in records(self.run_dir, "event"))
        unread = [int(count) for count in re.findall(r"left out, (\d+) so far", said)]
        return (unread[-1] if unread else 0) + BATCH * said.count(" is left out: ")

    def _told(self, statuses: Sequence[int], resumed: Sequence[int]) -> str:
        if len(statuses) > 1:
            ends = ", ".join(f"ends with {status}" for status in statuses[:-1])
            return f"{ends}; begun again, it goes on from step {resumed[0]}"
        said = " ".join(str(each["message"]) for each in records(self.run_dir, "event"))
        if " died: " in said:
            return f"the others go on: {records(self.run_dir)[-1]['world_size']} ranks at the end"
        if " is left out: " in said:
            return "all ranks leave out the step"
        if "cannot be read and are left out" in said:
            return "the sequences are left out"
        if "it has those of rank" in said:
            return "it gets those of the other ranks"
        failed = len(re.findall(r"step \d+ was not saved", said))
        return f"{failed} checkpoint{'s' if failed > 1 else ''} fail{'' if failed > 1 else 's'}, training goes on" if (
            failed
        ) else "training goes on"  # fmt: skip

    def _wait(self, condition: object) -> None:
        end = time.monotonic() + DEADLINE
        assert callable(condition)
        while not condition():
            assert time.monotonic() < end, f"{self.fault}: {''.join(self._lines)}"
            time.sleep(0.003)


def measure(fault: Fault, data: Path, whole: Mapping[int, float]) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="hvdlm-fault-") as directory:
        folder = Path(directory)
        with small_disk(folder / "disk", "16m"), cluster_of(fault.hosts, folder / "fabric") as cluster:
            return Faulty(fault, Path(shutil.copytree(data, folder / "data")), folder, cluster).measure(whole)


@contextlib.contextmanager
def cluster_of(hosts: int, state: Path) -> Iterator[Cluster | None]:
    """An emulated cluster on which ranks have the host's part of all ranks as slots; none for 0 hosts."""
    if not hosts:
        yield None
        return
    cluster = Cluster.start(state, hosts, RANKS // hosts)
    try:
        yield cluster
    finally:
        cluster.down()


def undisturbed(data: Path) -> dict[int, float]:
    """The losses by step of a run in which nothing happens."""
    with tempfile.TemporaryDirectory(prefix="hvdlm-fault-") as directory:
        run_dir = Path(directory) / "run"
        words = command(data, run_dir, **{name.replace(".", "__"): value for name, value in SETTINGS.items()})
        subprocess.run(["mpirun", "--oversubscribe", "-np", "2", *words], check=True, capture_output=True)
        return losses(run_dir)


def table(rows: Sequence[tuple[Fault, Outcome]]) -> str:
    lines = [
        "| fault | phase | elastic | what happens | seconds to the next good step | samples lost | samples repeated |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault, found in rows:
        elastic = "yes" if fault.elastic else ""
        cells = fault.name, fault.phase, elastic, found.happens, f"{found.seconds:.1f}", found.lost, found.repeated
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="of hvdlm prepare")
    parser.add_argument("--only", default="", help="faults whose name and phase contain this, which are only printed")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", OMPI_MCA_mpi_yield_when_idle="1")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ranks of a shell that ignores it would, too
    whole = undisturbed(options.data)
    rows = []
    for fault in FAULTS:
        if options.only in f"{fault.name}, {fault.phase}":
            rows.append((fault, measure(fault, options.data, whole)))
            print(f"== {fault.name}, {fault.phase}: {rows[-1][1]}", flush=True)
    if options.only:
        print(table(rows))
    else:
        begin, end = MARKS
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
        PAGE.write_text(before + begin + table(rows) + end + rest.partition(end)[2], encoding="utf-8")
