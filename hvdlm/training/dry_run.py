"""`hvdlm train --dry-run`: what a run would do, before it costs anything."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hvdlm.comm.launch import Launch
from hvdlm.comm.mesh import mesh_shape
from hvdlm.config import Config
from hvdlm.config.server import no_workers
from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.registry import bucket_bytes
from hvdlm.model.layout import Layout, micro_batches, most_parameters
from hvdlm.model.memory import training_memory_bytes
from hvdlm.model.size import flops_per_token, parameter_count
from hvdlm.scoring.harness import split_names
from hvdlm.strategies.local_steps.fragment import numbers_kept
from hvdlm.training.hardware import device_type, libraries_bytes
from hvdlm.training.model import blocks_of_stages


def print_dry_run(config: Config, vocab_size: int, launch: Launch) -> None:
    """Prints the resolved settings, then sizes, memory and batch, to stdout.

    Raises HvdlmError for ranks that cannot be arranged by [parallel], or of which too many are servers.
    """
    servers = config.server.ranks
    if servers >= launch.size:
        raise HvdlmError(no_workers(servers, launch.size))
    stages = blocks_of_stages(config, vocab_size) if config.parallel.pipeline > 1 else ()
    layout = Layout.of_mesh(config.parallel, mesh_shape(config.parallel, launch.size - servers), stages)
    console = Console(highlight=False)
    print(config.to_toml())  # not by rich, which would break long lines
    train, model = config.train, config.model
    share = -(-train.global_batch_size // layout.batch_parts)
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
        layout,
        micro_batches(train.global_batch_size, micro_batch, layout),
        bucket_bytes(config.comm, config.compression, 1, device),  # of one node, where they are largest
    )
    residuals = 4 * most_parameters(model, vocab_size, layout) if _keeps_residuals(config) and launch.size > 1 else 0
    residuals *= 1 + config.comm.elastic + 2 * config.comm.mirror_residuals  # before the step; of the rank before
    is_local = bool(config.local_steps.every)
    # A worker of servers keeps the parameters with which its round began
    copies = 1 if servers else numbers_kept(config.local_steps, config.comm.elastic)
    averages = memory.parameters * copies if is_local else 0
    moments = memory.moments if is_local or not servers else 0
    moving_average = memory.parameters if train.ema else 0
    scored = memory.double_precision if split_names(train.evaluate_tasks) else 0
    has_compiler = train.compile or train.activation_checkpointing or config.parallel.tensor > 1
    libraries = libraries_bytes(has_compiler) if device == "cpu" else 0
    state = {
        "weights": memory.parameters,
        "weights to compute with": memory.working_parameters,
        "gradients": memory.gradients,
        "optimizer": moments,
    }
    if not config.parallel.is_used:
        state = {"weights and optimizer": sum(state.values())}
    parts = {
        **state,
        "residuals of the codec": residuals,
        "averages of local steps": averages,
        "moving average of weights": moving_average,
        "activations": memory.activations,
        "loss": memory.loss,
        "temporary, and gaps between": memory.temporary + memory.gaps,
        "float64 copy for tasks": scored,
        "libraries": libraries,
    }
    whole = memory.total - memory.moments + moments + residuals + averages + moving_average + scored + libraries
    tokens = config.tokens_before(config.planned_steps)
    table = Table(show_header=False, box=None)
    rows = {
        "parameters": f"{parameter_count(model, vocab_size):,}",
        "vocabulary": f"{vocab_size:,}",
        "ranks": f"{launch.size:,}{f', of them {servers:,} servers' if servers else ''}",
        **({"layout": str(layout)} if config.parallel.is_used else {}),
        "sequences per step": f"{train.global_batch_size:,}, at most {share:,} a rank, {micro_batch:,} at once",
        "micro-batches per step": f"{-(-share // micro_batch):,}",
        "tokens per step": f"{train.global_batch_size * model.context_length:,}",
        "tokens in all": f"{tokens:,}",
        "arithmetic in all": f"{flops_per_token(model, vocab_size) * tokens / 1e12:,.1f} TFLOP",
        f"memory a {'worker' if servers else 'rank'}, estimated": f"{whole / 2**20:,.0f} MiB",
        **{f"  {name}": f"{nbytes / 2**20:,.0f} MiB" for name, nbytes in parts.items() if nbytes},
    }
    if servers:
        predicted = memory.parameters if config.server.predict else 0  # by those before the last step
        outer_momentum = memory.parameters if config.local_steps.momentum else 0
        moments = outer_momentum if is_local else memory.moments
        kept = (memory.parameters + memory.gradients + moments + predicted) / servers
        rows["memory a server, estimated"] = f"{(kept + libraries) / 2**20:,.0f} MiB"
    if train.batch_ramp_start:
        rows["sequences at first"] = f"{train.batch_ramp_start:,}, growing in {train.batch_ramp_steps:,} steps"
    if config.checkpoint.every:
        copied = memory.parameters + memory.moments + moving_average
        rows["host memory of rank 0 besides"] = f"{copied / 2**20:,.0f} MiB, to copy a checkpoint"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _keeps_residuals(config: Config) -> bool:
    return config.compression.codec != "none" and config.compression.error_feedback
