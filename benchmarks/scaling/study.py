"""What a scaling study measures: the keys of its TOML file, and the jobs and settings that follow from them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from common.methods import parse_method
from hvdlm.config import Config, Section
from hvdlm.config_reader import from_dict
from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.registry import AUTO, codec_factory
from hvdlm.model.presets import PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Mode = Literal["weak", "strong"]


class Study(Section):
    """The keys of a study's file. Lists are swept, every value with every other."""

    name: str = Field(pattern=r"^[\w-]+$", description="also the name of its directory below --output")
    place: Literal["local", "fabric", "hostfile", "slurm"] = Field(
        "local",
        description="this machine, emulated hosts on it, a host list, or this Slurm allocation",
    )
    hostfile: str = Field("", description="for place hostfile; the first hosts are used first")
    launcher: Literal["mpirun", "srun", "horovodrun"] = "mpirun"
    engine: Literal["auto", "horovod", "mpi", "torch"] = "auto"
    ranks: list[int] = Field(min_length=1)
    ranks_per_host: int = Field(1, gt=0, description="on every host; with place local all are on one")
    links: list[str] = Field(
        [], description="rates, as 1gbit: those that a fabric's links get; elsewhere the one they have, if known"
    )
    codecs: list[str] = Field(
        ["none"], min_length=1, description="all are measured in one job; CODEC/EVERY/FRAGMENTS/OVERLAP: local steps"
    )
    presets: list[str] = Field([], description="of models; none: the model of [settings]")
    batch_sizes: list[int] = Field(
        min_length=1, description="sequences per step, weak: of a rank, strong: of all ranks"
    )
    repetitions: int = Field(5, ge=1, description="of every job; the next begins when all jobs have had theirs")
    steps: int = Field(5, gt=0, description="that are measured in a repetition")
    warmup_steps: int = Field(3, gt=0, description="before them; codec auto has 40 or more")
    simulated_tokens_per_second: float = Field(
        0, ge=0, description="speed of a rank whose forward and backward pass are simulated by sleeping; 0: real ones"
    )
    data: str = Field(description="directory written by `hvdlm prepare`")
    time_limit: float = Field(1800, gt=0, alias="patience", description="seconds that a job may take")
    settings: dict[str, Any] = Field({}, description="of every run, by section as in the file of hvdlm train")


@dataclass(frozen=True)
class JobSpec:
    """One combination of a study's lists, codecs excepted: a job in which all codecs are measured."""

    ranks: int
    link: str | None
    preset: str | None
    batch_size: int  # sequences per step, of a rank or of all ranks

    @property
    def name(self) -> str:
        """As in the names of its files."""
        parts = [f"r{self.ranks}", self.link, self.preset, f"b{self.batch_size}"]
        return "-".join(part for part in parts if part)

    def point_name(self, codec: str) -> str:
        """The name of the point that this job adds a repetition of `codec` to."""
        return f"{self.name}-{re.sub('[^A-Za-z0-9]+', '-', without_directory(codec))}"


def without_directory(codec: str) -> str:
    """A codec, or a method of local steps, where FILE.py:CLASS has no directory."""
    path = parse_method(codec).codec
    return Path(path).name + codec.removeprefix(path)


def measured_steps(study: Study, config: Config) -> int:
    """Of a repetition: as many as the study says or more, in whole rounds."""
    every = int(config.local_steps.every) or 1
    return -(-study.steps // every) * every


def read_study(file: Path, simulate: float | None) -> Study:
    """Reads a study's file; `simulate` replaces its simulated_tokens_per_second.

    Raises HvdlmError if the file cannot be read, or holds wrong keys or values.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
        if simulate is not None:
            values["simulated_tokens_per_second"] = simulate
        study = Study.model_validate(values)
    except OSError as error:
        raise HvdlmError(f"cannot read the study {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HvdlmError(f"{file} is not valid TOML: {error}") from None
    except ValidationError as error:
        sentences = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise HvdlmError(f"{file}: {'; '.join(sentences)}") from None
    for codec in study.codecs:
        if codec != AUTO:
            codec_factory(parse_method(codec).codec)
    if study.place == "fabric" and not study.links:
        raise HvdlmError(f"{file}: a fabric needs links, as in links = ['100mbit', '1gbit']")
    if study.place != "fabric" and len(study.links) > 1:
        raise HvdlmError(f"{file}: only a fabric's links can be given several rates, not those of place {study.place}")
    if study.place == "hostfile" and not study.hostfile:
        raise HvdlmError(f"{file}: place hostfile needs hostfile = 'FILE'")
    return study


def check_data(study: Study) -> None:
    """Raises HvdlmError if there is no data set."""
    if not Path(study.data, "manifest.json").exists():
        raise HvdlmError(f"study {study.name}: {study.data} is no data set: make one with `hvdlm prepare`")


def job_specs(study: Study) -> Iterator[JobSpec]:
    """The jobs of a repetition. Ranks on one host use no link, so they are measured once, not for every rate."""
    links: list[str | None] = [*study.links] or [None]
    for preset in study.presets or [None]:
        for batch_size in study.batch_sizes:
            for ranks in study.ranks:
                for link in links if ranks > study.ranks_per_host else links[:1]:
                    yield JobSpec(ranks, link, preset, batch_size)


def make_config(study: Study, spec: JobSpec, codec: str, mode: Mode) -> Config:
    """The settings of a run. Raises HvdlmError for unknown keys and wrong values."""
    sections = {name: dict(section) for name, section in study.settings.items()}
    method = parse_method(codec)
    batch = spec.batch_size * (spec.ranks if mode == "weak" else 1)
    fixed: dict[str, dict[str, Any]] = {
        "data": {"path": str(Path(study.data).absolute())},
        "train": {"steps": 10**6, "global_batch_size": batch},
        "comm": {"engine": study.engine},
        "compression": {"codec": method.codec},
        "local_steps": dict(method.local_steps),
        "log": {"every": 10**6},
    }
    if spec.preset:
        fixed["model"] = {"preset": spec.preset}
    for name, values in fixed.items():
        sections[name] = {**sections.get(name, {}), **values}
    config = from_dict(sections, f"study {study.name}", PRESETS)
    if config.local_steps.every == "auto":
        raise HvdlmError(
            f"study {study.name}: local_steps.every = 'auto' chooses by what it measures: leave it out, and name local "
            "steps among codecs, as int4/4/4/1"
        )
    return config
