"""Pods for tests, on the hosts of an emulated cluster: the file system of an image, and what operators put there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import Cluster

CHECKOUT = Path(__file__).parents[2]
CONTAINERFILE = CHECKOUT / "examples/kubernetes/Containerfile"
HOME = "/home/hvdlm"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as an image of Debian has it

# What pods see of this machine where its root file system has another one mounted
_PLACES = dict.fromkeys([str(CHECKOUT), sys.prefix, sys.base_prefix])

_IN_A_ROOT = """
set -euo pipefail
mkdir -p {here}/upper {here}/work {here}/root
mount -t overlay overlay -o lowerdir={lower},upperdir={here}/upper,workdir={here}/work {here}/root
cd {here}/root
mount --rbind /dev dev
mount --rbind /proc proc
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs -o mode=1777 tmpfs tmp
chmod 755 root
for place in {places}; do mkdir -p ".$place"; mount --rbind "$place" ".$place"; done
"""


def steps() -> list[tuple[str, str]]:
    """The instructions of the Containerfile, each with what follows it."""
    text = re.sub(r"^\\s*#.*\\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


class Image:
    """A file system over this machine's own, made by steps of the Containerfile, a layer each."""

    def __init__(self, disk: Path, leave_out: Sequence[str] = ()) -> None:
        """`disk`: a directory on a file system of its own. `leave_out`: steps whose text has one of these words."""
        self.disk = disk
        self._layers: list[Path] = []  # the last one first
        for instruction, text in steps():
            if not any(word in text for word in leave_out):
                if instruction == "COPY":
                    self._copy(*(word for word in shlex.split(text) if not word.startswith("--")))
                elif instruction == "RUN":
                    self.run(text)

    def _new_layer(self) -> Path:
        layer = self.disk / f"layer{len(self._layers)}"
        self._layers.insert(0, layer / "upper")
        (layer / "upper").mkdir(parents=True)
        return layer

    def _copy(self, *words: str) -> None:
        *sources, target = words
        there = self._new_layer() / "upper" / target.lstrip("/")
        if target.endswith("/"):
            there.mkdir(parents=True)
        there.parent.mkdir(parents=True, exist_ok=True)
        for source in sources:
            whole = CHECKOUT / source
            if whole.is_dir():
                shutil.copytree(whole, there, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(whole, there)

    def run(self, text: str) -> None:
        """What a shell's command changes is a layer, too."""
        lower = self._lower()
        script = _in_a_root(self._new_layer(), lower) + f"exec chroot . /bin/sh -c {shlex.quote(text)}"
        words = ["unshare", "--mount", "--propagation", "private", "bash", "-c", script]
        subprocess.run(words, env={**os.environ, "PATH": _PATH}, check=True, cwd="/")

    def _lower(self) -> str:
        return ":".join([*map(str, self._layers), "/"])

    def pod(
        self, cluster: Cluster, host: str, name: str, files: Path, volume: Path, command: Sequence[str]
    ) -> list[str]:
        """The command that runs another in a pod on a host, as user 1000, until that ends.

        `files`: what the operator mounts, by its place. `volume`: what all pods see as /shared.
        """
        here = self.disk / "pods" / name
        script = _in_a_root(here, self._lower()) + (
            f"cp -r {files}/. .\nmkdir -p shared\nmount --bind {volume} shared\nhostname {name}\n"
            f"exec chroot --userspec=1000:1000 --groups=1000 . /usr/bin/env -i HOME={HOME} PATH=/usr/bin:/bin "
            f"LANG=C.UTF-8 {shlex.join(command)}"
        )
        return cluster.inside(host, ["unshare", "--mount", "--uts", "--propagation", "private", "bash", "-c", script])


def _in_a_root(here: Path, lower: str) -> str:
    places = " ".join(map(shlex.quote, _PLACES))
    return _IN_A_ROOT.format(here=here, lower=lower, places=places)
