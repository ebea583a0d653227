"""The systems that are compared: how each is started, and where it logs its steps."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from common.processes import find_program, hvdlm_command, on_host
from common.setups import Cluster
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from recovery.step_lines import MetricsLines, RankLines
from recovery.trial import Job

_SCRIPTS = Path(__file__).parent

# mpirun names a rank to its process so
_RANK_OF_MPIRUN = {"OMPI_COMM_WORLD_RANK": "{rank}"}


def elastic(cluster: Cluster, config: Config, run_dir: Path) -> Job:
    """hvdlm in place, under mpirun --with-ft ulfm."""
    return _hvdlm(cluster, config, run_dir, is_elastic=True)


def restart(cluster: Cluster, config: Config, run_dir: Path) -> Job:
    """hvdlm, begun again from the newest checkpoint when the job has ended."""
    return _hvdlm(cluster, config, run_dir, is_elastic=False)


def _hvdlm(cluster: Cluster, config: Config, run_dir: Path, is_elastic: bool) -> Job:
    own = config.model_copy(update={"comm": config.comm.model_copy(update={"elastic": is_elastic})})
    tolerance = ["--with-ft", "ulfm"] if is_elastic else []
    words = ["train", str(_write_settings(own, run_dir)), "--train.run_dir", str(run_dir)]
    start = [*cluster.launcher, *tolerance, hvdlm_command(), *words]
    again = None if is_elastic else [*start, "--resume", "latest"]
    lines = MetricsLines(run_dir, config.train.global_batch_size)
    return Job(start, again, lines, str(run_dir), _RANK_OF_MPIRUN)


def horovod_elastic(cluster: Cluster, config: Config, run_dir: Path) -> Job:
    """Elastic Horovod on Gloo, under horovodrun."""
    ranks = cluster.setup.ranks
    hosts = _horovod_hosts(cluster)
    run_dir.mkdir()
    discovery = run_dir / "discover_hosts.sh"
    discovery.write_text("#!/bin/sh\n" + "".join(f"echo {host}:1\n" for host in hosts), encoding="utf-8")
    discovery.chmod(0o755)
    horovodrun = find_program("horovodrun", "run `hvdlm install-horovod`, or leave it out with --systems")
    on_first = on_host(cluster.fabric, hosts[0]) if cluster.fabric else []
    interface = ["--network-interface", cluster.interface] if cluster.interface else []
    options = ["-np", ranks, "--min-np", ranks - 1, "--max-np", ranks, "--host-discovery-script", discovery]
    script = [sys.executable, _SCRIPTS / "horovod_elastic.py", _write_settings(config, run_dir), run_dir]
    start = [*on_first, horovodrun, *interface, *map(str, options), *map(str, script)]
    return Job(start, None, RankLines(run_dir, ranks), str(run_dir), {"HOROVOD_RANK": "{rank}"})


def _horovod_hosts(cluster: Cluster) -> list[str]:
    """One host a rank: horovodrun gives up a host of which a rank has died, with all its other ranks.

    On one host each rank has another name of the loopback interface: 127.0.0.1, 127.0.0.01, 127.0.0.001, ...
    """
    if cluster.fabric:
        return _fabric_hosts(cluster)
    return [f"127.0.0.{'0' * rank}1" for rank in range(cluster.setup.ranks)]


def torchft(cluster: Cluster, config: Config, run_dir: Path) -> Job:
    """torchft on Gloo: a lighthouse, and a replica group of one rank under torchrun for each rank."""
    if importlib.util.find_spec("torchft") is None:
        raise HvdlmError('torchft is not installed: pip install -c constraints.txt -e ".[peers]", or use --systems')
    if config.train.global_batch_size % cluster.setup.ranks:
        raise HvdlmError(
            f"torchft weighs all replicas alike: give {cluster.setup.ranks} of them equal parts of a batch"
        )
    run_dir.mkdir()
    script = [_SCRIPTS / "torchft_launcher.py", _write_settings(config, run_dir), run_dir, cluster.setup.ranks]
    hosts = [cluster.fabric, *_fabric_hosts(cluster)] if cluster.fabric else []
    start = [sys.executable, *map(str, script), *map(str, hosts)]
    # torchrun has the first variable too, and gives RANK to its rank
    variables = {"REPLICA_GROUP_ID": "{rank}", "RANK": "0"}
    return Job(start, None, RankLines(run_dir, cluster.setup.ranks), str(run_dir), variables)


def _fabric_hosts(cluster: Cluster) -> list[str]:
    return [f"h{number}" for number in range(1, cluster.setup.ranks + 1)]


def _write_settings(config: Config, run_dir: Path) -> Path:
    own = config.model_copy(update={"train": config.train.model_copy(update={"run_dir": str(run_dir)})})
    path = run_dir.with_suffix(".toml")
    path.write_text(own.to_toml(), encoding="utf-8")
    return path


HVDLM = {"elastic": elastic, "restart": restart}
SYSTEMS: dict[str, Callable[[Cluster, Config, Path], Job]] = {
    **HVDLM,
    "horovod elastic": horovod_elastic,
    "torchft": torchft,
}
