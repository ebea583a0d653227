"""Faults that measure.py lets real jobs suffer: what happens to which rank in which phase."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import psutil
from disks import flip_bit


class Run(Protocol):
    """A job under way, as measure.py has it."""

    run_dir: Path
    data: Path

    def wait_for(self, step: int) -> None: ...

    def wait_for_start(self) -> None: ...

    def ranks(self) -> list[psutil.Process]: ...

    def launcher(self) -> psutil.Process: ...

    def note_fault(self) -> None: ...

    def processes_of(self, host: str) -> list[psutil.Process]: ...

    def set_link(self, host: str, change: str) -> None: ...

    def wait_for_end(self) -> None: ...


Act = Callable[[Run], None]

STEP = 15  # after which faults come
SAVED = 20  # the second checkpoint


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    phase: str
    plan: str = ""  # of dying.py: what a rank suffers from inside
    act: Act | None = None  # what is done from outside
    elastic: bool = True
    settings: Mapping[str, object] = field(default_factory=dict)
    hosts: int = 0  # of an emulated cluster, which share the ranks equally; 0: this machine
    changes_curve: bool = False  # from that of a dense run: samples are left out, or the codec is lossy


def signalled(number: int, to: Sequence[int] = (1,), at: int = STEP) -> Act:
    """A signal to some ranks."""

    def act(run: Run) -> None:
        run.wait_for(at)
        run.note_fault()
        ranks = run.ranks()
        for rank in to:
            ranks[rank].send_signal(number)

    return act


def to_launcher(number: int) -> Act:
    def act(run: Run) -> None:
        run.wait_for(STEP)
        run.note_fault()
        run.launcher().send_signal(number)

    return act


def at_start(run: Run) -> None:
    run.wait_for_start()
    run.note_fault()
    run.ranks()[1].send_signal(signal.SIGTERM)


def twice(run: Run) -> None:
    signalled(signal.SIGSTOP, to=(2,))(run)  # so that the step does not end before the second one
    run.ranks()[1].send_signal(signal.SIGINT)
    time.sleep(1.5)
    run.ranks()[1].send_signal(signal.SIGINT)


def suspended(ranks: Sequence[int], seconds: float) -> Act:
    def act(run: Run) -> None:
        signalled(signal.SIGSTOP, ranks)(run)
        victims = [run.ranks()[rank] for rank in ranks]
        time.sleep(seconds)
        for each in victims:
            each.resume()

    return act


def link_cut(seconds: float) -> Act:
    def act(run: Run) -> None:
        run.wait_for(STEP)
        run.note_fault()
        run.set_link("h2", "down")
        time.sleep(seconds)
        run.set_link("h2", "up")

    return act


def killed_on_host(and_daemon: bool) -> Act:
    """All ranks of a host; or all that runs there for the job, as when its power is gone."""

    def act(run: Run) -> None:
        run.wait_for(STEP)
        ranks = {each.pid for each in run.ranks()}
        run.note_fault()
        for each in run.processes_of("h2"):
            if and_daemon or each.pid in ranks:
                each.kill()

    return act


def full_disk(seconds: float, at: int = STEP) -> Act:
    """The run's disk has no room for a checkpoint for a while; 0: until the job has ended."""

    def act(run: Run) -> None:
        run.wait_for(at)
        filler = run.run_dir.parent / "filler"
        filler.write_bytes(bytes(max(0, psutil.disk_usage(str(filler.parent)).free - (150 << 10))))
        run.note_fault()
        if seconds:
            time.sleep(seconds)
        else:
            run.wait_for_end()
        filler.unlink()

    return act


def read_only(run: Run) -> None:
    """Only checkpoints: the whole disk would take the metrics too."""
    run.wait_for(STEP)
    checkpoints = run.run_dir / "checkpoints"
    subprocess.run(["mount", "--bind", "-o", "ro", str(checkpoints), str(checkpoints)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(checkpoints)], check=True)
    run.note_fault()
    run.wait_for(SAVED + 5)
    subprocess.run(["umount", "-l", str(checkpoints)], check=True)


def gone(run: Run) -> None:
    run.wait_for(STEP)
    run.note_fault()
    shutil.rmtree(run.run_dir / "checkpoints")


