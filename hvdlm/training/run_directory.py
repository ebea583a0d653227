"""The directory of a run: whose it is, what it holds, and from which checkpoint the run goes on. For rank 0."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hvdlm.config import Config
from hvdlm.config_reader import from_dict
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError, write_failure
from hvdlm.model.presets import PRESETS
from hvdlm.training import checkpoint
from hvdlm.training.metrics import read_metrics

logger = logging.getLogger(__name__)

_SETTINGS = "config.toml"
_LOCK = ".lock"

# Seconds in which the lock of a process that has died must have gone
_SECONDS_TO_TAKE_OVER = 20.0


class RunDirectory:
    """`train.run_dir`, which this process keeps from other jobs from `open` to `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed_settings: list[str] = []  # that differ from the checkpoint's, a sentence for each
        self._lock: IO[bytes] | None = None

    def open(
        self, config: Config, config_file: Path | None, resume: str | None, data: DataSet, vocab_size: int
    ) -> dict[str, Any] | None:
        """Makes the directory ready, and returns the state of the checkpoint to resume, if any.

        `config_file`: what the settings were read from; it is not written to, even if it is the run's own config.toml.

        Raises HvdlmError, and leaves everything as it is, if the directory holds another run, if another job uses it,
        or if the checkpoint does not fit.
        """
        if resume is None and self._holds_run():
            raise HvdlmError(
                f"{self.path} already holds a run: go on with it by --resume latest, or choose another train.run_dir"
            )
        self._check_source(resume)
        is_new = not self.path.exists()
        self._acquire()
        try:
            return self._open(config, config_file, resume, data, vocab_size)
        except BaseException:
            self.close()
            if is_new:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def take_over(self, config: Config) -> None:
        """Goes on with the run of a process that has died, by one that has become rank 0.

        On a host that does not share the directory, what follows is in one of its own. Raises HvdlmError if the lock of
        the dead process does not go within some seconds, as it may not on a network's file system.
        """
        end = time.monotonic() + _SECONDS_TO_TAKE_OVER
        while self._lock is None:
            try:
                self._acquire()
            except HvdlmError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        settings = self.path / _SETTINGS
        if not settings.exists():
            with self._naming_failures():
                settings.write_text(config.to_toml(), encoding="utf-8")

    def close(self) -> None:
        """Leaves the directory to other jobs."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _open(
        self, config: Config, config_file: Path | None, resume: str | None, data: DataSet, vocab_size: int
    ) -> dict[str, Any] | None:
        state = None
        if resume is not None and not (resume == "latest" and not checkpoint.exists_in(self.path)):
            state = checkpoint.open_state(self.path if resume == "latest" else Path(resume))
            _check_resumable(state, config, data, vocab_size)
            checkpoint.set_latest(Path(state["path"]), self.path)
            logger.info("resuming from %s, step %d", state["path"], state["step"])
            self.changed_settings = _changed_settings(state, config)
        elif resume == "latest":
            self._check_nothing_was_saved()
            logger.info("%s holds no checkpoint yet: beginning anew", self.path)
        settings = self.path / _SETTINGS
        if not (config_file and config_file.exists() and settings.exists() and settings.samefile(config_file)):
            with self._naming_failures():
                settings.write_text(config.to_toml(), encoding="utf-8")
        return state

    def _check_nothing_was_saved(self) -> None:
        """Raises HvdlmError if metrics.jsonl tells of a checkpoint, and there is none: it is lost, or not mounted."""
        file = self.path / "metrics.jsonl"
        events = [record for record in read_metrics(file) if record.get("kind") == "event"] if file.exists() else []
        saved = [event["message"] for event in events if str(event["message"]).startswith("saved ")]
        if saved:
            raise HvdlmError(
                f"{self.path} holds no checkpoint any more, though metrics.jsonl says: {saved[-1]}; bring it back, or "
                "begin a new run in another train.run_dir"
            )

    def _holds_run(self) -> bool:
        return (self.path / "metrics.jsonl").exists() or checkpoint.exists_in(self.path)

    def _check_source(self, resume: str | None) -> None:
        """Raises HvdlmError if a checkpoint of elsewhere would go on in a directory that holds a run of its own."""
        if resume in (None, "latest") or not self._holds_run():
            return
        source = Path(str(resume)).resolve()
        if self.path.resolve() not in [source, *source.parents]:
            raise HvdlmError(
                f"{self.path} holds a run of its own, which going on from {resume} would overwrite: choose another "
                "train.run_dir"
            )

    def _acquire(self) -> None:
        """Locks the directory until this process ends. Two jobs in one would overwrite each other's checkpoints."""
        with self._naming_failures():
            self.path.mkdir(parents=True, exist_ok=True)
            self._probe_checkpoints()
            self._lock = (self.path / _LOCK).open("a+b", buffering=0)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read(200).decode(errors="replace").strip()
            self.close()
            raise HvdlmError(
                f"another job trains in {self.path} ({holder}): wait until it has ended, or choose another "
                f"train.run_dir; if that host has crashed, remove {self.path / _LOCK}"
            ) from None
        except OSError:
            pass  # some cluster file systems do not support locks
        with self._naming_failures():
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _probe_checkpoints(self) -> None:
        """Writes a file where checkpoints will be: what keeps them from being saved is found now, not after hours."""
        parent = checkpoint.directory(self.path)
        is_new = not os.path.lexists(parent)
        parent.mkdir(exist_ok=True)
        probe = parent / ".probe"
        probe.touch()
        probe.unlink()
        if is_new:
            parent.rmdir()

    @contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            where = f"train.run_dir = {self.path}"
            if error.filename and Path(error.filename) != self.path:
                where += f" ({error.filename})"
            raise HvdlmError(f"cannot write to {where}: {write_failure(error)}") from None


def _check_resumable(state: dict[str, Any], config: Config, data: DataSet, vocab_size: int) -> None:
    """Raises HvdlmError unless model, data and order of samples are those of the checkpoint; the rest may differ."""
    saved, now = _settings(state), config.model_dump()
    fixed = [("model", name) for name in now["model"] if name not in ("preset", "from")]
    of_batches = ("global_batch_size", "batch_ramp_start", "batch_ramp_increment", "batch_ramp_steps")
    fixed += [("train", name) for name in ("seed", *of_batches)]
    if now["privacy"]["clip_norm"]:
        if not saved["privacy"]["clip_norm"]:
            raise HvdlmError(
                f"{state['path']} was trained without privacy.clip_norm, and no epsilon holds for what it has learned: "
                "begin a new run in another train.run_dir"
            )
        fixed.append(("privacy", "unit"))
    for section, name in fixed:
        if saved[section][name] != now[section][name]:
            raise HvdlmError(
                f"{state['path']} was made with {section}.{name} = {saved[section][name]!r}, not "
                f"{now[section][name]!r}: resume with the same, or begin a new run in another train.run_dir"
            )
    if state["fingerprint"] != data.fingerprint or state["vocab_size"] != vocab_size:
        raise HvdlmError(f"{state['path']} was trained on another data set than {data.path}: give data.path the same")


def _changed_settings(state: dict[str, Any], config: Config) -> list[str]:
    """A sentence for each setting of the mathematics of training that differs from the checkpoint's."""
    saved, now = _settings(state), config.model_dump()
    names = [
        (section, name) for section in ("optimizer", "compression", "local_steps", "privacy") for name in now[section]
    ]
    names += [("train", name) for name in ("steps", "max_tokens", "ema", "precision")] + [("data", "token_dropout")]
    return [
        f"{section}.{name} is {now[section][name]}, and was {saved[section][name]} up to here"
        for section, name in names
        if saved[section][name] != now[section][name]
    ]


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    """With which a checkpoint was made, by section. Raises HvdlmError if some are not known any more."""
    return from_dict(state["config"], state["path"], PRESETS).model_dump()
