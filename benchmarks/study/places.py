"""Where the jobs of a study run, and the words by which they are started there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.setups import HANDED_ON, inside_first_host, mpirun, program
from hvdlm.cluster.fabric import network
from hvdlm.cluster.fabric.fabric import Fabric
from hvdlm.cluster.hostfile import read_hostfile
from hvdlm.comm.rate import parse_rate
from hvdlm.errors import HvdlmError
from study.plan import Study, Visit


class Places:
    """Brings up what a study needs once, and makes it fit each visit."""

    def __init__(self, study: Study, scratch: Path, fabric: Fabric | None) -> None:
        self._study, self._scratch, self._fabric = study, scratch, fabric

    def launcher(self, visit: Visit) -> list[str]:
        """The words before an absolute program that start the ranks of a visit. Raises HvdlmError where none can."""
        study = self._study
        if self._fabric is not None and visit.link is not None:
            return self._on_fabric(visit)
        if study.place == "hostfile":
            return self._on_hosts(visit)
        if study.place == "slurm":
            return self._in_allocation(visit)
        return [*mpirun(visit.ranks), "--oversubscribe"]

    def interface(self) -> str | None:
        """That all messages between hosts pass, if it is known."""
        return network.INTERFACE if self._fabric else None

    def burst_bytes(self, visit: Visit) -> int:
        """That a link which was idle carries at once before it keeps to its rate."""
        return network.burst_bytes(parse_rate(visit.link)) if self._fabric and visit.link else 0

    def machines(self, visit: Visit) -> int:
        """That share nothing but the network."""
        return 1 if self._study.place in ("local", "fabric") else -(-visit.ranks // self._study.ranks_per_host)

    def _on_fabric(self, visit: Visit) -> list[str]:
        assert self._fabric is not None and visit.link is not None
        hosts = -(-visit.ranks // self._study.ranks_per_host)
        names = [f"h{index}" for index in range(1, hosts + 1)]
        for name in names:
            self._fabric.link(name, visit.link)
        lines = (self._fabric.state / "hostfile").read_text(encoding="utf-8").splitlines()
        hostfile = self._fabric.state / f"hostfile-{hosts}"
        hostfile.write_text("\n".join(lines[:hosts]) + "\n", encoding="utf-8")
        launcher = [*mpirun(visit.ranks), "--hostfile", str(hostfile), *HANDED_ON]
        return [*inside_first_host(self._fabric.state), *launcher]

    def _on_hosts(self, visit: Visit) -> list[str]:
        each = self._study.ranks_per_host
        hosts = [host.name for host in read_hostfile(Path(self._study.hostfile))][: -(-visit.ranks // each)]
        if len(hosts) * each < visit.ranks:
            raise HvdlmError(f"{self._study.hostfile} has too few hosts for {visit.ranks} ranks, {each} on each")
        if self._study.launcher == "horovodrun":
            return [
                program("horovodrun", "install Horovod as README.md says"),
                "-np",
                str(visit.ranks),
                "-H",
                ",".join(f"{host}:{each}" for host in hosts),
            ]
        hostfile = self._scratch / f"hostfile-{visit.ranks}"
        hostfile.write_text("".join(f"{host} slots={each}\n" for host in hosts), encoding="utf-8")
        return [*mpirun(visit.ranks), "--hostfile", str(hostfile), *HANDED_ON]

    def _in_allocation(self, visit: Visit) -> list[str]:
        each = self._study.ranks_per_host
        hosts = -(-visit.ranks // each)
        if int(os.environ.get("SLURM_NNODES", "0")) < hosts:
            raise HvdlmError(
                f"{visit.ranks} ranks, {each} on each host, need {hosts} nodes, and this runs in an allocation of "
                f"{os.environ.get('SLURM_NNODES', 'none')}: start it inside salloc or sbatch with --nodes={hosts}"
            )
        if self._study.launcher == "srun":
            # srun has not taken over an allocation's --cpus-per-task since Slurm 22.05
            cpus = os.environ.get("SLURM_CPUS_PER_TASK", "1")
            each_host = [f"--nodes={hosts}", f"--ntasks={visit.ranks}", f"--ntasks-per-node={each}"]
            return [
                program("srun", "this needs Slurm"),
                *each_host,
                f"--cpus-per-task={cpus}",
                "--mpi=pmix",
                "--kill-on-bad-exit=1",
            ]
        return [*mpirun(visit.ranks), "--map-by", f"ppr:{each}:node"]


@contextmanager
def opened(study: Study, directory: Path) -> Iterator[Places]:
    """What a study needs, and takes down in the end. Raises HvdlmError where that cannot be had."""
    with tempfile.TemporaryDirectory(prefix="hvdlm-study-") as scratch:
        if study.place != "fabric":
            yield Places(study, Path(scratch), None)
            return
        fabric = Fabric(directory / "fabric")
        fabric.down()  # of this study, when it was killed
        fabric.up(-(-max(study.ranks) // study.ranks_per_host), study.ranks_per_host, study.links[0], slurm=False)
        try:
            yield Places(study, Path(scratch), fabric)
        finally:
            fabric.down()
