"""Records of metrics.jsonl for Weights & Biases, which `pip install hvdlm[wandb]` brings."""

from __future__ import annotations

import json
import logging
import secrets
from pathlib import Path
from typing import Any

from hvdlm.config import Config, LogSection
from hvdlm.errors import HvdlmError, check_installed, write_failure
from hvdlm.training.metrics import read_metrics

logger = logging.getLogger(__name__)

_SECONDS_TO_FINISH = 60.0  # other ranks wait meanwhile

_STATE = "wandb.json"  # in the run directory: the run's id there, and the last step that it was told of at a start


def check_weights_and_biases(settings: LogSection) -> None:
    """Raises HvdlmError if it is wanted and not installed."""
    if settings.wandb:
        check_installed("wandb", f"log.wandb = {settings.wandb!r}", "Weights & Biases", "wandb")


class WeightsAndBiases:
    """Writes each number of a record as KIND/NAME over steps, and events as text.

    A run is one run there, however often it is resumed. Steps there cannot be taken back: what was told of one before a
    resume stays, and is not told again.
    """

    def __init__(self, run_dir: Path, config: Config) -> None:
        """Reads metrics.jsonl as the job before has left it.

        Raises HvdlmError if a run cannot be begun there: no login, no network.
        """
        import wandb

        run_id, self._last_told = _state(run_dir)
        run_id = run_id or secrets.token_hex(4)
        _write_state(run_dir / _STATE, run_id, self._last_told)
        try:
            self._run: wandb.Run | None = wandb.init(
                project=config.log.wandb,
                id=run_id,
                name=run_dir.name,
                dir=str(run_dir),
                resume="allow",
                config=config.model_dump(),
                settings=wandb.Settings(console="off", silent=True, finish_timeout=_SECONDS_TO_FINISH),
            )
            self._run.define_metric("*", step_metric="step")  # theirs would refuse an event of an earlier step
        except (wandb.Error, OSError) as error:
            raise HvdlmError(
                f"log.wandb = {config.log.wandb!r}: {str(error).partition(chr(10))[0]} With WANDB_MODE=offline in the "
                "environment all is kept in the run directory, for `wandb sync`"
            ) from None

    def show(self, record: dict[str, Any]) -> None:
        kind, step = record["kind"], record["step"]
        if self._run is None or step <= self._last_told:
            return
        names = ("message",) if kind == "event" else record.keys() - {"kind", "step"}
        values = {f"{kind}/{name}": record[name] for name in names if record[name] is not None}
        try:
            self._run.log({"step": step, **values})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Of a service in another process, or a network: metrics.jsonl is what is kept."""
        self._run = None
        logger.warning("Weights & Biases gets no more: %s", str(error).partition("\n")[0])


def _state(run_dir: Path) -> tuple[str | None, int]:
    """The run's id there, None before its first start, and the last step of which it has been told, -1 if of none."""
    state, metrics = run_dir / _STATE, run_dir / "metrics.jsonl"
    try:
        if not state.exists():
            return None, -1
        saved = json.loads(state.read_text(encoding="utf-8"))
        steps = [record["step"] for record in read_metrics(metrics)] if metrics.exists() else []
        return saved["id"], max([saved["last_step"], *steps])
    except OSError as error:
        raise HvdlmError(f"cannot read {state}: {write_failure(error)}") from None
    except (ValueError, KeyError, TypeError):
        raise HvdlmError(f"{state} is damaged: remove it, and a new run begins at Weights & Biases") from None


def _write_state(path: Path, run_id: str, last_step: int) -> None:
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps({"id": run_id, "last_step": last_step}), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise HvdlmError(f"cannot write {path}: {write_failure(error)}") from None
