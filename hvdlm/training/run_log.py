"""The metrics.jsonl of a run, with the views of it that settings ask for, and the picture of its end."""

from __future__ import annotations

import logging
from pathlib import Path

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.training.console import Views, open_view
from hvdlm.training.loss_curve import draw_loss_curve
from hvdlm.training.metrics import MetricsLog
from hvdlm.training.tensorboard import TensorBoard
from hvdlm.training.weights_and_biases import WeightsAndBiases

logger = logging.getLogger(__name__)


def open_log(config: Config, last_step: int, step: int, takes_over: bool = False) -> MetricsLog:
    """Goes on with the log of a run after `step`. `takes_over`: for a rank 0 that has died."""
    run_dir = Path(config.train.run_dir)
    view = open_view(last_step, step)
    if config.log.tensorboard:
        view = Views(view, TensorBoard(run_dir, step))
    if config.log.wandb:
        try:
            view = Views(view, WeightsAndBiases(run_dir, config))
        except HvdlmError as error:
            if not takes_over:
                raise
            logger.warning("%s", error)  # a job that has outlived rank 0 does not end for it
    return MetricsLog(run_dir, step, view)


def draw_at_end(run_dir: Path) -> None:
    """The run has ended and is saved: without a picture it is no less done."""
    try:
        draw_loss_curve(run_dir)
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        logger.warning("cannot draw %s: %s", run_dir / "loss.png", str(error).partition("\n")[0])
