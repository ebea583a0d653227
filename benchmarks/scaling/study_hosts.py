"""The hosts on which the jobs of a study run, and the commands that start ranks there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.processes import FORWARDED_VARIABLES, find_program, mpirun, on_host
from hvdlm.cluster.fabric import network
from hvdlm.cluster.fabric.fabric import Fabric
from hvdlm.cluster.hostfile import read_hostfile
from hvdlm.comm.rate import parse_rate
from hvdlm.errors import HvdlmError
from scaling.study import JobSpec, Study


class StudyHosts:
    """The hosts of a study: this machine, a fabric, a host list or a Slurm allocation."""

    def __init__(self, study: Study, scratch: Path, fabric: Fabric | None) -> None:
        self._study, self._scratch, self._fabric = study, scratch, fabric

    def launcher(self, spec: JobSpec) -> list[str]:
        """The command that starts a job's ranks, without a program. Raises HvdlmError if there are too few hosts."""
        study = self._study
        if self._fabric is not None and spec.link is not None:
            return self._on_fabric(spec)
        if study.place == "hostfile":
            return self._on_hosts(spec)
        if study.place == "slurm":
            return self._in_allocation(spec)
        return [*mpirun(spec.ranks), "--oversubscribe"]

    def interface(self) -> str | None:
        """The network interface that carries all messages between hosts, if it is known."""
        return network.INTERFACE if self._fabric else None

    def burst_bytes(self, spec: JobSpec) -> int:
        """Bytes that a link carries at once, above its rate, after it was idle."""
        return network.burst_bytes(parse_rate(spec.link)) if self._fabric and spec.link else 0

    def machines(self, spec: JobSpec) -> int:
        """How many machines the job's ranks use; emulated hosts are one machine."""
        return 1 if self._study.place in ("local", "fabric") else -(-spec.ranks // self._study.ranks_per_host)

    def _on_fabric(self, spec: JobSpec) -> list[str]:
        assert self._fabric is not None and spec.link is not None
        hosts = -(-spec.ranks // self._study.ranks_per_host)
        names = [f"h{index}" for index in range(1, hosts + 1)]
        for name in names:
            self._fabric.link(name, spec.link)
        lines = (self._fabric.state / "hostfile").read_text(encoding="utf-8").splitlines()
        hostfile = self._fabric.state / f"hostfile-{hosts}"
        hostfile.write_text("\n".join(lines[:hosts]) + "\n", encoding="utf-8")
        launcher = [*mpirun(spec.ranks), "--hostfile", str(hostfile), *FORWARDED_VARIABLES]
        return [*on_host(self._fabric.state, "h1"), *launcher]

    def _on_hosts(self, spec: JobSpec) -> list[str]:
        each = self._study.ranks_per_host
        hosts = [host.name for host in read_hostfile(Path(self._study.hostfile))][: -(-spec.ranks // each)]
        if len(hosts) * each < spec.ranks:
            raise HvdlmError(f"{self._study.hostfile} has too few hosts for {spec.ranks} ranks, {each} on each")
        if self._study.launcher == "horovodrun":
            return [
                find_program("horovodrun", "run `hvdlm install-horovod`"),
                "-np",
                str(spec.ranks),
                "-H",
                ",".join(f"{host}:{each}" for host in hosts),
            ]
        hostfile = self._scratch / f"hostfile-{spec.ranks}"
        hostfile.write_text("".join(f"{host} slots={each}\n" for host in hosts), encoding="utf-8")
        return [*mpirun(spec.ranks), "--hostfile", str(hostfile), *FORWARDED_VARIABLES]

    def _in_allocation(self, spec: JobSpec) -> list[str]:
        each = self._study.ranks_per_host
        hosts = -(-spec.ranks // each)
        if int(os.environ.get("SLURM_NNODES", "0")) < hosts:
            raise HvdlmError(
                f"{spec.ranks} ranks, {each} on each host, need {hosts} nodes, and this runs in an allocation of "
                f"{os.environ.get('SLURM_NNODES', 'none')}: start it inside salloc or sbatch with --nodes={hosts}"
            )
        if self._study.launcher == "srun":
            # Since Slurm 22.05 srun ignores the --cpus-per-task of an allocation
            cpus = os.environ.get("SLURM_CPUS_PER_TASK", "1")
            each_host = [f"--nodes={hosts}", f"--ntasks={spec.ranks}", f"--ntasks-per-node={each}"]
            return [
                find_program("srun", "install Slurm, or set launcher = 'mpirun'"),
                *each_host,
                f"--cpus-per-task={cpus}",
                "--mpi=pmix",
                "--kill-on-bad-exit=1",
            ]
        return [*mpirun(spec.ranks), "--map-by", f"ppr:{each}:node"]


@contextmanager
def open_hosts(study: Study, directory: Path) -> Iterator[StudyHosts]:
    """Starts the emulated hosts of a study, if it needs any, and removes them afterwards.

    `directory`: of the study's points, where the fabric keeps its state. Raises HvdlmError if hosts cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="hvdlm-study-") as scratch:
        if study.place != "fabric":
            yield StudyHosts(study, Path(scratch), None)
            return
        fabric = Fabric(directory / "fabric")
        fabric.down()  # the hosts that an earlier, killed process of this study left behind
        fabric.up(-(-max(study.ranks) // study.ranks_per_host), study.ranks_per_host, study.links[0], slurm=False)
        try:
            yield StudyHosts(study, Path(scratch), fabric)
        finally:
            fabric.down()
