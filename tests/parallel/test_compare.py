"""The benchmarks from end to end, with a tiny model: every row is there, and what crashes takes nobody down."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from launcher import Result, run
from scripts import run_here, script_command

TINY = ["--model.layers", "1", "--model.heads", "2", "--model.width", "32", "--model.context_length", "32"]
SHORT = ["--train.steps", "20", "--train.evaluate_every", "10", "--log.every", "5", "--optimizer.warmup_steps", "5"]
SMALL = ["--train.global_batch_size", "4", "--train.micro_batch_size", "2", "--train.evaluate_sequences", "16"]


def compare_words(data: Path, output: Path, *options: str) -> list[str]:
    words = ["compare.py", "--data", str(data), "--output", str(output)]
    return [*words, "--rounds", "2", "--steps", "1", *TINY, *options]


def compare(data: Path, output: Path, *options: str) -> Result:
    return run(script_command(*compare_words(data, output, *options)), deadline=280)


def converge(data: Path, output: Path, *options: str) -> Result:
    words = ["--data", str(data), "--output", str(output), "--runs", str(output / "runs")]
    return run_here("convergence.py", *words, *TINY, *SHORT, *SMALL, *options)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_compare_on_one_host(small_data: Path, tmp_path: Path) -> None:
    options = ["--codecs", "none", "fp16", "pipeline:zero_bubble", "--engines", "mpi", "horovod"]
    options += ["--peers", "DDP fp16", "PyTorch 1F1B", "Horovod", "--micro-batches", "2", "--model.layers", "2"]
    result = compare(small_data, tmp_path, "--setup", "one-host", *options)
    assert result.status == 0, result.output
    one_host = read(tmp_path / "compare.json")["one-host, 2 micro-batches"]
    names = ["no communication", "hvdlm mpi none", "hvdlm mpi fp16", "hvdlm mpi pipeline:zero_bubble"]
    names += ["hvdlm horovod none", "DDP", "DDP fp16", "PyTorch 1F1B", "Horovod"]
    assert [row["name"] for row in one_host["summary"]] == names
    assert {key for key in one_host if one_host[key]} >= {"date", "setup", "machine", "versions", "settings"}
    assert len(one_host["systems"]) == len(names)
    for system in one_host["systems"]:
        assert (system["starts"], system["crashes"]) == (1, [])
        assert [measured["step_seconds"] > 0 for measured in system["measurements"]] == [True, True]
        distance = system["relative_distance"]
        assert distance is None if system["name"] == "no communication" else distance < 0.1
    dense, half = (row["wire_bytes"] for row in one_host["summary"][1:3])
    assert dense == pytest.approx(2 * half, rel=0.01)
    assert all(f"| {name} |" in (tmp_path / "compare.md").read_text() for name in names)
    assert (tmp_path / "compare.png").exists()


@pytest.mark.thorough
@pytest.mark.needs_root
def test_compare_on_two_hosts(small_data: Path, tmp_path: Path) -> None:
    options = [
        "--codecs",
        "none",
        "--engines",
        "torch",
        "--peers",
        "--model.layers",
        "2",
        "--horovodrun",
        "horovodrun-gloo",
    ]
    result = compare(small_data, tmp_path, "--setup", "2x1gbit", *options)
    assert result.status == 0, result.output
    limit, own, under_horovodrun, ddp = read(tmp_path / "compare.json")["2x1gbit"]["summary"]
    assert under_horovodrun["name"] == "hvdlm horovodrun-gloo none"
    assert under_horovodrun["wire_bytes"] == own["wire_bytes"]
    assert limit["interface_bytes"] < 0.1 * own["interface_bytes"]
    assert own["interface_bytes"] == pytest.approx(own["wire_bytes"], rel=0.15)  # small messages, large headers
    assert limit["peak_interface_rate"] < own["peak_interface_rate"] < 1.1 * 1e9 / 8  # bytes/s of the link
    assert ddp["interface_bytes"] == pytest.approx(own["wire_bytes"], rel=0.15)


FRAIL = """
from pathlib import Path

from hvdlm.gradients.codecs.dense import Dense


class Frail(Dense):
    def reduce_(self, *arguments):
        if not Path(__file__).with_name("mended").exists():
            Path(__file__).with_name("mended").touch()
            raise RuntimeError("frail")
        super().reduce_(*arguments)
"""


@pytest.mark.thorough
def test_a_system_that_crashes(small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "frail.py").write_text(FRAIL)
    codec = f"{tmp_path / 'frail.py'}:Frail"
    result = compare(small_data, tmp_path, "--setup", "one-host", "--codecs", codec, "--engines", "mpi", "--peers")
    assert result.status == 1
    assert re.search(
        r"compare\.py: error: do not use these figures: .*Frail crashed: RuntimeError: frail", result.output
    )
    systems = {each["name"]: each for each in read(tmp_path / "compare.json")["one-host"]["systems"]}
    assert (systems["DDP"]["starts"], systems["DDP"]["crashes"]) == (1, [])
    frail = systems[f"hvdlm mpi {codec}"]
    assert (frail["starts"], len(frail["crashes"])) == (2, 1)
    assert None not in frail["measurements"]
    assert "crashed in 1 of 2 starts" in (tmp_path / "compare.md").read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--setup", "two-hosts"], "set-up 'two-hosts' is unknown"),
        (["--setup", "one-host", "--model.width", "33"], "model.width = 33 is not a multiple"),
        (["--rounds", "0"], "give 1 or more --rounds"),
        (["--setup", "one-host", "--data", "missing"], "missing"),
    ],
)
def test_compare_refuses(options: list[str], sentence: str, small_data: Path, tmp_path: Path) -> None:
    result = run_here(*compare_words(small_data, tmp_path, *options))
    assert result.status == 1
    assert result.output.startswith("compare.py: error: ")
    assert sentence in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.thorough
def test_convergence_goes_on_where_it_was(small_data: Path, tmp_path: Path) -> None:
    first = converge(small_data, tmp_path, "--codecs", "none", "--seeds", "1")
    assert first.status == 0, first.output
    metrics = tmp_path / "runs" / "none-seed0" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    second = converge(small_data, tmp_path, "--codecs", "none", "--no-error-feedback", "fp16", "--seeds", "1")
    assert second.status == 0, second.output
    assert re.search(r"2 runs on \d+\.\d MB of text, 1 of them finished", second.output)
    assert metrics.stat().st_mtime_ns == before
    study = read(tmp_path / "convergence.json")
    assert [(run["variant"], run["seed"]) for run in study["runs"]] == [("none", 0), ("fp16, no feedback", 0)]
    for run_ in study["runs"]:
        assert [point["tokens"] for point in run_["points"]] == [10 * 4 * 32, 20 * 4 * 32]
        assert 0 < run_["points"][0]["seconds"] < run_["points"][1]["seconds"]
    dense, half = (run_["points"][-1]["loss"] for run_ in study["runs"])
    assert half == pytest.approx(dense, rel=0.01)
    assert study["runs"][0]["wire_bytes"] == pytest.approx(2 * study["runs"][1]["wire_bytes"], rel=0.01)
    assert "| none | 1 |" in (tmp_path / "convergence.md").read_text()
    assert (tmp_path / "convergence.png").exists()

    other = converge(small_data, tmp_path, "--codecs", "none", "--seeds", "1", "--optimizer.lr", "0.5")
    assert other.status == 1
    assert "holds a run with other settings" in other.output
