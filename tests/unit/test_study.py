"""The parts of a scaling study that start no job: study files, summaries, tables, checks of sums."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from planted import make_point

import allreduce
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.errors import HvdlmError
from hvdlm.report.page import Section, Table, html
from hvdlm.scaling.holdout import hold_out
from scaling import figures
from scaling.collectives import Way
from scaling.efficiency import shortfall_of_auto, summarise
from scaling.markdown_page import markdown
from scaling.study import job_specs, make_config, read_study

STUDY = """
name = "small"
place = "fabric"
ranks = [1, 2]
links = ["100mbit", "1gbit"]
codecs = ["none", "topk"]
batch_sizes = [6]
data = "nowhere"
"""


def test_one_rank_is_measured_once_whatever_the_links(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(STUDY)
    study = read_study(file, simulate=500.0)
    assert study.simulated_tokens_per_second == 500.0
    names = [spec.name for spec in job_specs(study)]
    assert names == ["r1-100mbit-b6", "r2-100mbit-b6", "r2-1gbit-b6"]
    two = list(job_specs(study))[1]
    assert two.point_name("my/own.py:Codec") == "r2-100mbit-b6-own-py-Codec"
    weak, strong = (make_config(study, two, "topk", mode) for mode in ("weak", "strong"))
    assert (weak.train.global_batch_size, strong.train.global_batch_size) == (12, 6)
    assert weak.compression.codec == "topk"


def test_the_time_limit_of_a_job_is_called_patience_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(STUDY + "patience = 60\n")
    assert read_study(file, None).time_limit == 60.0


def test_a_host_s_link_has_one_rate(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(STUDY.replace("fabric", "slurm"))
    with pytest.raises(HvdlmError, match="only a fabric's links can be given several rates"):
        read_study(file, None)


def test_efficiency_and_the_shortfall_of_auto() -> None:
    points = [
        make_point(1, 1e9, seconds=1.0),
        make_point(2, 1e9, seconds=2.0),
        make_point(2, 1e9, "fp16", seconds=1.25),
        make_point(2, 1e9, "none", seconds=1.3).model_copy(update={"codec": "auto"}),
    ]
    by_name = {(each.point.codec, each.point.ranks): each for each in summarise(points)}
    assert by_name["none", 1].efficiency == 1.0
    assert by_name["none", 2].efficiency == pytest.approx(0.5)
    assert by_name["fp16", 2].efficiency == pytest.approx(0.8)
    assert by_name["fp16", 2].parts == pytest.approx(
        {"data": 0.01, "compute": 0.3, "exposed communication": 0.91, "optimizer": 0.03}
    )
    ((_, best, shortfall),) = shortfall_of_auto(list(by_name.values()))
    assert (best.point.codec, shortfall) == ("fp16", pytest.approx(1 - 1.25 / 1.3))


def test_figures_of_all_kinds(tmp_path: Path) -> None:
    points = [make_point(ranks, link) for link in (1e8, 1e9) for ranks in (1, 2, 4)]
    summaries = summarise(points)
    drawn = [figures.throughput(summaries), figures.efficiency(summaries), figures.time_per_step(summaries)]
    drawn.append(figures.predictions(hold_out(points)))
    row = {"dtype": "float32", "way": "a", "nbytes": 4, "bus_bandwidth": 1e9}
    drawn.append(figures.bus_bandwidth([{"rows": [row], "ranks": 2, "hosts": ["a", "b"]}], [1e9]))
    drawn.append(figures.loss_over_time([{"seed": 0, "variant": "none", "points": [{"seconds": 1.0, "loss": 2.0}]}]))
    for index, figure in enumerate(drawn):
        assert figures.save(figure, tmp_path / str(index)).startswith("<svg")
        assert (tmp_path / f"{index}.png").stat().st_size > 1000


def test_throughput_and_its_ideal_in_one_panel_per_link_and_batch_size() -> None:
    points = [make_point(1, 1e9, seconds=0.5), *(make_point(2, link, seconds=1.0) for link in (1e8, 1e9))]
    larger = [
        point.model_copy(
            update={
                "settings": {
                    **point.settings,
                    "train": {**point.settings["train"], "global_batch_size": 8 * point.ranks},
                },
                "tokens_per_step": 2 * point.tokens_per_step,
            }
        )
        for point in points
    ]
    figure = figures.throughput(summarise([*points, *larger]))
    tokens = points[0].tokens_per_step
    assert len(figure.axes) == 4
    for axes, batch in zip(figure.axes, (4, 4, 8, 8), strict=True):
        assert f"{batch} sequences of a rank" in axes.get_title()
        ideal, measured = (list(line.get_ydata()) for line in axes.lines[:2])
        assert ideal == pytest.approx([tokens * batch / 2, tokens * batch])
        assert measured == pytest.approx([tokens * batch / 2, tokens * batch / 2])


def test_pages() -> None:
    table = Table(("a", "b"), [("1", "<2>")])
    sections = [Section("Title", "Text & more", "<svg></svg>", table)]
    page = html("Study", "lead", sections)
    assert "Text &amp; more" in page and "<td>&lt;2&gt;</td>" in page and "<svg></svg>" in page
    assert "| 1 | <2> |" in markdown("Study", "lead", sections)


def test_wrong_sums_are_counted() -> None:
    solo, cpu = SoloCommunicator(), torch.device("cpu")
    right = Way("right", (torch.float32,), lambda values: values)
    wrong = Way("wrong", (torch.float32,), lambda values: values[3:].add_(1))
    assert allreduce._row(right, torch.float32, 40, solo, cpu).wrong == 0
    assert allreduce._row(wrong, torch.float32, 40, solo, cpu).wrong == 7
