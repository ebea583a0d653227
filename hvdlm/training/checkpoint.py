"""Checkpoints: directories that are complete or absent, verified when read.

    checkpoints/
      latest                    the name of the newest one
      best                      a link to the one of the least validation loss, with checkpoint.keep_best
      step_00001000/
        model.safetensors       parameters by name
        optimizer.safetensors   moments and step counts by name
        state.json              everything else
        tokenizer.json          of the data set, so that `hvdlm generate` needs nothing but the checkpoint
        ranks/                  what differs from rank to rank, if anything does: rank_00003.safetensors
        manifest.json           the step, size and SHA-256 of each file above

A checkpoint is written under a temporary name, flushed to disk and renamed, by rank 0: replicas are equal, and hosts
need not share a file system.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import hvdlm
from hvdlm.data.staging import let_others_read, make_durable
from hvdlm.errors import HvdlmError, write_failure
from hvdlm.training.checkpoint_contents import RANKS, TENSOR_FILES, Checkpoint
from hvdlm.training.retention import Retention

logger = logging.getLogger(__name__)

_FILES = {*TENSOR_FILES, "state.json", "tokenizer.json"}
_STEP = "step_" + "[0-9]" * 8
_LATEST = "latest"
_BEST = "best"
_PARTIAL = ".partial"


def save(
    parent: Path,
    step: int,
    model: Mapping[str, Tensor] | None,
    optimizer: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
    tokenizer: bytes,
    keep: Retention,
    ranks: Path | None = None,
    rank_entries: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Writes `step_XXXXXXXX` into `parent`, points `latest` at it and removes those up to it that are not to `keep`.

    `tokenizer`: the content of a tokenizer.json. `ranks`: a directory in `parent` of files by rank, which becomes a
    part of the checkpoint, and `rank_entries` what `file_entry` has said of them; where `model` and `optimizer` are
    None, the files of both lie there, too, written by ranks together.

    Raises HvdlmError if it cannot be written; checkpoints of other steps are then as they were.
    """
    path = path_of(parent, step)
    partial = path.with_name(path.name + _PARTIAL)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(f"step_*{_PARTIAL}"):
            shutil.rmtree(stale, ignore_errors=stale != partial)
        partial.mkdir()
        if ranks is not None:
            ranks.rename(partial / RANKS)
        if ranks is not None and model is None:
            for name in TENSOR_FILES:
                (partial / RANKS / name).rename(partial / name)
            if not any((partial / RANKS).iterdir()):
                (partial / RANKS).rmdir()
        write_files(partial, step, model, optimizer, state, tokenizer, rank_entries)
        for path_inside in partial.rglob("*"):
            make_durable(path_inside)
        make_durable(partial)
        if path.exists():  # the same step again, after resuming from an earlier one
            _remove(path)
        partial.rename(path)
        _write_latest(path)
        make_durable(parent.parent)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise HvdlmError(f"cannot write the checkpoint {path}: {save_failure(error)}") from error
    retain(path, keep)
    return path


