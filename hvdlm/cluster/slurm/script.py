"""The batch script of a job, job.sh."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import hvdlm


class _BashTemplate(Template):
    """Replaces `%{name}` by a value and `%%` by a percent sign, so that `$` keeps its meaning in bash."""

    delimiter = "%"


_SCRIPT = _BashTemplate("""\
#!/bin/bash
# Trains on %{nodes} nodes with %{ranks_per_node} ranks each, and continues by itself after its time limit.
# Written on %{date} by hvdlm %{version}%{revision}, %{python}.
#
#   submit, or continue after a stop:   sbatch %{script}
#   save and stop, however long:        scancel --batch --signal=TERM JOB
#   save and stop, or be killed (30 s): scancel JOB

#SBATCH --job-name=%{name}
#SBATCH --nodes=%{nodes}
#SBATCH --ntasks-per-node=%{ranks_per_node}
%{gpus}#SBATCH --time=%{time}
# A requeued job keeps its number and appends to its log.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%{log}
# Sent this many seconds before the limit, or up to a minute earlier.
#SBATCH --signal=B:USR1@%{lead}
%{sbatch}
set -euo pipefail
trap '' USR1  # it may arrive at once; the supervisor asks Slurm for the time limit when it starts

job=%{directory}
python=%{python}
version=%{version}

fail() {
    echo "hvdlm: error: $1" >&2
    exit 1
}

# Where sbatch was called inside another job: its steps, its ranks, and the cores to which these were bound. Slurm sets
# none of this in a batch script.
unset ${!SLURM_STEP*} ${!SLURM_CPU_BIND*} ${!SLURM_MEM_BIND*} ${!PMI_*} PMIX_RANK PMIX_NAMESPACE
unset ${!PMIX_SERVER_*} PRTE_LAUNCHED ${!OMPI_COMM_WORLD_*} HOROVOD_RANK HOROVOD_SIZE ${!HOROVOD_GLOO_RENDEZVOUS_*}
unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT ${!TORCHELASTIC_*}

cd "$job" || fail "$(hostname) does not see $job: write the job into a directory that all nodes share"
installed=$("$python" -c 'import hvdlm; print(hvdlm.__version__)') ||
    fail "on $(hostname) there is no hvdlm at $python any more: install hvdlm $version there again"
[[ $installed == "$version" ]] ||
    fail "hvdlm $version wrote $job, but $python has hvdlm $installed now: install $version, or write the job again"

%{launch}

# A rank ignores SIGUSR1 until hvdlm is loaded; after that it saves and stops at the signal.
rank=(bash -c 'trap "" USR1; exec "$@"' rank)
train=("$python" -m hvdlm train "$job/config.toml" --resume latest)

# The supervisor counts starts, passes signals on to the ranks, requeues this job, and reports how training ended.
exec "$python" -m hvdlm.cluster.slurm.supervise --job-directory "$job" --lead %{lead} -- \\
    "${launch[@]}" "${rank[@]}" "${train[@]}"
""")

_LAUNCH = {
    "mpirun": """\
export PATH=%{path}:"$PATH"
%{launch_agent}
launch=(%{launcher} -np %{ranks}%{fault_tolerance} --bind-to none)""",
    "srun": """\
# Since Slurm 22.05 srun does not inherit sbatch's --cpus-per-task.
cores=(${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})
launch=(%{launcher} --mpi=pmix --kill-on-bad-exit=1 "${cores[@]}")""",
    "horovodrun": """\
export PATH=%{path}:"$PATH"
%{launch_agent}
# horovodrun starts ranks on the other nodes by ssh, which must work without a password.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
launch=(%{launcher} -np %{ranks} -H "$(IFS=,; echo "${hosts[*]/%%/:%{ranks_per_node}}")")""",
}

_LAUNCH_AGENT = """\
# Slurm runs mpirun's daemons on the other nodes as tasks, and sends them SIGTERM, at which they would kill their ranks.
export PRTE_MCA_prte_launch_agent="$python -m hvdlm.cluster.slurm.ignore_sigterm prted\""""


@dataclass(frozen=True)
class Script:
    """The values in a batch script."""

    name: str  # of the job in the queue
    directory: Path  # of the job, absolute
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    time: str  # limit of one start, in sbatch's notation
    lead: int  # seconds before the limit at which training saves and stops
    launcher: str  # "mpirun", "srun" or "horovodrun"
    executable: str  # the launcher's path
    elastic: bool  # ranks outlive one that dies; with launcher "mpirun"
    sbatch: Sequence[str]  # further options of sbatch, which uses the last of several values
    python: str
    revision: str  # of the git checkout that hvdlm runs from, or ""
    date: str

    @property
    def text(self) -> str:
        """The whole script."""
        values = {
            "name": _quoted(self.name),
            "directory": shlex.quote(str(self.directory)),
            "script": shlex.quote(str(self.directory / "job.sh")),
            "log": _quoted(str(self.directory).replace("%", "%%") + "/slurm-%j.out"),
            "nodes": self.nodes,
            "ranks_per_node": self.ranks_per_node,
            "ranks": self.nodes * self.ranks_per_node,
            "fault_tolerance": " --with-ft ulfm" if self.elastic else "",
            "gpus": f"#SBATCH --gpus-per-node={self.gpus_per_node}\n" if self.gpus_per_node else "",
            "time": self.time,
            "lead": self.lead,
            "sbatch": "".join(f"#SBATCH {option}\n" for option in self.sbatch),
            "python": shlex.quote(self.python),
            "path": shlex.quote(str(Path(self.executable).parent)),
            "launcher": shlex.quote(self.executable),
            "launch_agent": _LAUNCH_AGENT,
            "version": shlex.quote(hvdlm.__version__),
            "revision": f" (git revision {self.revision})" if self.revision else "",
            "date": self.date,
        }
        return _SCRIPT.substitute(values, launch=_BashTemplate(_LAUNCH[self.launcher]).substitute(values))


def _quoted(value: str) -> str:
    """A value quoted for an #SBATCH line, since it may have blanks."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
