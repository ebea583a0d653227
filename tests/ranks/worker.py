"""A rank of a pool (pool.py): `worker.py ENGINE` joins the job and runs what it is asked until it is told to leave."""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import logging
import os
import signal
import sys
import traceback
from multiprocessing.connection import Client, Connection
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "parallel"), str(TESTS / "ranks")]

import torch  # noqa: E402  # the path above comes first
from pool import SHOW_STACKS, Answer, Request  # noqa: E402

from hvdlm.comm.communicator import Communicator  # noqa: E402
from hvdlm.comm.connect import connect  # noqa: E402
from hvdlm.comm.launch import detect  # noqa: E402

FOLDER = Path(os.environ["HVDLM_POOL_FOLDER"])
TIMEOUT = 200.0  # seconds that a rank waits for another; compiling blocks takes one longer than another


def main(engine: str) -> None:
    rank = detect(os.environ).rank
    log = os.open(FOLDER / f"rank_{rank}.log", os.O_CREAT | os.O_RDWR | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.enable()
    faulthandler.register(SHOW_STACKS, all_threads=True)
    torch.set_num_threads(1)
    connection = Client(str(FOLDER / "socket"), authkey=bytes.fromhex(os.environ["HVDLM_POOL_KEY"]))
    try:
        whole = connect(engine, TIMEOUT)
        groups = make_groups(whole)
    except BaseException:
        connection.send(Answer(rank, os.getpid(), error=traceback.format_exc()))
        raise
    connection.send(Answer(rank, os.getpid()))
    serve(connection, groups, rank)
    whole.close()


def make_groups(whole: Communicator) -> dict[int, Communicator]:
    """Communicators of the first 1, 2, ... ranks, those that this rank is in."""
    groups = {}
    for size in range(1, whole.size):
        group = whole.split(int(whole.rank >= size), whole.rank)
        if whole.rank < size:
            groups[size] = group
    groups[whole.size] = whole
    return groups


def serve(connection: Connection, groups: dict[int, Communicator], rank: int) -> None:
    modules: dict[Path, ModuleType] = {}
    while True:
        try:
            request: Request | None = connection.recv()
        except EOFError:
            os._exit(1)  # the test is gone, and other ranks may wait for this one for ever
        if request is None:
            return
        connection.send(answer(request, groups[request.size], modules, rank))


def answer(request: Request, group: Communicator, modules: dict[Path, ModuleType], rank: int) -> Answer:
    """Runs one request, and leaves nothing of it behind."""
    os.ftruncate(1, 0)
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    environment, folder = dict(os.environ), Path.cwd()
    value, error = None, None
    try:
        value = getattr(load(request.module, modules), request.function)(group, **request.keywords)
    except BaseException:
        error = traceback.format_exc()
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        logging.getLogger().handlers.clear()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()
    return Answer(rank, os.getpid(), value, error, (FOLDER / f"rank_{rank}.log").read_text(errors="replace"))


def load(path: Path, modules: dict[Path, ModuleType]) -> ModuleType:
    """The module of a file, imported at its first use."""
    if path not in modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None, path
        modules[path] = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = modules[path]
        spec.loader.exec_module(modules[path])
    return modules[path]


if __name__ == "__main__":
    main(sys.argv[1])
