"""Files of what each rank has of its own, while a checkpoint is written.

Ranks that see the directory of the checkpoint write their own files, all at once, each beside an entry that tells its
size and hash, or why it could not be written. Where hosts do not share it, rank 0 receives what the others have and
writes for them, one rank at a time.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import RunningTime
from hvdlm.comm.rank_errors import on_rank_0
from hvdlm.data.staging import make_durable
from hvdlm.errors import HvdlmError
from hvdlm.strategies.held_parts import Runs
from hvdlm.training import parts_file
from hvdlm.training.checkpoint import file_entry, save_failure
from hvdlm.training.checkpoint_contents import TENSOR_FILES, rank_file_name
from hvdlm.training.rank_states import move

logger = logging.getLogger(__name__)

Parts = Mapping[str, tuple[Runs, Tensor]]  # by name: runs of a flattened tensor, and their numbers

# Bytes of a message to rank 0: after each of them all ranks meet, so that none waits long for another
_PIECE = 16 * 2**20

_SECONDS_BETWEEN_LOOKS = 0.05


def make_directory(communicator: Communicator, parent: Path) -> tuple[Path, bool]:
    """A new directory in `parent`, made by rank 0; and whether all ranks see it. Collective; raises JobError."""
    directory = parent / "ranks.partial"

    def make() -> str:
        token = f"token_{secrets.token_hex(8)}"
        try:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            (directory / token).touch()
        except OSError as error:
            raise HvdlmError(f"cannot write {directory}: {save_failure(error)}") from error
        return token

    token = on_rank_0(communicator, make)
    are_seeing = communicator.all_gather_object((directory / token).exists())
    on_rank_0(communicator, lambda: (directory / token).unlink(missing_ok=True))
    return directory, all(are_seeing)


def create_together(directory: Path, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Makes the files that ranks write together, by their names. Raises HvdlmError."""
    for file, each in shapes.items():
        try:
            parts_file.create(directory / file, each)
        except OSError as error:
            raise HvdlmError(f"cannot write {directory / file}: {save_failure(error)}") from error


def write_own(
    directory: Path, rank: int, tensors: Mapping[str, Tensor], parts: Mapping[str, Parts] | None = None
) -> None:
    """Writes this rank's `parts` of files that ranks write together, then the file of its own `tensors`, if it has any,
    then its entry.
    """
    file = directory / rank_file_name(rank)
    entry: dict[str, Any] = {}
    being_written = file
    try:
        for name, own in (parts or {}).items():
            being_written = directory / name
            parts_file.write(being_written, own)
        being_written = file
        if tensors:
            safetensors.torch.save_file(dict(tensors), file)
            make_durable(file)
            entry = file_entry(file)
    except (OSError, safetensors.SafetensorError) as error:
        entry = {"error": f"cannot write {being_written}: {save_failure(error)}"}
    try:
        unfinished = file.with_suffix(".partial")
        unfinished.write_text(json.dumps(entry), encoding="utf-8")
        unfinished.rename(_entry(file))
    except OSError as error:  # rank 0 will wait in vain
        logger.warning("rank %d: %s", rank, entry.get("error", f"cannot write {_entry(file)}: {save_failure(error)}"))


def wait_for_all(directory: Path, size: int, timeout: float, is_given_up: threading.Event) -> dict[str, dict[str, Any]]:
    """Size and hash of the files of `size` ranks, by name, once they are written; their entries are removed.

    Raises HvdlmError if a rank could not write, if neither its file nor one that ranks write together has changed for
    `timeout` seconds, or if nobody waits for it any more.
    """
    told = {}
    for rank in range(size):
        file = directory / rank_file_name(rank)
        clock, progress = RunningTime(), _progress(directory, file)
        while not _entry(file).exists():
            if (now := _progress(directory, file)) != progress:
                clock, progress = RunningTime(), now
            if is_given_up.is_set():
                raise HvdlmError(f"{directory} is not complete: a rank has died")
            if clock.seconds() > timeout:
                raise HvdlmError(f"rank {rank} has written nothing to {file} for {timeout:g} s (comm.timeout)")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        entry = _read_entry(directory, rank)
        if entry:
            told[file.name] = entry
        _entry(file).unlink()
    return told


def _progress(directory: Path, file: Path) -> list[tuple[int, int]]:
    """Bytes and time of change of a rank's file, once it is there, and of those that ranks write together."""
    there = {each.name for each in directory.iterdir()}  # by which NFS looks again
    found = [(directory / name).stat() for name in (file.name, *TENSOR_FILES) if name in there]
    return [(each.st_size, each.st_mtime_ns) for each in found]


def gather(
    communicator: Communicator, directory: Path, own: Mapping[str, Tensor], parts: Mapping[str, Parts] | None = None
) -> None:
    """Rank 0 writes each rank's tensors and parts. Collective; raises JobError."""
    for rank in range(communicator.size):
        tensors = {name: numbers for name, (_, numbers) in _on_rank_0(communicator, _all_of(own), rank).items()}
        theirs = {file: _on_rank_0(communicator, each, rank) for file, each in (parts or {}).items()}
        on_rank_0(communicator, partial(_write_and_check, directory, rank, tensors, theirs))


def _on_rank_0(communicator: Communicator, own: Parts, source: int) -> Parts:
    """The parts of rank `source`, on rank 0 in memory of its own. Collective."""
    places = {name: (runs, numbers.shape, numbers.dtype) for name, (runs, numbers) in own.items()}
    listed = communicator.broadcast_object(places, source)
    moved = {}
    for name, (runs, shape, dtype) in listed.items():
        numbers = own[name][1] if communicator.rank == source else torch.empty(shape, dtype=dtype)
        moved[name] = runs, _move_to_rank_0(communicator, numbers, source)
    return moved


def _all_of(tensors: Mapping[str, Tensor]) -> Parts:
    return {name: ((), tensor) for name, tensor in tensors.items()}


def _write_and_check(directory: Path, rank: int, tensors: Mapping[str, Tensor], parts: Mapping[str, Parts]) -> None:
    write_own(directory, rank, tensors, parts)
    _read_entry(directory, rank)


def _read_entry(directory: Path, rank: int) -> dict[str, Any]:
    """What a rank has told of its file. Raises HvdlmError if it could not be written."""
    told: dict[str, Any] = json.loads(_entry(directory / rank_file_name(rank)).read_text(encoding="utf-8"))
    if "error" in told:
        raise HvdlmError(f"rank {rank}: {told['error']}")
    return told


def _move_to_rank_0(communicator: Communicator, tensor: Tensor, source: int) -> Tensor:
    """`tensor` of rank `source`, on rank 0 in memory of its own; elsewhere an empty one. Collective."""
    flat = tensor.detach().reshape(-1)
    moved = torch.empty(tensor.shape, dtype=tensor.dtype) if communicator.rank == 0 else torch.empty(0)
    if source == 0:
        return moved.copy_(tensor) if communicator.rank == 0 else moved
    position = 0
    for piece in flat.split(max(1, _PIECE // tensor.element_size())):
        arrived = move(communicator, piece, source, 0)
        if communicator.rank == 0:
            moved.view(-1)[position : position + piece.numel()] = arrived
        position += piece.numel()
        communicator.arrival(tensor.device).wait()  # for a rank that has died, with a deadline
        communicator.barrier()
    return moved


def _entry(file: Path) -> Path:
    return file.with_name(file.name + ".json")
