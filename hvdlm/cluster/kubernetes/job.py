"""`hvdlm kubernetes`: checks the settings of a job, and writes the objects that start it."""

from __future__ import annotations

import posixpath
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from hvdlm.cluster.job_checks import check_gpus, check_size
from hvdlm.cluster.kubernetes.manifests import KINDS
from hvdlm.cluster.kubernetes.pods import HOME, HOSTFILE, SETTINGS, Pods, Volume
from hvdlm.config import Config
from hvdlm.config_reader import load, with_values
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS

# What Kubernetes takes: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/, RFC 1035 labels. The
# longest name of a pod or map that is made of it is 20 characters longer, and has at most 63.
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LONGEST_NAME = 40
_CLAIM = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([kMGTPE]|[KMGTPE]i)?")

# Where pods have something else
_TAKEN = (PurePosixPath("/dev/shm"), SETTINGS.parent, PurePosixPath(HOSTFILE).parent, PurePosixPath(HOME))


class _Yaml(yaml.SafeDumper):  # type: ignore[misc]
    """Texts of several lines as they stand, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _as_block(dumper: _Yaml, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Yaml.add_representer(str, _as_block)


def write_job(
    config: Path,
    overrides: Sequence[str],
    *,
    kind: str,
    name: str | None,
    pods: Mapping[str, Any],
    volumes: Sequence[str],
    restarts: int,
    output: Path | None,
    shape_of: Callable[[str], Mapping[str, Any]] | None = None,
) -> None:
    """Writes the job to `output`, or to stdout without one.

    Args:
        config, overrides, shape_of: as for `hvdlm.config_reader.load`.
        kind: of `manifests.KINDS`.
        name: of the job; None: made of the run directory's.
        pods: other fields of `Pods`.
        volumes: CLAIM:PATH each.
        restarts: how often mpirun is started again after it has failed.

    Raises HvdlmError for an error in the settings or the options; then nothing is written.
    """
    settings = load(config, overrides, PRESETS, shape_of)
    job = Pods(
        name=_checked_name(name, settings),
        volumes=tuple(_volume(text) for text in volumes),
        **{**pods, "bin": PurePosixPath(pods["bin"])},
    )
    _check(job, settings, restarts)
    # By these a job that comes up short is refused
    whole = with_values(settings, {"train": {"ranks": job.ranks, "nodes": job.nodes}}, PRESETS)
    objects = [job.settings_map(whole.to_toml()), *KINDS[kind](job, restarts)]
    text = yaml.dump_all(objects, Dumper=_Yaml, sort_keys=False, width=120)
    if output is None:
        print(text, end="")
        return
    try:
        if output.exists():
            raise HvdlmError(f"{output} exists: remove it, or choose another --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=output.parent, suffix=".yaml") as file:
            file.write(text)
            file.flush()
            Path(file.name).chmod(0o644)
            output.hardlink_to(file.name)
    except OSError as error:
        raise HvdlmError(f"cannot write {output}: {error.strerror}") from None
    start = f"kubectl apply -f {shlex.quote(str(output))}"
    print(f"wrote {output}: {job.nodes} x {job.ranks_per_node} ranks; start it: {start}")


def _checked_name(name: str | None, settings: Config) -> str:
    if name is None:
        name = (
            re.sub(r"[^a-z0-9]+", "-", Path(settings.train.run_dir).name.lower()).strip("-")[:_LONGEST_NAME].strip("-")
        )
        name = name if _NAME.fullmatch(name) else f"run-{name}".strip("-")
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise HvdlmError(
            f"--name {name!r}: give up to {_LONGEST_NAME} small letters, digits and -, the first a letter, the last "
            "no -"
        )
    return name


def _volume(text: str) -> Volume:
    claim, _, path = text.partition(":")
    place = PurePosixPath(posixpath.normpath(path))
    if not _CLAIM.fullmatch(claim) or not path.startswith("/") or place == PurePosixPath("/"):
        raise HvdlmError(f"--volume {text!r}: write CLAIM:PATH, a PersistentVolumeClaim and where pods are to see it")
    if any(place.is_relative_to(taken) or taken.is_relative_to(place) for taken in _TAKEN):
        raise HvdlmError(f"--volume {text!r}: pods have files of their own there: choose another path")
    return Volume(claim, place)


def _check(job: Pods, settings: Config, restarts: int) -> None:
    if min(job.nodes, job.ranks_per_node, job.cpus_per_rank) < 1 or restarts < 0:
        raise HvdlmError("--nodes, --ranks-per-node and --cpus-per-rank are 1 or more, --restarts is 0 or more")
    if job.memory and not _QUANTITY.fullmatch(job.memory):
        raise HvdlmError(f"--memory {job.memory!r}: write it as Kubernetes does, as 64Gi")
    if not job.image or not job.bin.is_absolute():
        raise HvdlmError("--image names an image, and --bin a directory in it, from its root on")
    if len({volume.path for volume in job.volumes}) < len(job.volumes):
        raise HvdlmError("--volume: two volumes are to be at one path: choose another for one of them")
    check_gpus(settings, job.gpus_per_rank)
    check_size(settings, job.nodes, job.ranks)
    if settings.comm.elastic:
        raise HvdlmError("comm.elastic: mpirun ends with a pod here, and is started again; leave it out")
    places = {
        "data.path": settings.data.path,
        "train.run_dir": settings.train.run_dir,
        "model.from": settings.model.from_,
    }
    for setting, path in places.items():
        place = PurePosixPath(posixpath.normpath(path))
        if path and not any(place.is_relative_to(volume.path) for volume in job.volumes):
            known = ", ".join(str(volume.path) for volume in job.volumes) or "none"
            raise HvdlmError(
                f"{setting} = {path!r} is on no volume ({known}), and what pods write elsewhere is lost with them: add "
                "--volume CLAIM:PATH, or set it to a path below one"
            )
