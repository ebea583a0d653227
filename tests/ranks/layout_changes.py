"""What becomes of a run's state when another layout of ranks goes on with it: every layout reads every other's."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from many_layouts import LAYOUTS, OF_MUON, RANKS, Change
from safetensors.torch import load_file
from sharded_body import CPU, VOCABULARY, make_config
from torch import Tensor
from training_body import Batches, Records

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.training import checkpoint
from hvdlm.training.checkpoint_contents import TENSOR_FILES, Checkpoint
from hvdlm.training.saved_state import restore
from hvdlm.training.trainer import Trainer


def changes(
    comm: Communicator, precision: str, algorithm: str = "adamw", readings: int | None = None
) -> Iterator[Change]:
    """On rank 0, every layout that goes with an optimizer by every other, itself among them; nothing on other ranks.
    Collective on `RANKS` ranks, all of which have to go through it.

    `readings`: by how many layouts each one is read, instead of all.
    """
    layouts = {name: each for name, each in LAYOUTS.items() if algorithm == "adamw" or name in OF_MUON}
    folder = Path(comm.broadcast_object(tempfile.mkdtemp() if comm.rank == 0 else None))
    groups = {size: comm.split(int(comm.rank >= size), comm.rank) for size in range(1, RANKS + 1)}
    paths = {}
    for seed, (name, (ranks, parallel)) in enumerate(layouts.items()):
        config = _configured(parallel, precision, algorithm, folder / name, seed)
        paths[name] = checkpoint.path_of(checkpoint.directory(config.train.run_dir), 2)
        if comm.rank < ranks:
            trainer = _make_trainer(groups[ranks], config)
            batches = Batches(trainer.readers, 7 * seed, ignored=True)
            for _ in range(2):
                trainer.train_step(batches, False)
            assert _saved(trainer) == paths[name]
            trainer.strategy.close()
        comm.barrier()
    for number, (reader, (ranks, parallel)) in enumerate(layouts.items()):
        if comm.rank < ranks:
            config = _configured(parallel, precision, algorithm, folder / f"again {number}", 0)
            trainer = _make_trainer(groups[ranks], config)
            names = list(paths)
            for place in range(number, number + (readings or len(names))):
                name = names[place % len(names)]
                path = paths[name]
                again = _read_and_save(trainer, path)
                if comm.rank == 0:
                    is_equal = _are_equal(_contents(again), _contents(path))
                    yield Change(name, reader, is_equal, _have_one_sum(path, again))
                groups[ranks].barrier()
            trainer.strategy.close()
        comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)


def _configured(parallel: dict[str, Any], precision: str, algorithm: str, run_dir: Path, seed: int) -> Config:
    values = make_config("gpt2", 0, 0, precision, codec="int4").model_dump(by_alias=True)
    values["model"]["layers"] = 2
    values["parallel"].update(parallel)
    values["train"].update(run_dir=str(run_dir), ema=0.9, seed=seed)
    values["optimizer"]["algorithm"] = algorithm
    return Config.model_validate(values)


def _make_trainer(group: Communicator, config: Config) -> Trainer:
    data = SimpleNamespace(eos_id=0, fingerprint="of a test")
    trainer = Trainer(config, group, data, VOCABULARY, CPU)  # type: ignore[arg-type]
    trainer.metrics = Records() if group.rank == 0 else None  # type: ignore[assignment]
    trainer.start()
    return trainer


def _read_and_save(trainer: Trainer, path: Path) -> Path:
    group = trainer.communicator
    restore(trainer, Checkpoint(path) if group.rank == 0 else None, Checkpoint(path).state)
    if group.rank == 0:
        shutil.rmtree(checkpoint.directory(trainer.config.train.run_dir), ignore_errors=True)
    group.barrier()
    return _saved(trainer)


def _saved(trainer: Trainer) -> Path:
    trainer.saver.save(in_background=False)
    return checkpoint.path_of(checkpoint.directory(trainer.config.train.run_dir), trainer.step)


def _contents(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in TENSOR_FILES for name, tensor in load_file(path / file).items()}


def _residuals(path: Path) -> list[dict[str, Tensor]]:
    """Of each rank."""
    return [load_file(file) for file in sorted((path / "ranks").glob("rank_*.safetensors"))]


def _sums(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Over ranks; None where they hold different parts of a parameter."""
    sums: dict[str, Tensor] = {}
    for own in ranks:
        for name, tensor in own.items():
            if name in sums and sums[name].shape != tensor.shape:
                return None
            sums[name] = sums[name] + tensor if name in sums else tensor
    return sums


def _are_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _have_one_sum(path: Path, again: Path) -> bool:
    """Whether residuals are those of each rank, or else of each parameter the same in sum."""
    had, has = _residuals(path), _residuals(again)
    if had and len(had) == len(has) and all(map(_are_equal, had, has)):
        return True
    before, after = _sums(had), _sums(has)
    if not before or not after or before.keys() != after.keys():
        return False
    return all(
        tensor.shape == after[name].shape and torch.allclose(tensor, after[name], rtol=0, atol=1e-6)
        for name, tensor in before.items()
    )
