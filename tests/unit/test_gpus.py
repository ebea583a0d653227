"""Which GPU a rank takes, who shares it, what happens where some ranks find none, and in which order streams are asked:
torch.cuda is replaced by fakes as far as it is used."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.connect import connect
from hvdlm.comm.engine_agreement import check_engines_match
from hvdlm.comm.failure import LostRankError
from hvdlm.comm.gpus import deal_gpus, shared_gpus, visible_gpus
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.comm.torch import _one_gpu_a_rank
from hvdlm.comm.work import Work
from hvdlm.config import CommSection, CompressionSection
from hvdlm.errors import HvdlmError, JobError
from hvdlm.gradients.channel import Channel
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.registry import bucket_bytes
from hvdlm.gradients.exchange import Exchange
from hvdlm.gradients.sync import GradientSync
from hvdlm.training import hardware
from hvdlm.training.hardware import choose_device
from hvdlm.training.step_metrics import StepMetrics

A, B, C = "GPU-aaaa", "GPU-bbbb", "GPU-cccc"
CUDA = torch.device("cuda", 0)


def fake_gpus(monkeypatch: pytest.MonkeyPatch, uuids: Sequence[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(uuids))
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(uuids))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))


class Seeing(SoloCommunicator):
    """One rank of several, whose ranks answer the first question by the GPUs that they see, and later ones alike."""

    def __init__(
        self, rank: int, visible: Sequence[Sequence[str]], capabilities: str = "", engine: str = "mpi"
    ) -> None:
        Communicator.__init__(self)
        self.rank, self.size, self.visible = rank, len(visible), visible
        self.hosts = [f"n{rank // 2}" for rank in range(self.size)]
        self.capabilities, self.engine = frozenset(capabilities.split()), engine
        self.questions = 0

    def all_gather_object(self, value: Any) -> list[Any]:
        self.questions += 1
        return [*self.visible] if self.questions == 1 else [value] * self.size


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ([[A, B]] * 2, [0, 1]),
        ([[A, B]] * 5, [0, 1, 0, 1, 0]),  # round by round, as many on each
        ([[A], [B], [C]], [0, 0, 0]),  # one visible GPU a rank
        ([[A, B], [B, A]], [0, 0]),  # in an order of its own
        ([[A, B], [A]], [1, 0]),  # who has no choice chooses first
        ([[A, B], [A, B], [C, B]], [0, 1, 0]),
    ],
)
def test_ranks_are_dealt_to_different_gpus(visible: list[list[str]], expected: list[int]) -> None:
    assert deal_gpus(visible) == expected
    taken = [own[number] for own, number in zip(visible, expected, strict=True)]
    by_gpu = {gpu: [rank for rank, own in enumerate(taken) if own == gpu] for gpu in taken}
    assert shared_gpus(visible) == {gpu: ranks for gpu, ranks in by_gpu.items() if len(ranks) > 1}


def test_gpus_are_told_apart_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, [B, A])
    assert visible_gpus() == [B, A]
    fake_gpus(monkeypatch, [])
    assert visible_gpus() == []


def test_a_driver_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment\nmore")

    fake_gpus(monkeypatch, [A])
    monkeypatch.setattr("torch.cuda.get_device_properties", fail)
    with caplog.at_level("WARNING", logger="hvdlm"):
        assert visible_gpus() == []
    assert "PyTorch cannot use the GPUs of" in caplog.text and "CUDA unknown error" in caplog.text


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that ranks have begun to use."""
    devices: list[torch.device] = []
    monkeypatch.setattr(hardware, "visible_gpus", list)
    monkeypatch.setattr(hardware, "_use_gpu", devices.append)
    return devices


@pytest.mark.parametrize("rank", range(3))
def test_one_visible_gpu_a_rank(used: list[torch.device], rank: int) -> None:
    """As `srun --gpus-per-task=1` arranges it: each has a GPU 0, and none shares it."""
    assert choose_device("auto", Seeing(rank, [[A], [B], [C]], "cuda")) == CUDA
    assert used == [CUDA]


