"""What torch.compile needs of the directories in which it keeps what it has made, tried before training."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from hvdlm.errors import HvdlmError

logger = logging.getLogger(__name__)

_MIB = 2**20

# What the libraries of one model take at most, seen with those of the presets.
_SPACE = 8 * _MIB
# PyTorch's headers as g++ 12 precompiles them: 149 MiB, once for each set of the compiler's options.
_HEADER_SPACE = 512 * _MIB

_REMEDY = "name a directory where files can be written and executed in TORCHINDUCTOR_CACHE_DIR"


def check_compile_cache() -> Path:
    """The directory in which torch.compile keeps its libraries.

    Raises HvdlmError unless this process can write to it and execute what it has written.
    """
    directory = _cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, _SPACE)
    except OSError as error:
        raise HvdlmError(
            f"train.compile cannot write {_SPACE // _MIB} MiB to {directory} ({error.strerror}), where torch.compile "
            f"keeps its libraries: {_REMEDY}, or set train.compile = false"
        ) from None
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(mmap.PAGESIZE)
        try:
            mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC).close()
        except OSError as error:
            raise HvdlmError(
                f"train.compile cannot execute what it writes to {directory} ({error.strerror}), as on a file system "
                f"that is mounted noexec: {_REMEDY}, or set train.compile = false"
            ) from None
    return directory


def try_compiler(compiler: str, directory: Path) -> None:
    """Makes, loads and removes a library in `directory`. Raises HvdlmError if the compiler or the loader fails."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        source, library = Path(folder, "try.cpp"), Path(folder, "try.so")
        source.write_text('extern "C" int answer() { return 42; }\n', encoding="utf-8")
        words = [compiler, "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(library)]
        try:
            subprocess.run(words, capture_output=True, text=True, errors="replace", check=True)
            works = ctypes.CDLL(str(library)).answer() == 42
            reason = "its library does not work"
        except subprocess.CalledProcessError as error:
            works, reason = False, " ".join(error.stderr.split()[-40:]) or f"status {error.returncode}"
        except OSError as error:
            works, reason = False, str(error)
    if not works:
        raise HvdlmError(
            f"train.compile: {compiler} cannot make a library ({reason}): repair it, name another compiler in CXX, a "
            "directory with space for the compiler's own files in TMPDIR, or set train.compile = false"
        )


def avoid_precompiled_headers() -> None:
    """Lets torch.compile do without precompiled headers where they cannot be made; it takes some seconds longer then.

    They are not in TORCHINDUCTOR_CACHE_DIR, and need a program that may be missing.
    """
    import torch._inductor.config

    directory = _default_directory() / "precompiled_headers"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            is_usable = any(directory.glob("*.gch")) or shutil.disk_usage(directory).free >= _HEADER_SPACE
    except OSError:
        is_usable = False
    if not is_usable or shutil.which("openssl") is None:
        logger.debug("no precompiled headers: %s is not writable or full, or openssl is missing", directory)
        torch._inductor.config.cpp_cache_precompile_headers = False


def _cache_directory() -> Path:
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(named).absolute() if named else _default_directory()


def _default_directory() -> Path:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # a second, for those who compile

    try:
        return Path(default_cache_dir())
    except FileNotFoundError as error:  # of tempfile, which looks for a directory in which it can write
        raise HvdlmError(f"train.compile: {error.strerror}: name one in TMPDIR, or set train.compile = false") from None
