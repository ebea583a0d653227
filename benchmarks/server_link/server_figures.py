"""The table and the picture of server_link.py: servers over all-reduce, by how many servers there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.plots import save_png
from common.results import markdown_table
from hvdlm.report.palette import BLUE, ORANGE

# BytePS over Horovod with NCCL, by its authors: github.com/bytedance/byteps, docs/performance.md. 8 V100s a machine,
# batches of 64 a GPU, float32; 20 Gbit/s TCP with NVLink, 100 Gbit/s RDMA with PCIe switches. As many servers as
# workers, on machines without GPUs.
BYTEPS = {
    "VGG16, 20 Gbit/s TCP": 2.00,
    "ResNet50, 20 Gbit/s TCP": 1.44,
    "VGG16, 100 Gbit/s RDMA": 1.17,
    "ResNet50, 100 Gbit/s RDMA": 1.07,
}


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for each job and number of servers, then BytePS's."""
    rows = []
    for name, job in results.items():
        for row in job["rows"]:
            low, high = row["range"]
            at_best = "" if row["links"] is None else f"{row['links']:.2f}"
            cells = [name, str(row["servers"]), f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}", at_best]
            rows.append([*cells, f"{row['tokens_per_second']:,.0f}"])
    own = markdown_table(["job", "servers", "of all-reduce", "range", "of links alone", "tokens/s"], rows)
    theirs = [[name, f"{ratio:.2f}"] for name, ratio in BYTEPS.items()]
    return f"{own}\n{markdown_table(['BytePS, published', 'of Horovod'], theirs)}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG with a panel for each job."""
    figure = Figure(figsize=(4.2 * len(results), 3.4), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False).flatten()
    for panel, (name, job) in zip(panels, results.items(), strict=True):
        _draw_job(panel, name, job["rows"])
    panels[0].set_ylabel("tokens per second, over those of all-reduce", fontsize=9)
    save_png(figure, path)


def _draw_job(panel: Axes, name: str, rows: list[dict[str, Any]]) -> None:
    panel.set_title(name, fontsize=9)
    panel.axhline(1, color="black", linewidth=0.8, linestyle="--")
    for label, ratio in BYTEPS.items():
        if "TCP" in label:
            panel.axhline(ratio, color=ORANGE, linewidth=0.8, linestyle=":")
            panel.annotate(
                f"BytePS, {label}", (0.01, ratio), xycoords=("axes fraction", "data"), fontsize=6, va="bottom"
            )
    servers = [row["servers"] for row in rows]
    ratios = [row["ratio"] for row in rows]
    errors = [[row["ratio"] - row["range"][0] for row in rows], [row["range"][1] - row["ratio"] for row in rows]]
    panel.errorbar(servers, ratios, yerr=errors, color=BLUE, marker="o", linewidth=0, elinewidth=1, label="measured")
    if all(row["links"] is not None for row in rows):
        panel.plot(servers, [row["links"] for row in rows], color=BLUE, linewidth=0.8, label="of links alone")
    panel.set_xscale("log", base=2)
    panel.set_xticks(servers, [str(each) for each in servers])
    panel.set_xlabel("servers", fontsize=9)
    panel.set_ylim(0, 2.2)
    panel.legend(fontsize=7, loc="lower right")