def with_damage(damage: Callable[[Path], object]) -> Act:
    """All ranks are killed, and the newest checkpoint is damaged before the job begins again."""

    def act(run: Run) -> None:
        run.wait_for(SAVED + 5)
        run.note_fault()
        for each in run.ranks():
            each.kill()
        run.wait_for_end()
        damage(sorted((run.run_dir / "checkpoints").glob("step_" + "[0-9]" * 8))[-1])

    return act


def mix(checkpoint: Path) -> None:
    """The state of another step, with its entry in the manifest."""
    other = sorted(checkpoint.parent.glob("step_" + "[0-9]" * 8))[-2]
    own, theirs = (json.loads((each / "manifest.json").read_bytes()) for each in (checkpoint, other))
    own["files"]["state.json"] = theirs["files"]["state.json"]
    shutil.copy(other / "state.json", checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(own))


def damaged_shard(run: Run) -> None:
    run.wait_for(STEP)
    file = run.data / "shard_00003.h5"
    content = file.read_bytes()
    run.note_fault()
    with file.open("r+b") as stream:  # in place: the job has it open
        for offset in range(len(content) // 4, len(content), len(content) // 8):
            stream.seek(offset)
            stream.write(bytes([content[offset] ^ 1]))
    if run.ranks():
        threading.Thread(target=_repair_after, args=(run, file, content), daemon=True).start()


def _repair_after(run: Run, file: Path, content: bytes) -> None:
    run.wait_for_end()
    file.write_bytes(content)


def missing_shard(run: Run) -> None:
    run.wait_for_start()
    run.note_fault()
    file = run.data / "shard_00003.h5"
    file.rename(file.with_suffix(".away"))
    run.wait_for_end()
    file.with_suffix(".away").rename(file)


SKIP = {"data.on_corrupt": "skip"}
INT4 = {"compression.codec": "int4"}
SAVING = {"checkpoint.every": 10, "train.evaluate_every": 10}


def _deaths() -> list[Fault]:
    """kill -9 in each phase of a step, and of what follows steps."""
    phases = {
        "data": "data", "forward": "forward pass", "backward": "backward pass", "bucket": "message of the ring",
        "sums": "all gradients summed", "norm": "norm", "update": "optimizer",
    }  # fmt: skip
    rows = [Fault("kill -9 of a rank", phase, f"{place}:{STEP}:2") for place, phase in phases.items()]
    rows += [
        Fault("kill -9 of a rank", "coding of int4", f"codec:{STEP}:2", settings=INT4, changes_curve=True),
        Fault("kill -9 of rank 0", "forward pass", f"forward:{STEP}:0"),
        Fault("kill -9 of rank 0", "metrics", f"log:{STEP}:0"),
        Fault("kill -9 of rank 0", "validation", "validation:19:0", settings=SAVING),
        Fault("kill -9 of rank 0", "checkpoint", "saving:19:0", settings=SAVING),
        Fault("kill -9 of two ranks", "the second while the others recover", f"forward:{STEP}:2,recovery:{STEP}:3"),
        Fault("kill -9 of two ranks", "at once", act=signalled(signal.SIGKILL, (1, 3))),
        Fault("kill -9 of three ranks", "one after the other", f"forward:{STEP}:0,norm:17:1,update:19:3"),
    ]
    plans = {"forward pass": f"forward:{STEP}:2", "optimizer": f"update:{STEP}:2"}
    rows += [Fault("kill -9 of a rank", phase, plan, elastic=False, settings=SAVING) for phase, plan in plans.items()]
    rows += [
        Fault("kill -9 of rank 0", "checkpoint", "saving:19:0", elastic=False, settings=SAVING),
        Fault("kill -9 of rank 0", "validation", "validation:19:0", elastic=False, settings=SAVING),
    ]
    return rows


def _signals() -> list[Fault]:
    rows = [
        Fault(f"{signal.Signals(number).name} to a rank", "step", act=signalled(number), elastic=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    ]
    rows += [
        Fault("SIGTERM to a rank", "start", act=at_start, elastic=False),
        Fault("SIGINT twice to a rank", "step", act=twice, elastic=False, settings=SAVING),
        Fault("kill -9 of mpirun", "step", act=to_launcher(signal.SIGKILL), elastic=False),
        Fault("SIGTERM to mpirun", "step", act=to_launcher(signal.SIGTERM), elastic=False, settings=SAVING),
        Fault("a rank is suspended for 2 s", "step", act=suspended((1,), 2.0), elastic=False),
        Fault("all ranks are suspended for 12 s", "step", act=suspended((0, 1, 2, 3), 12.0), elastic=False),
        Fault("a rank is stopped for good", "step", act=signalled(signal.SIGSTOP), elastic=False, settings=SAVING),
        Fault("a rank is stuck", "forward pass", f"stuck:{STEP}:1", elastic=False, settings=SAVING),
        Fault("a rank is stuck", "forward pass", f"stuck:{STEP}:1"),
    ]
    return rows


def _hosts() -> list[Fault]:
    """Two hosts of two ranks each."""
    rows = []
    for elastic in (True, False):
        own: dict[str, object] = {"elastic": elastic, "hosts": 2, "settings": {} if elastic else SAVING}
        rows += [
            Fault("the link of a host is cut for 3 s, and healed", "step", act=link_cut(3.0), **own),
            Fault("kill -9 of all ranks of a host", "step", act=killed_on_host(False), **own),
            Fault("a host is gone, Open MPI's daemon too", "step", act=killed_on_host(True), **own),
        ]
    return rows


def _disks() -> list[Fault]:
    rows = [
        Fault("the disk is full for a second", "checkpoint", act=full_disk(1.0), elastic=False, settings=SAVING),
        Fault("the disk is full", "last checkpoint", act=full_disk(0.0, at=33), elastic=False, settings=SAVING),
        Fault("checkpoints are read-only", "checkpoint", act=read_only, elastic=False, settings=SAVING),
        Fault("checkpoints are removed", "step", act=gone, elastic=False, settings=SAVING),
        Fault(
            "a rank's quota is used up",
            "checkpoint",
            "quota:19:2",
            elastic=False,
            settings={**SAVING, **INT4},
            changes_curve=True,
        ),
    ]
    damages: dict[str, Callable[[Path], object]] = {
        "a bit flips": lambda path: flip_bit(path / "model.safetensors"),
        "a file is cut short": lambda path: os.truncate(path / "optimizer.safetensors", 100),
        "the manifest is gone": lambda path: (path / "manifest.json").unlink(),
        "two are mixed": mix,
        "`latest` is garbage": lambda path: path.with_name("latest").write_bytes(b"\xff\x00"),
    }
    for name, damage in damages.items():
        act = with_damage(damage)
        rows.append(Fault(f"all ranks are killed, and {name}", "checkpoint", act=act, elastic=False, settings=SAVING))
    return rows


def _numbers_and_data() -> list[Fault]:
    few: dict[str, object] = {"train.check_replicas_every": 5}
    healed, flipped = {**few, "train.heal_replicas": "true"}, f"flip:{STEP}:2"
    rows = [
        Fault("the clock jumps a day ahead", "step", f"clock_forward:{STEP}:0", elastic=False),
        Fault("the clock jumps a day back", "step", f"clock_backward:{STEP}:0", elastic=False),
        Fault("bits flip in a shard", "data", act=damaged_shard, elastic=False, settings=SAVING),
        Fault("a bit flips in a rank's moments", "optimizer", flipped, elastic=False, settings={**SAVING, **few}),
    ]
    changing = [
        Fault("the same, with `heal_replicas`", "optimizer", flipped, elastic=False, settings=healed),
        Fault("a gradient is infinite on one rank", "backward pass", f"infinite:{STEP}:2"),
        Fault("bits flip in a shard, with `skip`", "data", act=damaged_shard, elastic=False, settings=SKIP),
        Fault("a shard is gone, with `skip`", "data", act=missing_shard, elastic=False, settings=SKIP),
    ]
    return rows + [replace(each, changes_curve=True) for each in changing]


FAULTS = [*_deaths(), *_signals(), *_hosts(), *_disks(), *_numbers_and_data()]
