"""`hvdlm install-horovod`, `hvdlm wheelhouse`, `hvdlm doctor`, `hvdlm slurm`, `hvdlm kubernetes` and `hvdlm fabric`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping
from typing import Any

from hvdlm.arguments import path, seconds
from hvdlm.cli.shared import add_command_with_settings, add_config, add_engine


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands for machines and clusters."""
    install = commands.add_parser("install-horovod", help="build Horovod for this PyTorch and MPI, install and test it")
    install.add_argument("--dry-run", action="store_true", help="print the plan; build nothing")
    install.set_defaults(run=_install_horovod)

    wheelhouse = commands.add_parser(
        "wheelhouse", help="gather what a machine without a network needs to install hvdlm"
    )
    wheelhouse.add_argument("folder", type=path, metavar="DIR", help="made by this")
    wheelhouse.add_argument(
        "--python",
        default=".".join(map(str, sys.version_info[:2])),
        metavar="VERSION",
        help="of that machine, as 3.12 (default: %(default)s)",
    )
    wheelhouse.add_argument(
        "--machine", default=platform.machine(), choices=["x86_64", "aarch64"], help="default: %(default)s"
    )
    wheelhouse.add_argument(
        "--have", nargs="+", default=[], metavar="PACKAGE", help="what it has, with all that these need, as torch"
    )
    wheelhouse.add_argument(
        "--extra", action="append", default=[], metavar="EXTRA", help="of hvdlm, as test; may be given several times"
    )
    wheelhouse.set_defaults(run=_wheelhouse)

    doctor = commands.add_parser("doctor", help="say whether this machine, these ranks or these hosts can train")
    doctor.add_argument(
        "--hostfile", type=path, metavar="FILE", help="check this host list and every host on it, by ssh, from here"
    )
    add_engine(doctor)
    doctor.add_argument("--timeout", type=seconds, default=20.0, metavar="SECONDS", help="for each wait (default: 20)")
    doctor.set_defaults(run=_doctor)

    slurm = add_command_with_settings(
        commands, "slurm", help="write a Slurm job that trains, and goes on by itself after its time limit"
    )
    add_config(slurm, "; the job keeps a copy")
    slurm.add_argument("--nodes", type=int, required=True, metavar="N")
    slurm.add_argument("--ranks-per-node", type=int, required=True, metavar="R")
    slurm.add_argument("--gpus-per-rank", type=int, default=0, metavar="G", help="default: 0, for training on CPUs")
    slurm.add_argument("--time", default="4:00:00", metavar="LIMIT", help="as sbatch takes it (default: 4:00:00)")
    slurm.add_argument("--launcher", default="mpirun", choices=["mpirun", "srun", "horovodrun"])
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help='more for sbatch, as in "--partition=gpu"'
    )
    slurm.add_argument("--output", type=path, metavar="DIR", help="the job's directory (default: RUN_DIR.slurm)")
    slurm.add_argument("--submit", action="store_true", help="submit it too")
    slurm.set_defaults(run=_slurm)

    kubernetes = add_command_with_settings(
        commands, "kubernetes", help="write a job for the MPI Operator or Kubeflow Trainer"
    )
    add_config(kubernetes, "; the job holds a copy")
    kubernetes.add_argument("--image", required=True, help="of examples/kubernetes/Containerfile, or like it")
    kubernetes.add_argument("--nodes", type=int, required=True, metavar="N", help="pods with ranks")
    kubernetes.add_argument("--ranks-per-node", type=int, required=True, metavar="R")
    kubernetes.add_argument("--gpus-per-rank", type=int, default=0, metavar="G", help="default: 0")
    kubernetes.add_argument("--cpus-per-rank", type=int, default=1, metavar="C", help="default: 1")
    kubernetes.add_argument("--memory", default="", metavar="SIZE", help="of a pod, as 64Gi (default: no limit)")
    kubernetes.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="CLAIM:PATH",
        help="a PersistentVolumeClaim that all pods see at PATH, for data and runs",
    )
    kubernetes.add_argument("--kind", default="mpijob", choices=["mpijob", "trainjob"], help="default: mpijob")
    kubernetes.add_argument("--name", help="default: made of the run directory's name")
    kubernetes.add_argument("--restarts", type=int, default=3, metavar="K", help="after failures (default: 3)")
    kubernetes.add_argument(
        "--bin",
        default="/opt/hvdlm/.venv/bin",
        metavar="DIR",
        help="where the image has mpirun and hvdlm (default: %(default)s)",
    )
    kubernetes.add_argument("--output", type=path, metavar="FILE", help="default: stdout")
    kubernetes.set_defaults(run=_kubernetes)

    fabric = commands.add_parser("fabric", help="an emulated cluster on this machine, for tests")
    fabric.add_argument(
        "--state",
        type=path,
        metavar="DIR",
        help="its directory (default: HVDLM_FABRIC, or /var/lib/hvdlm/fabric)",
    )
    actions = fabric.add_subparsers(dest="action", metavar="ACTION", required=True)
    up = actions.add_parser("up", help="start hosts h1, h2, ...")
    up.add_argument("--hosts", type=int, required=True, metavar="N")
    up.add_argument("--slots", type=int, default=2, metavar="S", help="ranks a host (default: 2)")
    up.add_argument("--rate", metavar="RATE", help="of each host's link, as 100mbit or 1gbit (default: unlimited)")
    up.add_argument("--slurm", action="store_true", help="with Slurm: munge, slurmctld on h1, slurmd on every host")
    run = actions.add_parser("run", help="run a program inside a host")
    run.add_argument("host", metavar="HOST")
    run.add_argument("program", nargs="+", metavar="-- PROGRAM", help="and its arguments")
    link = actions.add_parser("link", help="cut, heal or reshape a host's link, while jobs run")
    link.add_argument("host", metavar="HOST")
    link.add_argument("change", metavar="down|up|RATE")
    actions.add_parser("status", help="print hosts, addresses, links and processes")
    actions.add_parser("down", help="end every process of the hosts and remove them")
    fabric.set_defaults(run=_fabric)


