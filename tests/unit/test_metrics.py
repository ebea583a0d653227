"""metrics.jsonl and its views: what is written, what a crash and a resumed run leave of it, and how it is shown."""

from __future__ import annotations

import io
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdlm.comm.solo import SoloCommunicator
from hvdlm.gradients.sync import Traffic
from hvdlm.timing import StepTimer
from hvdlm.training.console import Lines, ProgressLine, open_view
from hvdlm.training.hardware import peak_memory_bytes
from hvdlm.training.loss_curve import draw_loss_curve
from hvdlm.training.metrics import MetricsLog, read_metrics
from hvdlm.training.peak import measured_peak, published_peak
from hvdlm.training.step_metrics import StepMetrics

TRAIN = {
    "kind": "train",
    "step": 300,
    "loss": 2.0,
    "mean_loss": 2.34567,
    "tokens_per_second": 12345.6,
    "step_seconds": 0.1,
    "exposed_comm_seconds": 0.02,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class View:
    def __init__(self) -> None:
        self.shown: list[dict[str, Any]] = []
        self.closed = False

    def show(self, record: dict[str, Any]) -> None:
        self.shown.append(record)

    def close(self) -> None:
        self.closed = True


def write_steps(run_dir: Path, *steps: int, start: int = 0) -> None:
    log = MetricsLog(run_dir, start, View())
    for step in steps:
        log.write("train", step, loss=1 / step, tokens=step * 10)
    log.close()


def steps_in(run_dir: Path) -> list[int]:
    """Every line of the file, cut or not, must be JSON."""
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ---- the file


def test_each_record_is_a_line_and_is_shown_at_once(tmp_path: Path) -> None:
    view = View()
    log = MetricsLog(tmp_path, 0, view)
    log.write("train", 10, loss=2.5, lr=1e-3, tokens=100)
    log.write("event", 10, message='saved "x"\nü')
    lines = (tmp_path / "metrics.jsonl").read_bytes().decode("ascii").split("\n")  # before it is closed
    assert [json.loads(line) for line in lines[:-1]] == view.shown
    assert view.shown == [
        {"kind": "train", "step": 10, "loss": 2.5, "lr": 1e-3, "tokens": 100},
        {"kind": "event", "step": 10, "message": 'saved "x"\nü'},
    ]
    assert lines[-1] == ""
    assert not view.closed
    log.close()
    assert view.closed
    assert read_metrics(tmp_path / "metrics.jsonl") == view.shown


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not_become_null(tmp_path: Path, value: float) -> None:
    log = MetricsLog(tmp_path, 0, View())
    log.write("train", 1, loss=value, lr=0.0)
    log.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record == {"kind": "train", "step": 1, "loss": None, "lr": 0.0}


@pytest.mark.parametrize("cut", [1, 2, 10, 30])
def test_a_last_line_that_a_crash_cut_is_left_out(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, 1, 2, 3)
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    kept = [1, 2, 3] if cut == 1 else [1, 2]  # without its newline alone, a line is still whole
    assert [record["step"] for record in read_metrics(path)] == kept
    write_steps(tmp_path, 4, start=3)
    assert steps_in(tmp_path) == [*kept, 4]


def test_a_resumed_run_drops_the_steps_that_it_runs_again(tmp_path: Path) -> None:
    write_steps(tmp_path, *range(1, 11))
    before = read_metrics(tmp_path / "metrics.jsonl")
    write_steps(tmp_path, 7, 8, start=6)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert read_metrics(tmp_path / "metrics.jsonl")[:6] == before[:6]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_begins_anew_drops_everything(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    write_steps(tmp_path, 1, start=0)
    assert steps_in(tmp_path) == [1]


def test_memory_is_in_bytes() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(16 * 2**20)  # 64 MiB, touched
    grown = peak_memory_bytes(torch.device("cpu"))
    assert block.sum() == 16 * 2**20
    assert 2**20 < before <= grown < 2**50
    assert grown >= 64 * 2**20


@pytest.mark.parametrize("keeps", [False, True])
def test_freed_memory_is_kept_for_the_next_step(keeps: bool) -> None:
    """In a process of its own: 256 MiB that were in use and are not any more."""
    program = f"""
import psutil, torch
from hvdlm.training.hardware import keep_memory
print(psutil.Process().memory_info().rss)
if {keeps}: keep_memory()
torch.ones(64 * 2**20).sum()
print(psutil.Process().memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert (after - before > 200 * 2**20) == keeps


# ---- what a step's line says


class FirstOfTwo(SoloCommunicator):
    """Rank 0, beside a rank 1 that says what it is given."""

    def __init__(self, other: object) -> None:
        super().__init__()
        self.size, self.other = 2, other

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, self.other] if self.size == 2 else [value]  # it is asked for hosts before it knows its size


def traffic(codec_seconds: float = 0.0, wire_bytes: int = 0, dense_bytes: int = 0) -> Traffic:
    return Traffic(dense_bytes, wire_bytes, codec_seconds, first_sent=math.nan)


class FixedTimer(StepTimer):
    """A timer whose phases took given seconds."""

    def __init__(self, **seconds: float) -> None:
        super().__init__(torch.device("cpu"))
        self._seconds = seconds

    def seconds(self) -> dict[str, float]:
        return self._seconds


def test_times_are_means_over_steps_and_the_slowest_rank_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdlm.training.step_metrics.peak_flops", lambda device, precision, sharing: 100.0)
    whole, data, compute, exposed, codec, memory = 6.0, 0.5, 5.25, 0.25, 0.5, 7
    other = FirstOfTwo((30.0, 40, 90.0, 100, 300.0, (whole, data, compute, exposed, codec, memory)))
    metrics = StepMetrics(other, torch.device("cpu"), "fp32", flops_per_token=6.0)
    metrics.add(1.0, FixedTimer(data=0.25, wait=0.5), traffic(0.25, 40, 240), [torch.tensor(25.0)], 20)
    metrics.add(
        3.0, FixedTimer(data=0.75, wait=0.5), traffic(0.75, 80, 240), [torch.tensor(5.0), torch.tensor(15.0)], 60
    )
    record = metrics.collect(20.0, 60)
    memory_bytes = record.pop("memory_bytes")
    assert memory_bytes >= 2**20
    assert record == {
        "loss": 0.5,  # (20 + 30) / (60 + 40)
        "mean_loss": 0.75,  # (25 + 5 + 15 + 90) / (20 + 60 + 100)
        "tokens_per_second": 180 / 6.0,  # (20 + 60 + 100) / 6
        "utilisation": 6.0 * (180 / 6.0) / (100.0 + 300.0),
        "step_seconds": 3.0,
        "data_seconds": 0.5,  # this rank's: (0.25 + 0.75) / 2
        "compute_seconds": 2.625,  # the other's
        "exposed_comm_seconds": 0.5,  # this rank's
        "codec_seconds": 0.5,
        "wire_bytes": 60,
        "compression_ratio": 4.0,
        "world_size": 2,
    }


def test_each_line_counts_from_the_one_before() -> None:
    metrics = StepMetrics(SoloCommunicator(), torch.device("cpu"), "fp32", 1.0)
    metrics.add(100.0, FixedTimer(data=1.0, wait=1.0), traffic(1.0, 50, 50), [torch.tensor(9000.0)], 900)
    metrics.collect(1.0, 1)
    metrics.add(2.0, FixedTimer(data=0.5, wait=0.0), traffic(0.0, 20, 80), [torch.tensor(6.0)], 4)
    record = metrics.collect(8.0, 4)
    assert (record["loss"], record["mean_loss"], record["step_seconds"], record["compute_seconds"]) == (
        2.0,
        1.5,
        2.0,
        1.5,
    )
    assert (record["wire_bytes"], record["compression_ratio"], record["codec_seconds"]) == (20, 4.0, 0.0)
    assert record["tokens_per_second"] == 2.0


def test_utilisation_is_not_known_where_a_rank_s_peak_is_not() -> None:
    other = FirstOfTwo((30.0, 50, 0.0, 50, None, (1.0,) * 6))
    metrics = StepMetrics(other, torch.device("cpu"), "fp32", flops_per_token=6.0)
    metrics.add(1.0, FixedTimer(data=0.0, wait=0.0), traffic(), [], 60)
    assert metrics.collect(20.0, 50)["utilisation"] is None


@pytest.mark.parametrize(
    ("chip", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA A1000", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_published_peaks_by_what_cuda_calls_a_chip(chip: str, bf16: float | None) -> None:
    assert published_peak(chip, "bf16") == bf16


@pytest.mark.parametrize(("rate", "largest"), [(1e9, 256), (1e11, 1024), (1e13, 4096), (1e15, 4096)])
def test_a_cpu_s_peak_is_that_of_the_first_product_that_takes_long(
    monkeypatch: pytest.MonkeyPatch, rate: float, largest: int
) -> None:
    """On CPUs that would take 2 size^3 / rate for a product, and a fifth more for one below that size."""
    sizes = []

    def product_seconds(size: int, dtype: torch.dtype) -> float:
        sizes.append(size)
        return 2 * size**3 / rate * (1.0 if size >= largest else 1.2)

    monkeypatch.setattr("hvdlm.training.peak._product_seconds", product_seconds)
    assert measured_peak(torch.float32) == pytest.approx(rate)
    assert sizes[-1] == largest


def test_a_product_is_timed() -> None:
    assert 0 < measured_peak(torch.float32) < 1e16


# ---- the console


def test_a_plain_line_says_step_loss_speed_communication_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    Lines(1000).show(TRAIN)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "step 300/1000  loss 2.3457  12,346 tokens/s  communication 20%  1:10 left\n"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"step": 1000}, "0:00 left"),
        ({"step": 0, "step_seconds": 12.0}, "200:00 left"),
        ({"mean_loss": None}, "loss nan"),
        ({"exposed_comm_seconds": 0.0}, "communication 0%"),
        ({"kind": "eval", "loss": 1.5}, "step 300/1000  validation loss 1.5000\n"),
        ({"kind": "eval", "loss": None}, "validation loss nan"),
        ({"kind": "event", "message": "saved [a] :smile:"}, "step 300/1000  saved [a] :smile:\n"),
    ],
)
def test_plain_lines(capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str) -> None:
    Lines(1000).show({**TRAIN, **changes})
    assert expected in capsys.readouterr().err


def test_a_terminal_has_a_live_line_and_a_file_has_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(open_view(10, 0), Lines)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    view = open_view(1000, 0)
    assert isinstance(view, ProgressLine)
    view.show(TRAIN)
    view.close()
    for part in ("training", "step 300/1000", "loss 2.3457", "12,346 tokens/s", "communication 20%", "1:10 left"):
        assert part in terminal.getvalue()


def test_what_scrolls_by_above_the_live_line_is_shown_letter_by_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    message = "saved runs/[a]/:smile:/[/b]/" + "long/" * 20
    view = ProgressLine(1000, 0)
    view.show({"kind": "event", "step": 300, "message": message})
    view.show({"kind": "eval", "step": 300, "loss": 1.5})
    view.close()
    assert f"step 300/1000  {message}\n" in terminal.getvalue()
    assert "step 300/1000  validation loss 1.5000\n" in terminal.getvalue()


# ---- the picture


def draw(run_dir: Path, *records: dict[str, Any]) -> bytes:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_loss_curve(run_dir)
    return (run_dir / "loss.png").read_bytes()


def points(kind: str, *losses: float | None) -> list[dict[str, Any]]:
    return [{"kind": kind, "step": step, "tokens": 10 * step, "loss": loss} for step, loss in enumerate(losses)]


def test_the_loss_curve_is_a_png(tmp_path: Path) -> None:
    event = {"kind": "event", "step": 2, "message": "saved"}
    picture = draw(tmp_path / "run", *points("train", 3.0, None, 2.0), *points("eval", 2.5), event)
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture[12:16] == b"IHDR"
    assert struct.unpack(">II", picture[16:24]) == (800, 450)


def test_the_picture_follows_the_metrics(tmp_path: Path) -> None:
    train = points("train", 3.0, 2.5, 2.0)
    pictures = [
        draw(tmp_path / "run", *records)
        for records in (
            train,
            train,
            [*train, *points("eval", 2.5)],
            points("train", 3.0, 2.9, 2.0),
            points("train", 3.0, None, 2.0),
        )
    ]
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 4


@pytest.mark.parametrize("name", ["$100", r"a$\frac$", "a_b^c"])
def test_any_name_of_a_run_can_be_its_title(tmp_path: Path, name: str) -> None:
    assert draw(tmp_path / name, *points("train", 3.0, 2.0)).startswith(b"\x89PNG")
