"""The token by which a server that is a process of its own knows its workers: a file in its run directory."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from hvdlm.config import ServerSection
from hvdlm.errors import HvdlmError, write_failure

VARIABLE = "HVDLM_SERVER_TOKEN"
FILE = "token"  # in the run directory
_BYTES = 32
_TOKEN = re.compile(rf"[0-9a-f]{{{2 * _BYTES}}}")


def make_token(run_dir: Path) -> str:
    """The token of a run directory, of which only its owner can read the file; a new one if there is none.

    So workers that knew it before the server was killed know it afterwards. Raises HvdlmError if it cannot be written.
    """
    path = run_dir / FILE
    try:
        path.touch(mode=0o600)
        path.chmod(0o600)
        token = path.read_text(encoding="ascii", errors="replace").strip()
        if not _TOKEN.fullmatch(token):
            token = secrets.token_hex(_BYTES)
            path.write_text(f"{token}\n", encoding="ascii")
    except OSError as error:
        raise HvdlmError(f"cannot write {path}: {write_failure(error)}") from None
    return token


def token_of_worker(settings: ServerSection, environment: Mapping[str, str]) -> str:
    """The token of the server whose worker this process is to be. Raises HvdlmError if it is not given."""
    file = settings.token_file
    if not file and not environment.get(VARIABLE):
        raise HvdlmError(
            f"server.address = {settings.address} needs the token of that server: set server.token_file to a copy of "
            f"the file {FILE} in its run directory, or {VARIABLE} in the environment to what the file holds"
        )
    where, token = (f"server.token_file = {file}", _read(Path(file))) if file else (VARIABLE, environment[VARIABLE])
    if not _TOKEN.fullmatch(token.strip()):
        raise HvdlmError(f"{where} is no token, which has {2 * _BYTES} hexadecimal digits")
    return token.strip()


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(2 * _BYTES + 2).decode("ascii", errors="replace")
    except OSError as error:
        raise HvdlmError(f"cannot read server.token_file = {file}: {error.strerror}") from None