def write_files(
    path: Path,
    step: int,
    model: Mapping[str, Tensor] | None,
    optimizer: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
    tokenizer: bytes,
    rank_entries: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes the files of a checkpoint into a directory, which may hold those of ranks or by them, as `save` has it."""
    for name, tensors in zip(TENSOR_FILES, (model, optimizer), strict=True):
        if tensors is not None:
            safetensors.torch.save_file(_plain(tensors), path / name)
    (path / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    (path / "tokenizer.json").write_bytes(tokenizer)
    let_others_read(path, like=path / "state.json")
    known = {f"{RANKS}/{name}": entry for name, entry in (rank_entries or {}).items()}
    names = sorted([*_FILES, *(str(file.relative_to(path)) for file in path.glob(f"{RANKS}/*"))])
    files = {name: known.get(name) or file_entry(path / name) for name in names}
    manifest = json.dumps({"step": step, "files": files}, indent=1)
    (path / "manifest.json").write_text(manifest, encoding="utf-8")


def retain(newest: Path, keep: Retention) -> None:
    """Removes checkpoints up to the `newest` that are not to be kept, and points `best` at the best; a failure is a
    warning."""
    saved = {_step_of(each): each for each in _by_step(newest.parent) if each <= newest}
    for step in saved.keys() - keep.kept(saved):
        try:
            _remove(saved[step])
        except OSError as error:  # files that somebody has open on NFS, a mount: the next save tries again
            logger.warning("cannot remove the old checkpoint %s: %s", saved[step], _reason(error))
    best = keep.best(saved)
    if best is not None:
        link = newest.with_name(_BEST)
        try:
            unfinished = link.with_name(_BEST + _PARTIAL)
            unfinished.unlink(missing_ok=True)
            unfinished.symlink_to(saved[best].name)
            unfinished.replace(link)
        except OSError as error:  # some file systems have no links
            logger.warning("cannot make %s lead to %s: %s", link, saved[best].name, _reason(error))


def file_entry(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def save_failure(error: OSError | safetensors.SafetensorError) -> str:
    """`write_failure` of an error of writing tensors; the library tells of the system's as "... (os error 28)"."""
    if isinstance(error, OSError):
        return write_failure(error)
    number = re.search(r"\(os error (\d+)\)", str(error))
    return write_failure(OSError(int(number[1]), os.strerror(int(number[1])))) if number else str(error)


def versions() -> dict[str, str]:
    """Versions of the software on which a checkpoint depends."""
    return {
        "hvdlm": hvdlm.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: one itself, or the newest good one of a run directory or its `checkpoints`.

    In a directory of several, a damaged one is named in a warning and the one before it is taken.

    Raises HvdlmError if there is none, or if the one named is damaged.
    """
    if _is_one(path):
        _verify(path)
        return Checkpoint(path)
    parent = directory(path) if directory(path).is_dir() else path
    damaged = None
    candidates = _best_first(parent)
    while candidates:
        candidate = candidates.pop(0)
        try:
            _verify(candidate)
        except HvdlmError as error:
            if not candidate.exists():  # a job that saves has removed it meanwhile, and made a newer one
                candidates = _best_first(parent)
                continue
            logger.warning("%s; trying the one before it", error)
            damaged = error
            continue
        return Checkpoint(candidate)
    raise damaged or _none_in(path)


def all_in(path: Path) -> list[Path]:
    """The checkpoint that `path` is, or those that it holds as a run directory, good or damaged, by step.

    Raises HvdlmError if there is none.
    """
    if _is_one(path):
        return [path]
    parent = directory(path) if directory(path).is_dir() else path
    if found := _by_step(parent):
        return found
    raise _none_in(path)


def open_state(path: Path) -> dict[str, Any]:
    """The state of `open_checkpoint(path)` with its own `path` beside it: what rank 0 tells the others."""
    opened = open_checkpoint(path)
    return {**opened.state, "path": str(opened.path)}


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, or of a run directory's newest, without a look at other files. Raises HvdlmError."""
    failure = _none_in(path)
    for each in [path] if _is_one(path) else _best_first(directory(path) if directory(path).is_dir() else path):
        try:
            state: dict[str, Any] = json.loads((each / "state.json").read_text(encoding="utf-8"))
            if {"config", "vocab_size"} <= state.keys():
                return state
            raise ValueError("it is not what was written")
        except (OSError, ValueError, AttributeError) as error:
            failure = HvdlmError(f"cannot read {each / 'state.json'}: {_reason(error)}")
    raise failure


def set_latest(path: Path, run_dir: Path) -> None:
    """Points `latest` of a run at one of its own checkpoints: later ones are abandoned by resuming from it."""
    if path.parent.resolve() == directory(run_dir).resolve():
        _write_latest(path)


def directory(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def path_of(parent: Path, step: int) -> Path:
    """Where the checkpoint of a step is, in a directory of checkpoints."""
    return parent / f"step_{step:08d}"


def is_saved(run_dir: Path, step: int) -> bool:
    """Whether a run has a checkpoint of a step, good or damaged."""
    return path_of(directory(run_dir), step).exists()


def exists_in(run_dir: Path) -> bool:
    """Whether a run has any checkpoint, good or damaged."""
    return bool(_by_step(directory(run_dir)))


def _is_one(path: Path) -> bool:
    return (path / "manifest.json").exists() or path.match(_STEP)


def _none_in(path: Path) -> HvdlmError:
    return HvdlmError(f"{path} holds no checkpoint: give a checkpoint, or the run directory of a run that saved")


def _by_step(parent: Path) -> list[Path]:
    """Checkpoints from the lowest step to the highest."""
    return sorted(parent.glob(_STEP))


def _best_first(parent: Path) -> list[Path]:
    """The one that `latest` names, those before it, and only then later ones.

    Later ones were abandoned by resuming from an earlier checkpoint, or were written just before a crash.
    """
    newest_first = _by_step(parent)[::-1]
    try:
        latest = (parent / _LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return newest_first
    return sorted(newest_first, key=lambda path: path.name > latest)  # stable: each part stays in that order


def _write_latest(path: Path) -> None:
    pointer = path.with_name(_LATEST + _PARTIAL)
    pointer.write_text(path.name + "\n", encoding="utf-8")
    make_durable(pointer)
    pointer.replace(path.with_name(_LATEST))
    make_durable(path.parent)


def _remove(path: Path) -> None:
    """Renames a checkpoint, then removes it: one that is half removed must not look like a checkpoint."""
    removed = path.with_name(path.name + ".removed" + _PARTIAL)
    path.rename(removed)
    shutil.rmtree(removed)


def _verify(path: Path) -> None:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if not manifest["files"].keys() >= _FILES or manifest.keys() - {"step", "files"}:
            raise KeyError
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.exists():
                raise HvdlmError(f"checkpoint {path} is damaged: {name} is missing")
            if file.stat().st_size != expected["bytes"]:
                sizes = f"{file.stat().st_size} bytes instead of {expected['bytes']}"
                raise HvdlmError(f"checkpoint {path} is damaged: {name} has {sizes}")
            if _sha256(file) != expected["sha256"]:
                raise HvdlmError(f"checkpoint {path} is damaged: {name} does not match its SHA-256")
        _check_steps(path, manifest.get("step"))
    except OSError as error:
        raise HvdlmError(f"cannot read the checkpoint {error.filename or path}: {_reason(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HvdlmError(f"checkpoint {path} is damaged: manifest.json is not what was written") from None


def _check_steps(path: Path, step: int | None) -> None:
    """Raises HvdlmError if a checkpoint's name, its manifest, of version 0.1 without a step, and its state differ."""
    told = {"its manifest": step, "state.json": json.loads((path / "state.json").read_bytes()).get("step")}
    if path.resolve().match(_STEP):
        told["its name"] = _step_of(path.resolve())
    known = {name: value for name, value in told.items() if value is not None}
    if len(set(known.values())) > 1:
        said = ", ".join(f"{name} says {value}" for name, value in known.items())
        raise HvdlmError(f"checkpoint {path} is mixed of several: {said}")


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
