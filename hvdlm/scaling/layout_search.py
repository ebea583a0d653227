"""Which layout of a number of ranks is the fastest of those that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.registry import bucket_bytes
from hvdlm.model.layout import Layout, micro_batches
from hvdlm.model.memory import TrainingMemory, training_memory_bytes
from hvdlm.model.size import key_value_heads
from hvdlm.scaling.cluster import Cluster
from hvdlm.scaling.layout_forecast import LayoutForecast, LayoutScenario, forecast_layout

# Bytes of a gradient that codecs send, of those whose messages do not depend on the gradient's shape
_GRADIENT_BYTES = {"none": 4.0, "fp16": 2.0, "bf16": 2.0}

# Of a device's memory, what training may fill: the rest is for libraries, messages and fragmentation
USABLE_MEMORY = 0.9

_MICRO_BATCHES = (1, 2, 4, 8, 16)  # sequences at once that are tried


@dataclass(frozen=True)
class Choice:
    """A layout with the settings that go with it, and what they cost."""

    scenario: LayoutScenario
    step: LayoutForecast
    memory: TrainingMemory

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.scenario.tokens / self.step.seconds

    @property
    def settings(self) -> str:
        """As arguments of `hvdlm train`."""
        layout, words = self.scenario.layout, []
        if layout.zero:
            words += [f"--parallel.shard {layout.zero}"]
        if layout.zero and layout.data > 1:
            words += [f"--parallel.data {layout.data}"]
        words += [f"--parallel.{axis} {size}" for axis in ("tensor", "pipeline") if (size := getattr(layout, axis)) > 1]
        words += [f"--train.micro_batch_size {self.scenario.micro_batch_size}"]
        if self.scenario.recomputed != "none":
            words += ["--train.activation_checkpointing true"]
        return " ".join(words)


def choice(config: Config, vocab_size: int, layout: Layout, global_batch_size: int, cluster: Cluster) -> Choice:
    """The step and the memory of a run with these settings in a layout, of `global_batch_size` sequences.

    Raises HvdlmError for fewer sequences than there are parts of a batch, and for a codec whose messages are not known.
    """
    train, codec = config.train, config.compression.codec
    if codec not in _GRADIENT_BYTES:
        raise HvdlmError(f"layouts are forecast with codec {', '.join(_GRADIENT_BYTES)}, not {codec}")
    if global_batch_size < layout.batch_parts:
        raise HvdlmError(
            f"a global batch of {global_batch_size:,} sequences cannot be divided among {layout.batch_parts:,} groups "
            "of ranks: set train.global_batch_size or --batch-size-per-rank"
        )
    micro_batch = min(train.micro_batch_size, -(-global_batch_size // layout.batch_parts))
    scenario = LayoutScenario(
        config.model,
        vocab_size,
        layout,
        global_batch_size,
        micro_batch,
        train.precision,
        recomputed="block" if train.activation_checkpointing else "none",
        gradient_bytes=_GRADIENT_BYTES[codec],
    )
    return Choice(scenario, forecast_layout(scenario, cluster), memory_of(config, scenario, cluster))


def memory_of(config: Config, scenario: LayoutScenario, cluster: Cluster) -> TrainingMemory:
    """Of one rank."""
    hosts = -(-scenario.layout.ranks // cluster.ranks_per_host)
    return training_memory_bytes(
        scenario.model,
        scenario.vocab_size,
        scenario.micro_batch_size,
        scenario.precision,
        cluster.device,
        config.train.compile,
        scenario.recomputed != "none",
        config.optimizer.algorithm,
        scenario.layout,
        scenario.micro_batches,
        bucket_bytes(config.comm, config.compression, hosts, cluster.device),
    )


def search(
    config: Config, vocab_size: int, ranks: int, global_batch_size: int, cluster: Cluster, memory: float
) -> list[Choice]:
    """Of each stage of ZeRO, number of tensor ranks and number of pipeline stages, the fastest choice that fits into
    so many bytes; the fastest of these first.

    Raises HvdlmError, with the least that a layout needs, if none fits.
    """
    fastest: dict[tuple[int, int, int], Choice] = {}
    least: Choice | None = None
    for layout in layouts(config, ranks, cluster.ranks_per_host):
        if layout.batch_parts > global_batch_size:
            continue
        for sized in _sizes(config, layout, global_batch_size):
            found = choice(sized, vocab_size, layout, global_batch_size, cluster)
            if least is None or found.memory.total < least.memory.total:
                least = found
            key = (layout.zero, layout.tensor, layout.pipeline)
            if found.memory.total <= memory and (
                key not in fastest or found.tokens_per_second > fastest[key].tokens_per_second
            ):
                fastest[key] = found
    if least is None:
        raise HvdlmError(
            f"no layout of {ranks:,} ranks has a sequence of {global_batch_size:,} for each group of ranks"
        )
    if not fastest:
        raise HvdlmError(
            f"no layout of {ranks:,} ranks fits into {memory / 2**30:,.0f} GiB: {least.scenario.layout} needs the "
            f"least, {least.memory.total / 2**30:,.0f} GiB; take more ranks or a shorter context"
        )
    return sorted(fastest.values(), key=lambda each: -each.tokens_per_second)


def layouts(config: Config, ranks: int, ranks_per_host: int) -> Iterator[Layout]:
    """Tensor ranks, which send most, share a host; the number of groups that ZeRO keeps apart is a power of two."""
    heads = key_value_heads(config.model)
    for tensor in _divisors(ranks, min(ranks_per_host, heads)):
        if heads % tensor:
            continue
        for pipeline in _divisors(ranks // tensor, config.model.layers):
            rest = ranks // (tensor * pipeline)
            plain = Layout(data=rest, tensor=tensor, pipeline=pipeline)
            yield plain
            for data in (2**power for power in range(rest.bit_length())):
                if rest % data == 0 and rest > data:
                    for zero in (1, 2, 3) if pipeline == 1 else (1, 2):  # what trains
                        yield replace(plain, zero=zero, data=data, shard=rest // data)


def _sizes(config: Config, layout: Layout, global_batch_size: int) -> Iterator[Config]:
    """The configuration with each micro-batch that divides a rank's part, with and without recomputation."""
    for micro_batch in _MICRO_BATCHES:
        if micro_batch > 1 and micro_batches(global_batch_size, micro_batch, layout) == micro_batches(
            global_batch_size, micro_batch // 2, layout
        ):
            return
        for recomputes in (False, True):
            train = config.train.model_copy(
                update={"micro_batch_size": micro_batch, "activation_checkpointing": recomputes}
            )
            yield config.model_copy(update={"train": train})


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]
