"""Runs the job of one repetition, and adds what it measured to the points of its codecs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from common.conditions import describe_settings
from common.processes import cause_of_failure, end_launcher, start_launcher
from hvdlm.comm.rate import parse_rate
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.scaling.point import SUFFIX, Machine, Place, Point, read_point, write_record
from scaling.study import JobSpec, Mode, Study, make_config, measured_steps, without_directory
from scaling.study_hosts import StudyHosts

_WORKER = Path(__file__).with_name("study_worker.py")


class JobFailedError(Exception):
    """A job ended without a result; the message is the cause."""


def check_point(study: Study, mode: Mode, spec: JobSpec, codec: str, directory: Path) -> None:
    """Raises HvdlmError for settings that do not fit, or if the point was measured with other settings before."""
    config = make_config(study, spec, codec, mode)
    settings = _settings(config)
    file = directory / _file(spec, codec)
    if not file.exists():
        return
    earlier = read_point(file)
    wanted = (study.simulated_tokens_per_second or None, measured_steps(study, config))
    measured = (earlier.simulated_tokens_per_second, len(earlier.repetitions[0].step_seconds[0]))
    if earlier.settings != settings or measured != wanted:
        raise HvdlmError(
            f"{file} was measured with other settings than study {study.name} has now: give the study another name, "
            "or delete its directory"
        )


def missing_codecs(study: Study, spec: JobSpec, repetition: int, directory: Path) -> list[str]:
    """The codecs of a job whose points lack this repetition, in the order in which they are measured.

    The order rotates: the first codec finds cold caches.
    """
    codecs = study.codecs
    shift = repetition % len(codecs)
    order = [*codecs[shift:], *codecs[:shift]]
    return [codec for codec in order if _count_repetitions(directory / _file(spec, codec)) <= repetition]


def measure(study: Study, mode: Mode, spec: JobSpec, codecs: Sequence[str], hosts: StudyHosts, directory: Path) -> None:
    """Measures `codecs` in one job, and writes their points. Raises JobFailedError.

    The output of a job is in logs/ below `directory`, which all hosts must see; a later repetition replaces it.
    """
    configs = {codec: make_config(study, spec, codec, mode) for codec in codecs}
    logs = directory / "logs"
    logs.mkdir(exist_ok=True)
    task, output, log = logs / "task.json", logs / "result.json", logs / f"{spec.name}.log"
    output.unlink(missing_ok=True)
    task.write_text(
        json.dumps(
            {
                "configs": {codec: config.model_dump() for codec, config in configs.items()},
                "steps": {codec: measured_steps(study, config) for codec, config in configs.items()},
                "warmup_steps": study.warmup_steps,
                "simulated_tokens_per_second": study.simulated_tokens_per_second,
                "ranks_per_machine": -(-spec.ranks // hosts.machines(spec)),
                "output": str(output),
            }
        ),
        encoding="utf-8",
    )
    launcher = hosts.launcher(spec)
    _run_job([*launcher, sys.executable, str(_WORKER), str(task)], log, study.time_limit)
    if not output.exists():
        raise JobFailedError(cause_of_failure(log))
    result = json.loads(output.read_text(encoding="utf-8"))
    place = _place(study, spec, hosts, launcher, result)
    for codec, config in configs.items():
        file = directory / _file(spec, codec)
        measured = result["codecs"][codec]
        point = {
            "study": study.name,
            "mode": mode,
            "date": time.strftime("%Y-%m-%d"),
            "revision": revision(),
            "versions": result["versions"],
            "machine": Machine(**result["machine"], machines=hosts.machines(spec)),
            "place": place,
            "engine": result["engine"],
            "algorithm": config.comm.algorithm,
            "channels": measured["channels"],
            "codec": without_directory(codec),
            "settings": _settings(config),
            "seed": config.train.seed,
            "vocab_size": result["vocab_size"],
            "tokens_per_step": config.train.global_batch_size * config.model.context_length,
            "simulated_tokens_per_second": study.simulated_tokens_per_second or None,
            "buckets": measured["buckets"],
            "repetitions": [*(read_point(file).repetitions if file.exists() else []), measured["repetition"]],
        }
        write_record(file, Point.model_validate(point))


def revision() -> str:
    """The git revision, with + if files differ from it; without git the version of hvdlm."""
    git = ["git", "-C", str(_WORKER.parent)]
    said = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if said.returncode:
        return metadata.version("hvdlm")
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return said.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _place(study: Study, spec: JobSpec, hosts: StudyHosts, launcher: Sequence[str], result: dict[str, Any]) -> Place:
    crosses_link = len(set(result["hosts"])) > 1 and spec.link is not None
    # Absolute paths belong to this machine only: programs and files are shown by name
    command = [*launcher, "python", "benchmarks/scaling/study_worker.py", "TASK"]
    return Place(
        kind=study.place,
        ranks=spec.ranks,
        hosts=result["hosts"],
        ranks_per_host=spec.ranks if study.place == "local" else study.ranks_per_host,
        link_bits_per_second=float(parse_rate(spec.link)) if crosses_link and spec.link else None,
        link_burst_bytes=hosts.burst_bytes(spec) if crosses_link else 0,
        interface=hosts.interface(),
        launcher=" ".join(Path(word).name if word.startswith("/") else word for word in command),
        environment=result["environment"],
    )


def _file(spec: JobSpec, codec: str) -> str:
    return spec.point_name(codec) + SUFFIX


def _settings(config: Config) -> dict[str, Any]:
    settings = describe_settings(config)
    settings["compression"]["codec"] = Path(config.compression.codec).name
    return settings


def _count_repetitions(file: Path) -> int:
    return len(read_point(file).repetitions) if file.exists() else 0


def _run_job(command: Sequence[str], log: Path, time_limit: float) -> None:
    """Runs a job to its end. Ends its launcher, and with it its ranks, after the time limit, or if this is stopped."""
    with log.open("wb") as file:
        launcher = start_launcher(command, file)
    try:
        status = launcher.wait(time_limit)
    except subprocess.TimeoutExpired:
        end_launcher(launcher)
        raise JobFailedError(f"it did not end within {time_limit:g} s; {cause_of_failure(log)}") from None
    except BaseException:
        end_launcher(launcher)
        raise
    if status:
        raise JobFailedError(f"exit status {status}: {cause_of_failure(log)}")
