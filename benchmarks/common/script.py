"""How a benchmark runs as a command: errors in one sentence, a clean end after a signal, options."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from hvdlm.errors import HvdlmError

# Where results go without --output.
RESULTS = Path(__file__).parents[1] / "results"


def run_script(name: str, work: Callable[[], None]) -> None:
    """Runs `work`; exits with one sentence if it raises HvdlmError or OSError.

    SIGTERM and Ctrl-C raise SystemExit, so that hosts and ranks are removed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        work()
    except HvdlmError as error:
        sys.exit(f"{name}: error: {error}")
    except OSError as error:
        sys.exit(f"{name}: error: {error.filename or 'operating system'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def as_overrides(settings: Mapping[str, object]) -> list[str]:
    """Settings by `section.key` as command-line arguments."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def absolute_path(path: str) -> Path:
    """The type of path options: ranks may start in another directory."""
    return Path(path).absolute()