def test_all_visible_gpus(used: list[torch.device]) -> None:
    assert [choose_device("cuda", Seeing(rank, [[A, B]] * 2, "cuda")).index for rank in range(2)] == [0, 1]


def test_a_gpu_may_be_shared_where_messages_go_through_the_host(used: list[torch.device]) -> None:
    assert choose_device("auto", Seeing(1, [[A]] * 2)) == CUDA


def test_nccl_refuses_a_shared_gpu(used: list[torch.device]) -> None:
    for rank in range(4):
        with pytest.raises(JobError) as caught:
            choose_device("auto", Seeing(rank, [[A], [B], [C], [C]], "cuda"))
        assert str(caught.value) == (
            "ranks 2, 3 on n1 share one GPU, which NCCL refuses: start one rank a GPU, or set comm.engine = 'mpi'"
        )
    assert not used


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_host_without_its_gpus_is_named_by_all(used: list[torch.device], wanted: str) -> None:
    for rank in range(4):
        with pytest.raises(JobError) as caught:
            choose_device(wanted, Seeing(rank, [[A], [B], [], []]))
        assert str(caught.value) == (
            f"train.device = '{wanted}', and PyTorch finds a GPU on some ranks but none for rank 2 on n1, rank 3 on n1"
            ": see what nvidia-smi says there, leave those hosts out, or set train.device = 'cpu'"
        )
    assert not used


def test_no_gpu_anywhere(used: list[torch.device]) -> None:
    assert choose_device("auto", Seeing(0, [[], []])) == torch.device("cpu")
    assert choose_device("cpu", Seeing(0, [[A], []])) == torch.device("cpu")
    with pytest.raises(JobError, match="'cuda', but PyTorch finds no GPU here: install its CUDA build, or set 'cpu'"):
        choose_device("cuda", Seeing(0, [[], []]))


def test_a_gpu_that_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.device) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with ...")

    monkeypatch.setattr(hardware, "visible_gpus", list)
    monkeypatch.setattr("torch.cuda.set_device", fail)
    with pytest.raises(JobError) as caught:
        choose_device("auto", Seeing(0, [[A]]))
    assert str(caught.value) == (
        "GPU 0 cannot compute: CUDA error: CUDA-capable device(s) is/are busy or unavailable; see who uses it by "
        "nvidia-smi, or leave out this host"
    )


@pytest.mark.parametrize(
    ("engine", "capabilities", "expected"), [("horovod", "cuda", 1), ("torch", "cuda", 0), ("horovod", "", 0)]
)
def test_beside_horovod_the_default_stream_is_left_idle(
    used: list[torch.device], monkeypatch: pytest.MonkeyPatch, engine: str, capabilities: str, expected: int
) -> None:
    streams: list[object] = []
    monkeypatch.setattr("torch.cuda.Stream", lambda device: ("a stream of", device))
    monkeypatch.setattr("torch.cuda.set_stream", streams.append)
    choose_device("auto", Seeing(0, [[A], [B]], capabilities, engine))
    assert streams == [("a stream of", CUDA)] * expected


def on_store(size: int, body: Callable[[Any, int], Any]) -> list[Any]:
    """What `body` returns or raises on each rank of a store."""
    store = HashStore()

    def outcome(rank: int) -> Any:
        try:
            return body(store, rank)
        except HvdlmError as error:
            return str(error)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(outcome, range(size)))


@pytest.mark.parametrize(
    ("visible", "expected"),
    [([[A], [B]], True), ([[A, B]] * 2, True), ([[A]] * 2, False), ([[A], []], False), ([[A, B]] * 3, False)],
)
def test_nccl_carries_the_messages_of_ranks_with_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch, visible: list[list[str]], expected: bool
) -> None:
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    waiting = iter(visible)
    monkeypatch.setattr("hvdlm.comm.torch.visible_gpus", lambda: next(waiting))
    assert on_store(len(visible), lambda store, rank: _one_gpu_a_rank(store, rank, len(visible))) == [expected] * len(
        visible
    )


