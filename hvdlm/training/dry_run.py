"""`hvdlm train --dry-run`: what a run would do, before it costs anything."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hvdlm.comm.launch import Launch
from hvdlm.comm.mesh import mesh_shape
from hvdlm.config import Config
from hvdlm.gradients.codecs.registry import bucket_bytes
from hvdlm.model.memory import sharded_memory, training_memory_bytes
from hvdlm.model.size import flops_per_token, parameter_count
from hvdlm.strategies.local_steps.fragment import numbers_kept
from hvdlm.training.hardware import device_type, libraries_bytes


def print_dry_run(config: Config, vocab_size: int, launch: Launch) -> None:
    """Prints the resolved settings, then sizes, memory and batch, to stdout."""
    console = Console(highlight=False)
    print(config.to_toml())  # not by rich, which would break long lines
    train, model = config.train, config.model
    share = -(-train.global_batch_size // launch.size)
    micro_batch = min(train.micro_batch_size, share)
    device = device_type(train.device)
    memory = training_memory_bytes(
        model,
        vocab_size,
        micro_batch,
        train.precision,
        device,
        train.compile,
        train.activation_checkpointing,
        config.optimizer.algorithm,
    )
    numbers = memory.parameters  # bytes of all of them in float32
    shards = mesh_shape(config.parallel, launch.size)["shard"]
    if config.parallel.shard:
        bucket = bucket_bytes(config.comm, config.compression, 1, device)
        memory = sharded_memory(memory, model, vocab_size, config.parallel.shard, shards, bucket)
    residuals = numbers if _keeps_residuals(config) and launch.size > 1 else 0
    residuals *= 1 + config.comm.elastic + 2 * config.comm.mirror_residuals  # before the step; of the rank before
    averages = numbers * numbers_kept(config.local_steps, config.comm.elastic) if config.local_steps.every else 0
    moving_average = numbers // shards if train.ema else 0
    libraries = libraries_bytes() if device == "cpu" else 0
    parts = {
        "weights and optimizer": memory.parameters + memory.cast_parameters + memory.gradients + memory.moments,
        "residuals of the codec": residuals,
        "averages of local steps": averages,
        "moving average of weights": moving_average,
        "activations": memory.activations,
        "loss": memory.loss,
        "temporary, and gaps between": memory.temporary + memory.gaps,
        "libraries": libraries,
    }
    whole = memory.total + residuals + averages + moving_average + libraries
    tokens = train.global_batch_size * model.context_length
    table = Table(show_header=False, box=None)
    rows = {
        "parameters": f"{parameter_count(model, vocab_size):,}",
        "vocabulary": f"{vocab_size:,}",
        "ranks": f"{launch.size}",
        "sequences per step": f"{train.global_batch_size:,}, at most {share:,} a rank, {micro_batch:,} at once",
        "micro-batches per step": f"{-(-share // micro_batch):,}",
        "tokens per step": f"{tokens:,}",
        "tokens in all": f"{tokens * config.planned_steps:,}",
        "arithmetic in all": f"{flops_per_token(model, vocab_size) * tokens * config.planned_steps / 1e12:,.1f} TFLOP",
        "memory a rank, estimated": f"{whole / 2**20:,.0f} MiB",
        **{f"  {name}": f"{nbytes / 2**20:,.0f} MiB" for name, nbytes in parts.items() if nbytes},
    }
    if config.checkpoint.every:
        copied = numbers // shards + memory.moments + moving_average
        rows["host memory of rank 0 besides"] = f"{copied / 2**20:,.0f} MiB, to copy a checkpoint"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _keeps_residuals(config: Config) -> bool:
    return config.compression.codec != "none" and config.compression.error_feedback
