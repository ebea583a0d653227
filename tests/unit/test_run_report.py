"""`hvdlm report`: its figures and tables are those of the runs' own files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from forked import hvdlm

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.report.run_report import write_report


def train(step: int, loss: float | None, **values: Any) -> dict[str, Any]:
    measured = {"lr": 1e-3, "grad_norm": 1.5, "tokens_per_second": 1000.0, "step_seconds": 0.5, "wire_bytes": 2e6}
    measured |= {"exposed_comm_seconds": 0.1, "world_size": 2, "tokens": 512 * step}
    return {"kind": "train", "step": step, "loss": loss, **measured, **values}


def make_run(path: Path, records: list[dict[str, Any]], **settings: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "config.toml").write_text(Config.model_validate(settings).to_toml())
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    records = [
        train(1, 5.0),
        {"kind": "eval", "step": 10, "loss": 3.25, "tokens": 5120},
        train(10, None, tokens_per_second=3000.0),
        {"kind": "eval", "step": 20, "loss": 3.5, "tokens": 10240},
        {"kind": "event", "step": 20, "message": "saved <here>"},
        train(20, 4.0, exposed_comm_seconds=0.3, wire_bytes=5e6, tokens_per_second=2000.0),
    ]
    records += [{"kind": "tasks", "step": step, "quiz/acc": step / 80} for step in (10, 20)]
    first = make_run(tmp_path / "one", records, train={"steps": 40}, optimizer={"warmup_steps": 1})
    second = make_run(tmp_path / "two", [], train={"steps": 40}, optimizer={"warmup_steps": 2})
    return [first, second]


def cells(page: str, title: str) -> list[list[str]]:
    """The rows of the table below a heading, without its head."""
    table = page[page.index(f"<h2>{title}</h2>") :]
    table = table[table.index("<table>") : table.index("</table>")]
    return [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]


def test_tables(runs: list[Path]) -> None:
    assert write_report(runs, None) == 0
    page = (runs[0] / "report.html").read_text()
    # the median of 1000, 3000 and 2000 tokens/s; 0.2, 0.2 and 0.6 of a step; 2, 2 and 5 MB
    expected = ["20 of 40", "2", "10,240", "4.0000", "3.5000", "3.2500 (step 10)", "2,000", "33.3%", "3.00"]
    assert cells(page, "Runs") == [[str(runs[0]), *expected], [str(runs[1]), "0 of 40", *[""] * 8]]
    assert cells(page, "Settings that differ") == [["optimizer.warmup_steps", "1", "2"]]
    assert cells(page, "Scores in tasks") == [[str(runs[0]), "10", "0.1250"], [str(runs[0]), "20", "0.2500"]]
    assert cells(page, "Events") == [[str(runs[0]), "20", "saved &lt;here&gt;"]]


def test_the_page_needs_nothing_else(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 6
    assert "src=" not in page
    assert not re.search(r'href="(?!#)', page.replace('xlink:href="#', 'href="#'))
    write_report(runs, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_seconds_are_those_of_all_steps(runs: list[Path]) -> None:
    from hvdlm.report.run_report import _read

    assert _read(runs[0]).seconds() == [0.5, 5.0, 10.0]


def test_a_run_that_went_on_from_another_s_checkpoint(tmp_path: Path) -> None:
    from hvdlm.report.run_report import _read

    first = {"kind": "event", "step": 1001, "message": "first step done, 3.0 s after the process began"}
    run = make_run(tmp_path / "run", [first, train(1010, 3.0), train(1020, 3.0)])
    assert _read(run).seconds() == [5.0, 10.0]


def test_names_are_no_formulas(tmp_path: Path) -> None:
    run = make_run(tmp_path / "_a$x$^^b", [train(1, 3.0), train(2, 2.0)])
    assert write_report([run], None) == 0
    assert (run / "report.html").read_text().count("_a$x$^^b") > 6


def test_what_is_no_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    for content in (b"\xff\xfe", b'{"step": 1}\n', b"[1]\n"):
        (run / "metrics.jsonl").write_bytes(content)
        with pytest.raises(HvdlmError, match=r"is not the metrics\.jsonl of a run"):
            write_report([run], None)


def test_a_run_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match=r"none holds no metrics\.jsonl: give the directory of a run"):
        write_report([tmp_path / "none"], None)


def test_a_page_that_cannot_be_written(runs: list[Path], tmp_path: Path) -> None:
    done = hvdlm("report", str(runs[0]), "--output", str(tmp_path / "no" / "page.html"), cwd=tmp_path)
    assert done.returncode == 1
    assert f"cannot write {tmp_path / 'no' / 'page.html'}: No such file or directory" in done.stderr
