"""How a benchmark is run as a command: it takes down what it set up, and tells an error in one sentence."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from hvdlm.errors import HvdlmError


def run_script(name: str, work: Callable[[], None]) -> None:
    """Exits with a sentence if `work` raises HvdlmError or OSError; SIGTERM and Ctrl-C end it in good order."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # takes down what was set up
    try:
        work()
    except HvdlmError as error:
        sys.exit(f"{name}: error: {error}")
    except OSError as error:
        sys.exit(f"{name}: error: {error.filename or 'operating system'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def as_overrides(settings: Mapping[str, object]) -> list[str]:
    """Values by `section.key` as the words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def absolute_path(path: str) -> Path:
    """An option's path, wherever ranks are started."""
    return Path(path).absolute()
