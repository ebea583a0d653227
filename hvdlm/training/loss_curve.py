"""loss.png: a run's loss over tokens, drawn from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from hvdlm.training.metrics import read_metrics


def draw_loss_curve(run_dir: Path) -> None:
    """Writes loss.png: training and validation loss, nats per token, over tokens trained on."""
    # Imported here: it takes 0.4 s, which every rank would spend at its start, and rank 0 alone draws
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run_dir / "metrics.jsonl")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, label, style in (("train", "training", {"linewidth": 1}), ("eval", "validation", {"marker": "o"})):
        points = [(r["tokens"], r["loss"]) for r in records if r["kind"] == kind and r["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.set_title(run_dir.name, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(run_dir / "loss.png")