def test_ranks_that_would_start_different_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "n7")
    engines = ["torch", "mpi", "torch"]
    said = on_store(3, lambda store, rank: check_engines_match(store, rank, 3, engines[rank]))
    assert (
        said
        == [
            "rank 0 on n7 takes engine torch, but rank 1 on n7 engine mpi: PyTorch finds a GPU on some hosts and none "
            "on others; see what nvidia-smi says there, leave those hosts out, or set comm.engine"
        ]
        * 3
    )
    assert on_store(3, lambda store, rank: check_engines_match(store, rank, 3, "torch")) == [None] * 3


def test_no_rank_waits_by_an_engine_that_another_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without a GPU under mpirun, with a PyTorch built for CUDA: it is told before it starts engine mpi."""
    store = HashStore()
    store.set("hvdlm/engine/1", "torch n8")
    store.set("hvdlm/engine/read/1", "")
    asked: list[object] = []
    monkeypatch.setattr("socket.gethostname", lambda: "n7")
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("hvdlm.comm.rendezvous.rendezvous", lambda *arguments: asked.append(arguments) or store)
    monkeypatch.setattr("hvdlm.comm.connect._start", lambda *_: pytest.fail("an engine was started"))
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(HvdlmError, match="rank 0 on n7 takes engine mpi, but rank 1 on n8 engine torch: PyTorch finds"):
        connect("auto", timeout=5)
    assert asked == [("mpirun", 0, 2, 5)]
    monkeypatch.setattr("hvdlm.comm.connect._start", lambda *_: Seeing(0, [[], []]))
    connect("mpi", timeout=5)  # a choice that does not depend on what the rank finds
    assert len(asked) == 1


def test_the_peak_of_a_gpu_is_shared_out_among_its_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sharing: list[int] = []
    monkeypatch.setattr("hvdlm.training.step_metrics.gpu_uuid", lambda device: A)
    monkeypatch.setattr("hvdlm.training.step_metrics.peak_flops", lambda *arguments: sharing.append(arguments[2]))
    for everyone in ([A, B, C], [A, A, B]):  # one visible GPU a rank, each its number 0; two ranks on one
        communicator = SoloCommunicator()
        monkeypatch.setattr(communicator, "all_gather_object", lambda own, everyone=everyone: everyone)
        StepMetrics(communicator, CUDA, "bf16", 1.0)._own_peak()
    assert sharing == [1, 2]


# ---- streams


class FakeStreams:
    """Takes the place of streams and events of torch.cuda, and notes what is asked of them, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.has_arrived = True
        self.main = self.stream("main")
        self.events = 0
        monkeypatch.setattr("torch.cuda.Stream", lambda device: self.stream("side"))
        monkeypatch.setattr("torch.cuda.Event", self.event)
        monkeypatch.setattr("torch.cuda.current_stream", lambda *_: self.main)
        monkeypatch.setattr("torch.cuda.stream", self.entered)
        monkeypatch.setattr("torch.cuda.set_device", lambda device: self.log.append(f"set {device}"))

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_event=lambda event: self.log.append(f"{name} waits for {event.name}"))

    def event(self) -> SimpleNamespace:
        self.events += 1
        name = f"event {self.events}"

        def record(stream: Any = None) -> None:
            self.log.append(f"{name} on {(stream or self.main).name}")

        return SimpleNamespace(name=name, record=record, query=lambda: self.has_arrived)

    @contextmanager
    def entered(self, stream: Any) -> Iterator[None]:
        yield


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    return FakeStreams(monkeypatch)


