"""Tensors in one .safetensors file, or in several with an index, as transformers has them. No pickle is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from hvdlm.errors import HvdlmError

_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FORMAT = {"format": "pt"}  # without which transformers 4 refuses a file


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Writes files of at most `shard_bytes` each, or one larger tensor. Raises OSError or SafetensorError."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        safetensors.torch.save_file(shards[0], directory / _ONE, metadata=_FORMAT)
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        safetensors.torch.save_file(shard, directory / file, metadata=_FORMAT)
    total = sum(tensor.nbytes for tensor in tensors.values())
    files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors by name, on the CPU. Raises HvdlmError if there are none, or if files are missing or damaged."""
    index = directory / _INDEX
    if (directory / _ONE).exists():
        files = [_ONE]
    elif index.exists():
        try:
            files = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError):
            raise HvdlmError(f"{index} is not an index of safetensors files") from None
    else:
        pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
        only = f", only {pickled[0].name}, a pickle, which can run code and is not read" if pickled else ""
        raise HvdlmError(f"{directory} holds no {_ONE} and no {_INDEX}{only}: save the model with safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file:
            raise HvdlmError(f"{index} names a file of elsewhere: {file}")
        try:
            tensors.update(safetensors.torch.load_file(directory / file))
        except FileNotFoundError:
            raise HvdlmError(f"{directory} lacks {file}, which {_INDEX} names") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise HvdlmError(f"cannot read {directory / file}: {error}") from None
    return tensors
