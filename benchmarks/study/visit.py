"""One visit of a study: starts its job, waits for it, and adds what it measured to the points it belongs to."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from common.setups import environment
from hvdlm.comm.rate import parse_rate
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.scaling.point import SUFFIX, Machine, Place, Point, read_point, write_record
from study.places import Places
from study.plan import Mode, Study, Visit, configuration

_RANK = Path(__file__).with_name("rank.py")
_END_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1  # prctl(2)


class VisitError(Exception):
    """A job has come to nothing; says why."""


def check_points(study: Study, mode: Mode, visit: Visit, codec: str, directory: Path) -> None:
    """Raises HvdlmError where settings do not fit, or a point is there that was measured with others."""
    settings = _settings(configuration(study, visit, codec, mode), codec)
    file = directory / _file(visit, codec)
    if not file.exists():
        return
    earlier = read_point(file)
    asked = (study.simulated_tokens_per_second or None, study.steps)
    if earlier.settings != settings or (earlier.simulated_tokens_per_second, _steps(earlier)) != asked:
        raise HvdlmError(
            f"{file} was measured with other settings than study {study.name} has now: give the study another name, "
            "or delete its directory"
        )


def missing(study: Study, visit: Visit, repetition: int, directory: Path) -> list[str]:
    """The codecs of a visit whose points lack this repetition, in the order of their turns."""
    codecs = study.codecs
    shift = repetition % len(codecs)  # who comes first, when all is cold, changes
    order = [*codecs[shift:], *codecs[:shift]]
    return [codec for codec in order if _repetitions(directory / _file(visit, codec)) <= repetition]


def measure(study: Study, mode: Mode, visit: Visit, codecs: Sequence[str], places: Places, directory: Path) -> None:
    """Lets `codecs` take their turns in one job, and writes their points. Raises VisitError.

    What the job says is in logs/ below `directory`, of each visit the last.
    """
    configs = {codec: configuration(study, visit, codec, mode) for codec in codecs}
    logs = directory / "logs"  # which all hosts see, as they see the points
    logs.mkdir(exist_ok=True)
    task, output, log = logs / "task.json", logs / "result.json", logs / f"{visit.name}.log"
    output.unlink(missing_ok=True)
    task.write_text(
        json.dumps(
            {
                "configs": {codec: config.model_dump() for codec, config in configs.items()},
                "steps": study.steps,
                "warmup_steps": study.warmup_steps,
                "simulated_tokens_per_second": study.simulated_tokens_per_second,
                "ranks_per_machine": -(-visit.ranks // places.machines(visit)),
                "output": str(output),
            }
        ),
        encoding="utf-8",
    )
    launcher = places.launcher(visit)
    _run([*launcher, sys.executable, str(_RANK), str(task)], log, study.patience)
    if not output.exists():
        raise VisitError(_last_words(log))
    result = json.loads(output.read_text(encoding="utf-8"))
    passes_link = len(set(result["hosts"])) > 1 and visit.link is not None
    place = Place(
        kind=study.place,
        ranks=visit.ranks,
        hosts=result["hosts"],
        ranks_per_host=visit.ranks if study.place == "local" else study.ranks_per_host,
        link_bits_per_second=float(parse_rate(visit.link)) if passes_link and visit.link else None,
        link_burst_bytes=places.burst_bytes(visit) if passes_link else 0,
        interface=places.interface(),
        launcher=_shown([*launcher, "python", "benchmarks/study/rank.py", "TASK"]),
        environment=result["environment"],
    )
    for codec, config in configs.items():
        turn = result["turns"][codec]
        file = directory / _file(visit, codec)
        earlier = read_point(file).repetitions if file.exists() else []
        point = {
            "study": study.name,
            "mode": mode,
            "date": time.strftime("%Y-%m-%d"),
            "revision": revision(),
            "versions": result["versions"],
            "machine": Machine(**result["machine"], machines=places.machines(visit)),
            "place": place,
            "engine": result["engine"],
            "algorithm": config.comm.algorithm,
            "lanes": turn["lanes"],
            "codec": Path(codec).name,
            "settings": _settings(config, codec),
            "seed": config.train.seed,
            "vocab_size": result["vocab_size"],
            "tokens_per_step": config.train.batch_size * config.model.context_length,
            "simulated_tokens_per_second": study.simulated_tokens_per_second or None,
            "buckets": turn["buckets"],
            "repetitions": [*earlier, turn["repetition"]],
        }
        write_record(file, Point.model_validate(point))


def revision() -> str:
    """Of git, with + if files differ from it; of the package where there is no git."""
    git = ["git", "-C", str(_RANK.parent)]
    said = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if said.returncode:
        return metadata.version("hvdlm")
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return said.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _file(visit: Visit, codec: str) -> str:
    return visit.point_name(codec) + SUFFIX


def _settings(config: Config, codec: str) -> dict[str, Any]:
    """Without paths, which say where and not what."""
    settings = config.model_dump(mode="json", exclude={"data": {"path"}, "train": {"run_dir"}})
    settings["compression"]["codec"] = Path(codec).name
    return settings


def _steps(point: Point) -> int:
    """Of a repetition."""
    return len(point.repetitions[0].step_seconds[0])


def _repetitions(file: Path) -> int:
    return len(read_point(file).repetitions) if file.exists() else 0


def _run(command: Sequence[str], log: Path, patience: float) -> None:
    """Ends the job's launcher, and with it its ranks, if it takes too long or this process is to end."""
    with log.open("wb") as file:
        launcher = subprocess.Popen(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is for the study, which ends its job
            preexec_fn=_end_with_parent,
        )
    try:
        status = launcher.wait(patience)
    except subprocess.TimeoutExpired:
        _end(launcher)
        raise VisitError(f"no end after {patience:g} s; {_last_words(log)}") from None
    except BaseException:
        _end(launcher)
        raise
    if status:
        raise VisitError(f"exit status {status}: {_last_words(log)}")


def _end_with_parent() -> None:
    """A study that is killed leaves no job behind to disturb the next one's."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(launcher: subprocess.Popen[bytes]) -> None:
    launcher.terminate()
    try:
        launcher.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["the job said nothing"])[-1]


def _shown(words: Sequence[str]) -> str:
    """A command without what is only of this machine: programs by name, files of a study by what they are."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in words)


def check_data(study: Study) -> None:
    """Raises HvdlmError where there is no data set."""
    if not Path(study.data, "manifest.json").exists():
        raise HvdlmError(f"study {study.name}: {study.data} is no data set: make one with `hvdlm prepare`")
