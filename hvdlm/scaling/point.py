"""A point of a scaling study: what ran where, and what was measured. The published schema of its JSON file.

One file a point, with all of its repetitions; `hvdlm.scaling.fit` reads it, `benchmarks/scaling.py` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hvdlm.errors import HvdlmError

SUFFIX = ".point.json"


class Record(BaseModel):
    """Strict about names and types, so that a file says what it seems to say."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Machine(Record):
    """What the ranks of a point ran on."""

    cpu: str
    cores: int = Field(gt=0, description="of one machine")
    memory: int = Field(description="bytes of one machine")
    gpu: str | None
    kernel: str
    machines: int = Field(gt=0, description="that share nothing but the network; emulated hosts are one machine")


class Place(Record):
    """Where the ranks ran, and how they were started."""

    kind: Literal["local", "fabric", "hostfile", "slurm"]
    ranks: int = Field(gt=0)
    hosts: list[str] = Field(description="of each rank")
    ranks_per_host: int = Field(gt=0)
    link_bits_per_second: float | None = Field(description="of each host, each way; null: not known, or not passed")
    link_burst_bytes: int = Field(
        0, description="that a link which was idle carries at once before it keeps to its rate: emulated ones do"
    )
    interface: str | None = Field(description="network interface between hosts, where it is set")
    launcher: str = Field(description="the command that started the ranks")
    environment: dict[str, str] = Field(description="variables of launchers, MPI, OpenMP and hvdlm on rank 0")

    @property
    def is_one_host(self) -> bool:
        """No message has passed a link."""
        return len(set(self.hosts)) == 1


class Bucket(Record):
    """Gradients that travel together."""

    shapes: list[list[int]] = Field(description="of its parameters")
    codec: str = Field(description="that carried it in the end: chosen by auto, or set")

    @property
    def elements(self) -> int:
        return sum(_product(shape) for shape in self.shapes)


class Repetition(Record):
    """One turn of a point: some steps after a warm-up, in a job of its own or beside other codecs' turns."""

    step_seconds: list[list[float]] = Field(description="of each rank, of each step")
    seconds: float = Field(gt=0, description="of a step by the slowest rank's clock: all steps over their number")
    laps: list[dict[str, float]] = Field(
        description="of each rank, mean seconds a step: data, forward, backward, wait, optimizer"
    )
    codec_seconds: float = Field(description="a step, making and reading messages, mean over ranks")
    exchange_seconds: float = Field(description="a step, sending, receiving and waiting, mean over ranks")
    core_seconds: float = Field(description="a step, that cores of a machine were at work, over the ranks on it")
    wire_bytes: float = Field(description="a step, sent by a rank for gradients, mean over ranks")
    start_seconds: float = Field(description="from the start of the slowest process to its first step")
    parameter_hashes: list[str] = Field(description="SHA-256 of each rank's parameters afterwards")

    @property
    def is_valid(self) -> bool:
        """Whether all ranks hold the same model."""
        return len(set(self.parameter_hashes)) == 1


class Point(Record):
    """One setting of a study, all of its repetitions."""

    schema_version: Literal[1] = 1
    study: str
    mode: Literal["weak", "strong"]
    date: str
    revision: str = Field(description="git revision of hvdlm, or its version")
    versions: dict[str, str | None]
    machine: Machine
    place: Place
    engine: str
    algorithm: str = Field(description="what sums float32 gradients: ring, engine, or auto: by size")
    lanes: int = Field(gt=0, description="on which buckets travel side by side")
    codec: str
    settings: dict[str, Any] = Field(description="of the run, by section")
    seed: int
    vocab_size: int = Field(gt=0)
    tokens_per_step: int = Field(gt=0, description="of the global batch")
    simulated_tokens_per_second: float | None = Field(description="of a rank whose compute is a sleep; null: real")
    buckets: list[Bucket] = Field(description="in the order in which they are sent")
    repetitions: list[Repetition]

    @property
    def is_valid(self) -> bool:
        return bool(self.repetitions) and all(repetition.is_valid for repetition in self.repetitions)

    @property
    def ranks(self) -> int:
        return self.place.ranks


def read_points(directory: Path) -> list[Point]:
    """All points below a directory, by their files' names. Raises HvdlmError where one is none, or there is none."""
    files = sorted(directory.rglob(f"*{SUFFIX}"))
    if not files:
        raise HvdlmError(f"{directory} holds no points (*{SUFFIX}): make some with benchmarks/scaling.py")
    return [read_point(file) for file in files]


def read_point(file: Path) -> Point:
    """Raises HvdlmError for a file that does not fit the schema."""
    try:
        return Point.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise HvdlmError(f"cannot read the point {file}: {error.strerror}") from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise HvdlmError(f"{file} is not a point of version 1: {where}: {first['msg']}; measure it again") from None


def write_record(file: Path, record: Record) -> None:
    """Replaces the file whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def schema() -> str:
    """JSON Schema of a point's file."""
    return json.dumps(Point.model_json_schema(), indent=1) + "\n"


def _product(shape: list[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product
