"""Scaling studies from end to end: points, a kill in between, a rank that sums wrongly, a report, a trace."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from launcher import Result, launcher_command, run, start
from scripts import run_here, script_command
from thorough import thorough

from hvdlm.scaling.point import read_points

STUDY = """
name = "small"
place = "local"
ranks = [1, 2]
codecs = ["none", {codec!r}]
batch_sizes = [2]
repetitions = {repetitions}
steps = 2
warmup_steps = 1
simulated_tokens_per_second = 400
data = {data!r}

[settings.model]
layers = 1
heads = 2
width = 32
context_length = 32

[settings.train]
micro_batch_size = 2
"""

WRONG_SUM = """
from hvdlm.gradients.codecs.dense import Dense


class WrongSum(Dense):
    def reduce_(self, gradients, exchange, step):
        super().reduce_(gradients, exchange, step)
        if exchange.rank == 1:
            gradients[0] += 1
"""


def write_study(data: Path, directory: Path, codec: str, repetitions: int = 2) -> list[str]:
    file = directory / "study.toml"
    file.write_text(STUDY.format(codec=codec, repetitions=repetitions, data=str(data)), encoding="utf-8")
    return ["scaling.py", "weak", str(file), "--output", str(directory)]


def report(directory: Path) -> Result:
    return run_here("report.py", str(directory))


@pytest.mark.thorough
def test_a_killed_study_goes_on_where_it_stopped(small_data: Path, tmp_path: Path) -> None:
    command = write_study(small_data, tmp_path, "fp16")
    points = tmp_path / "small-weak"
    deadline = time.monotonic() + 200
    with start(script_command(*command)) as job:
        while len(list(points.glob("r2-*.point.json"))) < 2:  # the first repetition is there
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.process.send_signal(signal.SIGKILL)
        job.finish(deadline=60)
    before = {point.place.ranks: point.repetitions[0] for point in read_points(points) if point.codec == "none"}
    result = run_here(*command)
    assert result.status == 0, result.output
    after = read_points(points)
    assert sorted((point.ranks, point.codec) for point in after) == [(1, "fp16"), (1, "none"), (2, "fp16"), (2, "none")]
    for point in after:  # four, as the line before says
        assert len(point.repetitions) == 2 and point.is_valid
        assert [len(steps) for steps in point.repetitions[0].step_seconds] == [2] * point.ranks
        assert point.repetitions[0].seconds >= 0.16  # 64 tokens at 400 a second; real passes take a tenth of it
        if point.codec == "none":
            assert point.repetitions[0] == before[point.ranks]
            first, second = point.repetitions
            assert first.parameter_hashes == second.parameter_hashes
    again = run_here(*command)
    assert (again.status, "all 4 points are there" in again.output) == (0, True)
    study = tmp_path / "study.toml"
    study.write_text(study.read_text(encoding="utf-8").replace("layers = 1", "layers = 2"), encoding="utf-8")
    changed = run_here(*command)
    assert (changed.status, "was measured with other settings" in changed.output) == (1, True)
    assert report(points).status == 0
    page = (points / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 3 and "src=" not in page and 'href="http' not in page
    assert "| fp16 | 2 |" in (points / "report.md").read_text(encoding="utf-8")
    assert (points / "throughput.png").exists()


@pytest.mark.thorough
def test_local_steps_are_measured_in_whole_rounds(small_data: Path, tmp_path: Path) -> None:
    """Beside a codec of every step; the fit knows what a round takes, and forecasts from it."""
    result = run_here(*write_study(small_data, tmp_path, "int4/4/2/1", repetitions=1))
    assert result.status == 0, result.output
    points = {(point.ranks, point.codec): point for point in read_points(tmp_path / "small-weak")}
    assert sorted(points) == [(1, "int4/4/2/1"), (1, "none"), (2, "int4/4/2/1"), (2, "none")]
    local, every_step = points[2, "int4/4/2/1"], points[2, "none"]
    assert local.is_valid and (local.codec_name, local.every, len(local.buckets)) == ("int4", 4, 2)
    assert (len(local.repetitions[0].step_seconds[0]), len(every_step.repetitions[0].step_seconds[0])) == (4, 2)
    # an eighth of the bytes or a bit more, in every fourth step; small tensors travel as they are
    assert 1 / 32 < local.repetitions[0].wire_bytes / every_step.repetitions[0].wire_bytes < 1 / 4
    fit = tmp_path / "fit.json"
    assert run(["hvdlm", "fit", str(tmp_path / "small-weak"), "--output", str(fit)], deadline=60).status == 0
    assert json.loads(fit.read_text(encoding="utf-8"))["codecs"].keys() == {"int4", "none"}


@pytest.mark.thorough
def test_a_rank_that_sums_wrongly_makes_its_point_invalid(small_data: Path, tmp_path: Path) -> None:
    codec = tmp_path / "wrong.py"
    codec.write_text(WRONG_SUM, encoding="utf-8")
    result = run_here(*write_study(small_data, tmp_path, f"{codec}:WrongSum", repetitions=1))
    assert result.status == 1
    assert "ranks ended with different models, so do not use r2-b2-wrong-py-WrongSum.point.json" in result.output
    points = read_points(tmp_path / "small-weak")
    assert [(point.ranks, point.is_valid) for point in points if not point.is_valid] == [(2, False)]
    assert report(tmp_path / "small-weak").output.count("3 of 4 points are valid") == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (('place = "local"', 'place = "moon"'), "place: Input should be 'local', 'fabric', 'hostfile' or 'slurm'"),
        (('codecs = ["none"', 'codecs = ["zip"'), "compression.codec = 'zip' is unknown"),
        (("layers = 1", "layers = 0"), "model.layers = 0"),
        (('place = "local"', 'place = "fabric"'), "a fabric needs links"),
        (("[settings.train]", "[settings.trains]"), "unknown key trains"),
        (("[settings.train]", '[settings.local_steps]\nevery = "auto"\n[settings.train]'), "every = 'auto' chooses by"),
        (
            ('place = "local"', 'place = "hostfile"\nhostfile = "HOSTS"'),
            "hosts has too few hosts for 2 ranks",
        ),
    ],
)
def test_a_study_that_cannot_be_is_told_before_anything_runs(
    small_data: Path, tmp_path: Path, change: tuple[str, str], sentence: str
) -> None:
    command = write_study(small_data, tmp_path, "fp16")
    file = tmp_path / "study.toml"
    hosts = tmp_path / "hosts"
    hosts.write_text("h1\n", encoding="utf-8")
    file.write_text(file.read_text().replace(*change).replace("HOSTS", str(hosts)), encoding="utf-8")
    result = run_here(*command)
    assert (result.status, sentence in result.output, "Traceback" in result.output) == (1, True, False), result.output


def test_every_way_to_sum_is_checked_and_timed(tmp_path: Path) -> None:
    sizes = ["--smallest", "4b", "--largest", "64kb", "--factor", "16", "--dtypes", "float32", "bfloat16"]
    options = [*sizes, "--codecs", "topk", "--output", str(tmp_path)]
    result = run([*launcher_command("mpirun", 2), *script_command("allreduce.py", *options)], deadline=200)
    assert result.status == 0, result.output
    rows = json.loads((tmp_path / "allreduce-results.json").read_text())["rows"]
    assert {row["nbytes"] for row in rows} == {4, 64, 1024, 16384}
    assert {row["wrong"] for row in rows} == {0}
    ways = {row["way"] for row in rows}
    assert {"hvdlm mpi", "mpi4py Allreduce", "torch.distributed all_reduce", "hvdlm ring over mpi"} <= ways
    for row in rows:
        assert row["p50"] <= row["p95"] <= row["p99"]
        assert row["bus_bandwidth"] == pytest.approx(row["nbytes"] / row["p50"])  # 2 (n - 1) / n is 1 for two ranks


@pytest.mark.timing
def test_a_trace_has_every_bucket_of_every_rank(small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.toml").touch()
    words = ["--model.layers", "1", "--comm.bucket_mb", "0.05", "--comm.algorithm", "ring", "--data.path"]
    words = [str(tmp_path / "empty.toml"), "--output", str(tmp_path / "trace.json"), *words, str(small_data)]
    result = run([*launcher_command("mpirun", 2), *script_command("timeline.py", *words)], deadline=100)
    assert result.status == 0, result.output
    content = json.loads((tmp_path / "trace.json").read_text())
    assert 0 <= content["otherData"]["clock_error_seconds"] < 0.1
    spans = [event for event in content["traceEvents"] if event["ph"] == "X"]
    for rank in (0, 1):
        own = [span for span in spans if span["pid"] == rank]
        buckets = [span for span in own if span["cat"] == "codec"]
        assert [span["name"] for span in buckets] == [f"bucket {index + 1}" for index in range(len(buckets))]
        assert len(buckets) > 2
        assert len([span for span in own if span["cat"] == "wire"]) == len(buckets)
        phases = {span["name"]: span for span in own if span["cat"] == "compute"}
        assert {"data", "forward", "backward", "wait", "optimizer"} == phases.keys()
        backward = phases["backward"]
        assert buckets[0]["ts"] < backward["ts"] + backward["dur"]  # on its way before the pass has ended


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [thorough(3, ["--server.ranks", "1"]), (2, ["--parallel.shard", "2"])],
    ids=["server", "shard"],
)
def test_a_trace_of_parameters_that_others_keep(
    ranks: int, settings: list[str], small_data: Path, tmp_path: Path
) -> None:
    """Gradients leave and parameters come within the step, on every rank that trains; a server adds each bucket of
    each worker.
    """
    (tmp_path / "empty.toml").touch()
    words = [str(tmp_path / "empty.toml"), "--output", str(tmp_path / "trace.json"), "--model.layers", "1", *settings]
    words += ["--comm.bucket_mb", "0.05", "--data.path", str(small_data)]
    result = run([*launcher_command("mpirun", ranks), *script_command("timeline.py", *words)], deadline=100)
    assert result.status == 0, result.output
    spans = [each for each in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if each["ph"] == "X"]
    names = {rank: [span["name"] for span in spans if span["pid"] == rank] for rank in range(ranks)}
    workers = 2
    for rank in range(workers):
        assert {"data", "forward", "backward", "wait", "optimizer"} <= set(names[rank])
        assert any(name.startswith("bucket") for name in names[rank])
    if ranks > workers:
        buckets = sum(name.startswith("bucket") for name in names[0])
        added = [name for name in names[2] if name.startswith("bucket")]
        assert sorted(added) == sorted(f"bucket {n + 1} of rank {rank}" for n in range(buckets) for rank in (0, 1))
        assert names[2].count("apply") == 1
        assert sum(name == "pull" for name in names[0]) >= buckets