def _install_horovod(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.cluster.horovod_build.build import install

    install(dry_run=options.dry_run)
    return 0


def _wheelhouse(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.cluster.wheelhouse import gather

    gather(options.folder, options.python, options.machine, options.have, options.extra)
    return 0


def _doctor(options: argparse.Namespace, _: list[str]) -> int:
    if options.hostfile:
        from hvdlm.cluster.doctor.examine_hosts import examine_hosts

        return examine_hosts(options.hostfile, options.timeout)
    from hvdlm.cluster.doctor.examine_ranks import examine_ranks

    return examine_ranks(options.engine, options.timeout)


def _slurm(options: argparse.Namespace, overrides: list[str]) -> int:
    from hvdlm.cluster.slurm.job import write_job

    write_job(
        options.config,
        overrides,
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node,
        gpus_per_rank=options.gpus_per_rank,
        time=options.time,
        launcher=options.launcher,
        sbatch=options.sbatch,
        output=options.output,
        submit=options.submit,
        shape_of=_shape_of,
    )
    return 0


def _kubernetes(options: argparse.Namespace, overrides: list[str]) -> int:
    from hvdlm.cluster.kubernetes.job import write_job

    of_pods = ("image", "bin", "nodes", "ranks_per_node", "gpus_per_rank", "cpus_per_rank", "memory")
    write_job(
        options.config,
        overrides,
        kind=options.kind,
        name=options.name,
        pods={name: getattr(options, name) for name in of_pods},
        volumes=options.volume,
        restarts=options.restarts,
        output=options.output,
        shape_of=_shape_of,
    )
    return 0


def _shape_of(checkpoint: str) -> Mapping[str, Any]:
    from hvdlm.training.initial_weights import shape_of

    return shape_of(checkpoint)


def _fabric(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.cluster.fabric.fabric import Fabric

    fabric = Fabric(options.state)
    if options.action == "up":
        fabric.up(options.hosts, options.slots, options.rate, slurm=options.slurm)
    elif options.action == "run":
        return fabric.run(options.host, options.program)
    elif options.action == "link":
        fabric.link(options.host, options.change)
    elif options.action == "status":
        fabric.print_status()
    else:
        fabric.down()
    return 0
