"""What a scaling study is to measure: its TOML file, and the visits and points that follow from it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from hvdlm.config import Config, Section, from_dict
from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.choice import AUTO, codec_maker
from hvdlm.model.presets import PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Mode = Literal["weak", "strong"]


class Study(Section):
    """The keys of a study's file. Lists are swept, every value with every other."""

    name: str = Field(pattern=r"^[\w-]+$", description="also of its directory below --output")
    place: Literal["local", "fabric", "hostfile", "slurm"] = Field(
        "local", description="this machine, emulated hosts on it, a host list, or the allocation that this runs in"
    )
    hostfile: str = Field("", description="of place hostfile; the first hosts are taken first")
    launcher: Literal["mpirun", "srun", "horovodrun"] = "mpirun"
    engine: Literal["auto", "horovod", "mpi", "torch"] = "auto"
    ranks: list[int] = Field(min_length=1)
    ranks_per_host: int = Field(1, gt=0, description="on every host; of place local all are on one")
    links: list[str] = Field(
        [], description="rates, as 1gbit: what a fabric's links get; elsewhere the one that they have, if known"
    )
    codecs: list[str] = Field(["none"], min_length=1, description="take turns in one job")
    presets: list[str] = Field([], description="of model; none: what [settings] say")
    batch_sizes: list[int] = Field(min_length=1, description="sequences a step, weak: of a rank, strong: of all")
    repetitions: int = Field(5, ge=1, description="jobs for each point, one after all others have had theirs")
    steps: int = Field(5, gt=0, description="of a repetition that count")
    warmup_steps: int = Field(3, gt=0, description="before them; codec auto has at least 40")
    simulated_tokens_per_second: float = Field(
        0, ge=0, description="forward and backward of a rank are sleeps as long as at this speed; 0: real"
    )
    data: str = Field(description="directory written by `hvdlm prepare`")
    patience: float = Field(1800, gt=0, description="seconds that a job may take")
    settings: dict[str, Any] = Field({}, description="of every run, by section as in hvdlm train's file")


@dataclass(frozen=True)
class Visit:
    """One job: the codecs of a study take turns on so many ranks behind such links."""

    ranks: int
    link: str | None
    preset: str | None
    batch_size: int  # as the study says

    @property
    def name(self) -> str:
        parts = [f"r{self.ranks}", self.link, self.preset, f"b{self.batch_size}"]
        return "-".join(part for part in parts if part)

    def point_name(self, codec: str) -> str:
        """Of the point that this visit adds a repetition to."""
        return f"{self.name}-{re.sub('[^A-Za-z0-9]+', '-', codec if ':' not in codec else Path(codec).name)}"


def read_study(file: Path, simulate: float | None) -> Study:
    """`simulate`: what the command line says in place of simulated_tokens_per_second.

    Raises HvdlmError where the file cannot be read or holds what a study cannot be.
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
            codec_maker(codec)
    if study.place == "fabric" and not study.links:
        raise HvdlmError(f"{file}: a fabric needs links, as in links = ['100mbit', '1gbit']")
    if study.place != "fabric" and len(study.links) > 1:
        raise HvdlmError(f"{file}: only a fabric's links can be given several rates, not those of place {study.place}")
    if study.place == "hostfile" and not study.hostfile:
        raise HvdlmError(f"{file}: place hostfile needs hostfile = 'FILE'")
    return study


def visits(study: Study) -> Iterator[Visit]:
    """Every one of a repetition. Ranks of one host pass no link, whatever its rate: they are measured once."""
    links: list[str | None] = [*study.links] or [None]
    for preset in study.presets or [None]:
        for batch_size in study.batch_sizes:
            for ranks in study.ranks:
                for link in links if ranks > study.ranks_per_host else links[:1]:
                    yield Visit(ranks, link, preset, batch_size)


def configuration(study: Study, visit: Visit, codec: str, mode: Mode) -> Config:
    """The settings of a run. Raises HvdlmError where they do not fit."""
    sections = {name: dict(section) for name, section in study.settings.items()}
    batch = visit.batch_size * (visit.ranks if mode == "weak" else 1)
    fixed: dict[str, dict[str, Any]] = {
        "data": {"path": str(Path(study.data).absolute())},
        "train": {"steps": 10**6, "batch_size": batch},
        "comm": {"engine": study.engine},
        "compression": {"codec": codec},
        "log": {"every": 10**6},
    }
    if visit.preset:
        fixed["model"] = {"preset": visit.preset}
    for name, values in fixed.items():
        sections[name] = {**sections.get(name, {}), **values}
    return from_dict(sections, f"study {study.name}", PRESETS)
