"""Horovod's source: downloads the release with pip, verifies it, unpacks it, and applies the patches."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from hvdlm.cluster.horovod_build.command import run_logged
from hvdlm.errors import HvdlmError

VERSION = "0.28.1"
ARCHIVE = f"horovod-{VERSION}.tar.gz"
ARCHIVE_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
PATCHES = tuple(sorted(Path(__file__).with_name("patches").glob("*.patch")))


def patches_sha256() -> str:
    """SHA-256 (hex) over all patches, in the order in which they are applied."""
    return hashlib.sha256(b"".join(patch.read_bytes() for patch in PATCHES)).hexdigest()


def fetch(cache: Path, work: Path, log: Path, environment: Mapping[str, str]) -> Path:
    """The path of the release's archive in `cache`; downloads it through `work` if it is missing or damaged.

    Raises HvdlmError if pip cannot download it or the download has another hash.
    """
    archive = cache / ARCHIVE
    if archive.exists() and _sha256(archive) == ARCHIVE_SHA256:
        return archive
    run_logged(
        f"fetching Horovod {VERSION} (where there is no network, put {ARCHIVE} into {cache})",
        [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary", "horovod"),
            *("--dest", str(work), f"horovod=={VERSION}"),
        ],
        log,
        environment,
    )
    fetched = work / ARCHIVE
    if not fetched.exists() or _sha256(fetched) != ARCHIVE_SHA256:
        raise HvdlmError(f"the package index gave another {ARCHIVE} than the one hvdlm patches (log: {log})")
    return Path(shutil.move(fetched, archive))


def unpack_and_patch(archive: Path, work: Path, log: Path) -> Path:
    """Unpacks the archive in `work` and patches it; returns the source tree. Raises HvdlmError if a patch fails."""
    shutil.unpack_archive(archive, work)
    source = work / ARCHIVE.removesuffix(".tar.gz")
    # If the cache is inside a git repository, `git apply` would skip the files and still succeed. These variables hide
    # that repository from git.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(work.resolve())
    for patch in PATCHES:
        task = f"applying {patch.name} to Horovod {VERSION}"
        run_logged(task, ["git", "apply", str(patch)], log, environment, source)
    return source


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
