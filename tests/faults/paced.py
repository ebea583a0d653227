"""`hvdlm train` that rests after each step: `paced.py SECONDS ARGUMENTS...`. Faults then come every few steps."""

from __future__ import annotations

import sys
import time
from typing import Any

from hvdlm.cli import main
from hvdlm.training.trainer import Trainer

if __name__ == "__main__":
    rest, *arguments = sys.argv[1:]
    step = Trainer.train_step

    def slow_step(self: Trainer, *given: Any) -> bool:
        time.sleep(float(rest))
        return step(self, *given)

    Trainer.train_step = slow_step  # type: ignore[method-assign]
    sys.exit(main(arguments))
