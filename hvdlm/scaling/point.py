"""A point of a scaling study: one setting, where it ran, and all measurements of it. Also the schema of its JSON file.

`benchmarks/scaling.py` writes one file per point; `hvdlm fit` and `benchmarks/report.py` read it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hvdlm.errors import HvdlmError

SUFFIX = ".point.json"


class Record(BaseModel):
    """A JSON object with checked names and types. Fields with an alias have that name in the file."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)


class Machine(Record):
    """The machine, or one of several equal machines, that the ranks of a point ran on."""

    cpu: str
    cores: int = Field(gt=0, description="of one machine")
    memory: int = Field(description="bytes of one machine")
    gpu: str | None
    kernel: str
    machines: int = Field(gt=0, description="how many, connected by the network; emulated hosts are one machine")


class Place(Record):
    """Where the ranks ran, and how they were started."""

    kind: Literal["local", "fabric", "hostfile", "slurm"]
    ranks: int = Field(gt=0)
    hosts: list[str] = Field(description="of each rank")
    ranks_per_host: int = Field(gt=0)
    link_bits_per_second: float | None = Field(description="of each host, each way; null: not known, or not used")
    link_burst_bytes: int = Field(0, description="that an idle link carries at once, above its rate: emulated links do")
    interface: str | None = Field(description="network interface between hosts, where it is set")
    launcher: str = Field(description="the command that started the ranks")
    environment: dict[str, str] = Field(description="variables of launchers, MPI, OpenMP and hvdlm on rank 0")

    @property
    def is_one_host(self) -> bool:
        """Whether all ranks were on one host, and used no link."""
        return len(set(self.hosts)) == 1


class Bucket(Record):
    """Gradients that are exchanged together."""

    shapes: list[list[int]] = Field(description="of its parameters")
    codec: str = Field(description="of the last step: chosen by auto, or set")

    @property
    def elements(self) -> int:
        """Numbers in the bucket."""
        return sum(math.prod(shape) for shape in self.shapes)


class Repetition(Record):
    """Some steps after a warm-up, in a job in which other codecs are measured too."""

    step_seconds: list[list[float]] = Field(description="of each rank, of each step")
    seconds: float = Field(gt=0, description="of a step by the slowest rank's clock: all steps over their number")
    phase_seconds: list[dict[str, float]] = Field(
        alias="laps", description="of each rank, mean seconds per step: data, forward, backward, wait, optimizer"
    )
    codec_seconds: float = Field(description="per step, encoding and decoding messages, mean over ranks")
    exchange_seconds: float = Field(description="per step, sending, receiving and waiting, mean over ranks")
    core_seconds: float = Field(description="per step, for which a machine's cores were busy, over the ranks on it")
    wire_bytes: float = Field(description="per step, sent by a rank for gradients, mean over ranks")
    start_seconds: float = Field(description="from the start of the slowest process to its first step")
    parameter_hashes: list[str] = Field(description="SHA-256 of each rank's parameters afterwards")

    @property
    def is_valid(self) -> bool:
        """Whether all ranks held the same model afterwards."""
        return len(set(self.parameter_hashes)) == 1


class Point(Record):
    """One setting of a study, and all of its repetitions."""

    schema_version: Literal[1] = 1
    study: str
    mode: Literal["weak", "strong"]
    date: str
    revision: str = Field(description="git revision of hvdlm, or its version")
    versions: dict[str, str | None]
    machine: Machine
    place: Place
    engine: str
    algorithm: str = Field(description="of float32 all-reduce: ring, engine, or auto: by size")
    channels: int = Field(gt=0, alias="lanes", description="on which buckets are exchanged at the same time")
    codec: str = Field(description="or CODEC/EVERY/FRAGMENTS/OVERLAP: local steps")
    settings: dict[str, Any] = Field(description="of the run, by section")
    seed: int
    vocab_size: int = Field(gt=0)
    tokens_per_step: int = Field(gt=0, description="of the global batch")
    simulated_tokens_per_second: float | None = Field(
        description="speed of a rank whose compute is simulated; null: real"
    )
    buckets: list[Bucket] = Field(description="in the order in which they are sent")
    repetitions: list[Repetition]

    @property
    def is_valid(self) -> bool:
        """Whether there are repetitions, and all are valid."""
        return bool(self.repetitions) and all(repetition.is_valid for repetition in self.repetitions)

    @property
    def ranks(self) -> int:
        return self.place.ranks

    @property
    def codec_name(self) -> str:
        """The codec alone."""
        name: str = self.settings["compression"]["codec"]
        return name

    @property
    def every(self) -> int:
        """Steps from one average of the model to the next; 1: gradients of every step are summed."""
        return self.settings.get("local_steps", {}).get("every") or 1

    @property
    def has_local_steps(self) -> bool:
        """Whether parameters are averaged, and not gradients summed."""
        return bool(self.settings.get("local_steps", {}).get("every"))


def read_points(directory: Path) -> list[Point]:
    """All points below a directory, sorted by file name. Raises HvdlmError if there is none, or a file is wrong."""
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
    """Writes JSON. Replaces the file whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(record.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")
    partial.replace(file)


def schema() -> str:
    """JSON Schema of a point's file."""
    return json.dumps(Point.model_json_schema(), indent=1) + "\n"