class Noted(Codec):
    """Notes that it works."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def reduce_(self, gradients: torch.Tensor, exchange: Exchange, step: int) -> None:
        self.log.append(f"reduce on {torch.cuda.current_stream().name}")


def test_a_bucket_is_reduced_between_two_events_on_the_rank_s_own_gpu(streams: FakeStreams) -> None:
    solo = SoloCommunicator()
    channel = Channel(solo, None, Exchange(solo, None, []), torch.device("cuda", 3), owns_communicator=False)
    channel.submit(Noted(streams.log), torch.zeros(4), 0, "bucket 1").wait()
    channel.close()
    expected = ["set cuda:3", "side waits for event 1", "reduce on main", "event 2 on side", "main waits for event 2"]
    assert streams.log.pop(streams.log.index("event 1 on main")) and streams.log == expected


def test_what_does_not_arrive_on_the_gpu_is_a_lost_rank(streams: FakeStreams) -> None:
    solo = SoloCommunicator()
    solo._timeout = 0.02
    streams.has_arrived = False
    work = solo.arrival(CUDA)
    with pytest.raises(LostRankError, match=r"rank 0 on \S+ waited 0.02 s \(comm.timeout\) for the other ranks"):
        work.wait()
    streams.has_arrived = True
    solo.arrival(CUDA).wait()
    assert streams.log == ["event 1 on main", "event 2 on main"]
    solo.arrival(torch.device("cpu")).wait()
    assert len(streams.log) == 2


def test_the_host_is_at_most_one_step_ahead_of_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step's arrival is waited for in the next one; before the host reads a number, all that is queued."""
    log: list[str] = []

    def arrival(_: SoloCommunicator, device: torch.device) -> Work[None]:
        number = sum("recorded" in line for line in log)
        log.append(f"{number} recorded")
        return Work(lambda: log.append(f"{number} waited for"))

    monkeypatch.setattr(SoloCommunicator, "arrival", arrival)
    sync = GradientSync(torch.nn.Linear(2, 2), SoloCommunicator(), CommSection(), CompressionSection())
    for _ in range(2):
        sync.zero_grad()
        sync.wait()
    sync.synchronize()
    sync.close()
    assert log == ["0 recorded", "0 waited for", "1 recorded", "2 recorded", "2 waited for"]


def test_groups_are_closed_with_the_whole_the_last_one_first() -> None:
    log: list[str] = []

    class Named(SoloCommunicator):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def _split(self, color: int, key: int) -> Named:
            return Named(f"{self.name}.{len(self._groups)}")

        def _close(self) -> None:
            log.append(self.name)

    whole = Named("whole")
    first = whole.split(0, 0)
    second = whole.split(0, 0)
    whole.split(0, 0)
    first.split(0, 0)
    second.close()
    whole.close()
    whole.close()
    assert log == ["whole.1", "whole.2", "whole.0.0", "whole.0", "whole"]


@pytest.mark.parametrize(
    ("codec", "nodes", "on_cpus", "on_gpus"),
    [
        ("none", 1, 16, 25),
        ("none", 2, 4, 25),
        ("int4", 2, 8, 25),
        ("int2", 2, 8, 25),
        ("topk", 2, 32, 32),
        ("topk2", 2, 32, 32),
    ],
)
def test_buckets_on_gpus_are_larger(codec: str, nodes: int, on_cpus: int, on_gpus: int) -> None:
    compression = CompressionSection(codec=codec)
    sizes = [bucket_bytes(CommSection(), compression, nodes, device) / 2**20 for device in ("cpu", "cuda")]
    assert sizes == [on_cpus, on_gpus]
    assert bucket_bytes(CommSection(bucket_mb=2.0), compression, nodes, "cuda") == 2 * 2**20


def test_a_check_without_hvdlm_names_the_way_to_it(tmp_path: Path) -> None:
    python = tmp_path / "bin/python3"
    venv.create(tmp_path, symlinks=True)
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
    (folder / script.name).write_bytes(script.read_bytes())
    environment = {**os.environ, "PATH": f"{python.parent}:/usr/bin:/bin"}
    words = ["bash", str(folder / script.name)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert done.stderr == (
        f"gpu_check.sh: error: {python} has no hvdlm or not what its tests need: run "
        "'make gpu-check', which installs them; docs/no-network.md says how without a network\n"
    )
