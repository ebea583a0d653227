"""`manifest.json`: the shards of a data set, with the hashes by which damage is detected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from hvdlm.data.file_errors import unreadable
from hvdlm.errors import HvdlmError

FORMAT = "hvdlm-data-set"
VERSION = 1  # of a data set without weights
MIXTURE_VERSION = 2  # of one whose sources have weights, which hvdlm of before would not draw from in proportion
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
VALIDATION_DIRECTORY = "val"


class ShardRecord(BaseModel):
    """One shard as it was written."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: str  # relative to the data set's directory
    size: int  # bytes of the file
    n_tokens: int  # end-of-text tokens included
    n_docs: int
    n_bytes: int  # UTF-8 bytes of the documents
    tokens_sha256: str  # of the little-endian tokens in order


class SourceRecord(BaseModel):
    """One source of a mixture. The training shards of the first source come first, then those of the second."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: str  # as it was given
    weight: float
    shards: int  # training shards


class Manifest(BaseModel):
    """The whole data set.

    `sources`: those that have weights; none where all training shards are drawn from by what they hold. `recipe`: the
    inputs and options it was made from, which a repeated `prepare` compares.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: str = FORMAT
    version: int = VERSION
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    train: list[ShardRecord]
    validation: list[ShardRecord]  # of each source in turn, or one for all
    sources: list[SourceRecord] = []
    recipe: dict[str, Any]

    @model_validator(mode="after")
    def _check_sources(self) -> Manifest:
        if self.version != (MIXTURE_VERSION if self.sources else VERSION):
            raise ValueError(f"version {self.version} does not fit {len(self.sources)} sources with weights")
        if self.sources and sum(source.shards for source in self.sources) != len(self.train):
            raise ValueError("its sources do not have as many shards as it has")
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the hashes of the tokenizer and of every shard, and the weights of sources: identifies the
        tokens and their order."""
        parts = [("tokenizer", self.tokenizer_sha256)]
        parts += [("train", shard.tokens_sha256) for shard in self.train]
        parts += [("validation", shard.tokens_sha256) for shard in self.validation]
        parts += [("source", f"{source.weight!r} {source.shards}") for source in self.sources]
        return _digest(" ".join(part) for part in parts)

    def save(self, directory: Path) -> None:
        """Writes `manifest.json`, with the fingerprint and a hash of itself added."""
        content = self.model_dump(exclude=None if self.sources else {"sources"}) | {"fingerprint": self.fingerprint}
        (directory / MANIFEST).write_text(json.dumps(content | {"sha256": _self_hash(content)}, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Reads and checks `manifest.json`, not the shards.

        Raises HvdlmError if `directory` is not a data set, or is unfinished, damaged or of a newer format version.
        """
        path = directory / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise _no_data_set(directory) from None
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(path, error) or HvdlmError(f"cannot read {path}: {error}") from None
        try:
            content = json.loads(text)
            if content.get("format") != FORMAT:
                raise HvdlmError(f"{directory} is not a data set of `hvdlm prepare`: {path} is something else")
            if content.get("version") not in (VERSION, MIXTURE_VERSION):
                raise HvdlmError(
                    f"{path} has format version {content.get('version')}, but this hvdlm reads versions {VERSION} and "
                    f"{MIXTURE_VERSION}; "
                    "install the hvdlm that wrote it, or prepare the data set again"
                )
            sha256 = content.pop("sha256", None)
            if sha256 != _self_hash(content):
                raise ValueError("its contents do not match its own hash")
            fingerprint = content.pop("fingerprint", None)
            manifest = cls.model_validate(content)
            if fingerprint != manifest.fingerprint:
                raise ValueError("its fingerprint does not match its shards")
        except (ValueError, AttributeError, ValidationError) as error:
            raise HvdlmError(f"{path} is damaged ({error}); prepare the data set again") from None
        return manifest


def _no_data_set(directory: Path) -> HvdlmError:
    if not directory.exists():
        return HvdlmError(f"{directory}: no such data set; write it with `hvdlm prepare --output {directory}`")
    if not directory.is_dir():
        return HvdlmError(f"{directory} is not a data set but a file; give the directory `hvdlm prepare` wrote")
    if any(directory.glob("*.h5")):
        return HvdlmError(
            f"{directory} is an unfinished data set: it has shards but no {MANIFEST}; "
            "remove it and run `hvdlm prepare` again"
        )
    return HvdlmError(f"{directory} is not a data set: it has no {MANIFEST}; write one with `hvdlm prepare`")


def _self_hash(content: Mapping[str, Any]) -> str:
    return _digest([json.dumps(content, sort_keys=True)])


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
