"""Do a worker and its server, which are processes of their own, have the same software, data and settings.

Settings that say how a process computes, reads or writes are each one's own; the server's decide what is saved,
validated and logged, and how late gradients may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm.comm.agreement import Shared, own_software
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.training.agreement import codec_digests, shared_data

# What is compared: sections but for some settings, and settings of others
_SECTIONS = ("model", "data", "train", "optimizer", "compression")
_BUT_FOR = {
    *("model.preset", "model.from", "data.path", "data.read_ahead"),
    *("train.run_dir", "train.device", "train.threads", "train.stop_signals", "train.check_replicas_every"),
    *("train.micro_batch_size", "train.compile", "train.activation_checkpointing", "train.deterministic"),
    *("train.evaluate_every", "train.evaluate_sequences", "train.max_skipped"),
}
_OTHERS = ("comm.bucket_mb", "server.pull", "local_steps.every")

_MOST_NAMED = 4


def description(config: Config, data: DataSet) -> dict[str, Any]:
    """What a process says of itself, as JSON can hold it."""
    shared = {subject: each.value for subject, each in _shared(config, data).items()}
    return {"shared": shared, "settings": _settings(config)}


def difference(config: Config, data: DataSet, said: Mapping[str, Any]) -> str | None:
    """Why a worker that says this of itself cannot train for a server with these settings and data; None if it can."""
    shared, settings = (_table(said.get(key)) for key in ("shared", "settings"))
    for subject, own in _shared(config, data).items():
        if (other := shared.get(subject, "nothing like it")) != own.value:
            return f"{subject}: it has {str(other)[:200]}, and the server {own.value}; {own.remedy}"
    unlike = [
        f"{name} = {str(settings.get(name))[:200]}, which is {value} on the server"
        for name, value in _settings(config).items()
        if settings.get(name) != value
    ]
    if not unlike:
        return None
    more = f" and {len(unlike) - _MOST_NAMED} more" if len(unlike) > _MOST_NAMED else ""
    return f"it has {', '.join(unlike[:_MOST_NAMED])}{more}; give both one configuration"


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shared(config: Config, data: DataSet) -> dict[str, Shared]:
    codecs = codec_digests(config.compression).items()
    own = {**own_software(), "the data set": shared_data(data)}
    return own | {f"the codec {file}": Shared(digest, "copy one file to all hosts") for file, digest in codecs}


def _settings(config: Config) -> dict[str, Any]:
    sections = config.model_dump()
    names = [f"{section}.{name}" for section in _SECTIONS for name in sections[section]]
    compared = [*(name for name in names if name not in _BUT_FOR), *_OTHERS]
    return {name: sections[name.partition(".")[0]][name.partition(".")[2]] for name in compared}
