"""The rows of one_rank.py's results, and its table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.results import format_number, markdown_table
from hvdlm.config import Config
from hvdlm.model.memory import training_memory_bytes
from hvdlm.model.size import flops_per_token
from one_rank.configurations import AUTOCAST_EAGER, FP32_EAGER, SYSTEMS
from one_rank.process import Start, StepTime

_COLUMNS = (
    "",
    "tokens/s",
    "over fp32 eager",
    "over autocast eager",
    "products, TFLOP/s",
    "utilisation",
    "memory, MB",
    "predicted, MB",
    "first step, s",
    "the same, cold, s",
    "loader over training",
)


@dataclass
class SystemResult:
    """What was measured of a system."""

    config: Config
    first_step_seconds: float
    cold_first_step_seconds: float | None  # with an empty compiler cache; None: not compiled
    start: Start
    step_times: list[StepTime] = field(default_factory=list)  # by round


def make_row(name: str, results: Mapping[str, SystemResult], vocab_size: int) -> dict[str, Any]:
    """The row of a system in one_rank.json. Figures are medians over rounds; a ratio is between two systems of the same
    round."""
    own = results[name]
    config, step_times = own.config, own.step_times
    vocab_size = config.model.vocab_size or vocab_size
    tokens = config.train.global_batch_size * config.model.context_length
    flops = flops_per_token(config.model, vocab_size) * tokens
    rates = [each.peak_flops for each in step_times if each.peak_flops]
    has_rates = len(rates) == len(step_times)
    train, device = config.train, "cpu" if own.start.base_bytes else "cuda"
    memory = training_memory_bytes(
        config.model,
        vocab_size,
        min(train.micro_batch_size, train.global_batch_size),
        train.precision,
        device,
        train.compile,
        train.activation_checkpointing,
    )

    def speed_over(reference: str) -> float | None:
        if reference not in results:
            return None
        pairs = zip(results[reference].step_times, step_times, strict=True)
        return statistics.median(other.step_seconds / each.step_seconds for other, each in pairs)

    def utilisation() -> float | None:
        if not has_rates:
            return None
        pairs = zip(step_times, rates, strict=True)
        return statistics.median(flops / each.step_seconds / rate for each, rate in pairs)

    return {
        "name": name,
        "tokens_per_second": statistics.median(tokens / each.step_seconds for each in step_times),
        "over_fp32_eager": speed_over(FP32_EAGER),
        "over_autocast_eager": speed_over(AUTOCAST_EAGER),
        "product_flops": statistics.median(rates) if has_rates else None,
        "utilisation": utilisation(),
        "memory_bytes": max(each.memory_bytes for each in step_times),
        "predicted_bytes": None if SYSTEMS[name].is_plain else own.start.base_bytes + memory.total,
        "first_step_seconds": own.first_step_seconds,
        "first_step_seconds_cold": own.cold_first_step_seconds,
        "loader_tokens_per_second": own.start.loader_tokens_per_second,
        "step_seconds": [each.step_seconds for each in step_times],
    }


def table(results: Mapping[str, Any]) -> str:
    """Markdown of the results in one_rank.json: one table per model, under its machine and settings."""
    return "\n".join(_model_table(model, result) for model, result in results.items())


def _model_table(model: str, result: Mapping[str, Any]) -> str:
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    conditions = (
        f"{settings['train']['global_batch_size']} sequences of {settings['model']['context_length']} tokens a step, "
        f"{settings['train']['threads']} threads on {machine['cores']} cores of {machine['cpu']}{gpu}; "
        f"torch {versions['torch']}; medians of {settings['rounds']} rounds of {settings['steps']} steps, "
        f"{result['date']}."
    )
    return f"## {model}\n\n{conditions}\n\n{markdown_table(_COLUMNS, [_cells(row) for row in result['rows']])}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["name"],
        f"{row['tokens_per_second']:,.0f}",
        format_number(row["over_fp32_eager"], "{:.2f}"),
        format_number(row["over_autocast_eager"], "{:.2f}"),
        format_number(row["product_flops"], "{:.2f}", 1e-12),
        format_number(row["utilisation"], "{:.0%}"),
        format_number(row["memory_bytes"], "{:,.0f}", 1e-6),
        format_number(row["predicted_bytes"], "{:,.0f}", 1e-6),
        format_number(row["first_step_seconds"], "{:.1f}"),
        format_number(row["first_step_seconds_cold"], "{:.1f}"),
        format_number(row["loader_tokens_per_second"], "{:,.0f}", 1 / row["tokens_per_second"]),
    ]
