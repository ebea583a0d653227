"""What links alone allow, by hand, and the files of benchmarks/server_link.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from server_link.link_seconds import Job, all_reduce_seconds, server_seconds
from server_link.server_figures import draw, table


def test_links_by_hand() -> None:
    """A megabyte on links of a megabyte a second: a ring of 4 sends 1.5 MB beside 2 s of a backward pass."""
    computing, sending = Job(4, 3.0, 1e6, 1e6), Job(4, 0.0, 1e6, 1e6)
    assert all_reduce_seconds(computing) == pytest.approx(3.0)
    assert server_seconds(computing, 4) == pytest.approx(3.0)  # all is hidden, forward and backward
    assert server_seconds(computing, 1) == pytest.approx(4.0 + 4.0)  # 4 MB in, then 4 MB out
    assert all_reduce_seconds(sending) == pytest.approx(1.5)
    assert server_seconds(sending, 2) == pytest.approx(4.0)
    assert server_seconds(sending, 4) == server_seconds(sending, 8) == pytest.approx(2.0)


@pytest.mark.parametrize(("workers", "ratio"), [(4, 2.0 / 2.0), (8, 2.25 / 2.0), (16, 2.375 / 2.0)])
def test_what_servers_send_hides_behind_the_forward_pass(workers: int, ratio: float) -> None:
    """Passes of 0.5 and 1 s: a ring's second half is beside the backward pass, too, servers' is not."""
    job = Job(workers, 1.5, 1e6, 1e6)
    assert all_reduce_seconds(job) / server_seconds(job, workers) == pytest.approx(ratio)


def test_table_and_picture(tmp_path: Path) -> None:
    rows = [
        {"servers": servers, "tokens_per_second": 500.0, "ratio": ratio, "range": [ratio, ratio + 0.1], "links": links}
        for servers, ratio, links in [(1, 0.25, 0.3), (4, 0.9, None)]
    ]
    results = {"4 workers, 1gbit, computing": {"rows": rows}}
    text = table(results)
    assert "| 4 workers, 1gbit, computing | 1 | 0.250 | 0.250 to 0.350 | 0.30 | 500 |" in text
    assert "| 4 workers, 1gbit, computing | 4 | 0.900 | 0.900 to 1.000 |  | 500 |" in text
    draw(results, tmp_path / "server_link.png")
    assert (tmp_path / "server_link.png").read_bytes().startswith(b"\x89PNG")
