"""Checkpoints of any layout of ranks, read by any other."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from checks import check
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

# By name: ranks, and [parallel]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"{ranks} with all": (ranks, {}) for ranks in (1, 2, 3)},
    **{f"stage {stage} on {ranks}": (ranks, {"shard": stage}) for stage in (1, 2, 3) for ranks in (2, 3)},
    "stage 2 on 2 times 2": (4, {"shard": 2, "data": 2}),
    "2 tensor ranks": (2, {"tensor": 2}),
    "2 stages": (2, {"pipeline": 2}),
    "2 tensor ranks in stage 1": (4, {"tensor": 2, "shard": 1}),
    "2 stages in stage 1": (4, {"pipeline": 2, "shard": 1}),
    "2 tensor ranks in 2 stages": (4, {"tensor": 2, "pipeline": 2}),
}

# Muon's momentum is of matrices alone, and goes with no tensor ranks
OF_MUON = ("1 with all", "stage 1 on 3", "stage 3 on 2", "stage 2 on 2 times 2", "2 stages")


def divides_model(parallel: dict[str, Any]) -> bool:
    """Whether ranks hold parts of the model: residuals of such are no other layout's."""
    return "tensor" in parallel or "pipeline" in parallel


def configured(parallel: dict[str, Any], algorithm: str, run_dir: Path, seed: int) -> Config:
    values = make_config("gpt2", 0, 0, "bf16", codec="int4").model_dump(by_alias=True)
    values["model"]["layers"] = 2
    values["parallel"].update(parallel)
    values["train"].update(run_dir=str(run_dir), ema=0.9, seed=seed)
    values["optimizer"]["algorithm"] = algorithm
    return Config.model_validate(values)


def make_trainer(group: Communicator, config: Config) -> Trainer:
    data = SimpleNamespace(eos_id=0, fingerprint="of a test")
    trainer = Trainer(config, group, data, VOCABULARY, CPU)  # type: ignore[arg-type]
    trainer.metrics = Records() if group.rank == 0 else None  # type: ignore[assignment]
    trainer.start()
    return trainer


def saved(trainer: Trainer) -> Path:
    trainer.saver.save(in_background=False)
    return checkpoint.path_of(checkpoint.directory(trainer.config.train.run_dir), trainer.step)


def contents(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in TENSOR_FILES for name, tensor in load_file(path / file).items()}


def residuals(path: Path) -> dict[str, Tensor]:
    """Summed over ranks."""
    sums: dict[str, Tensor] = {}
    for file in sorted((path / "ranks").glob("rank_*.safetensors")):
        for name, tensor in load_file(file).items():
            sums[name] = sums.get(name, torch.zeros_like(tensor)) + tensor
    return sums


def are_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@check(sizes=[4], algorithm=["adamw", "muon"])
def check_any_layout_reads_any_other(comm: Communicator, algorithm: str) -> None:
    """Parameters, moments, step counts and averages bit for bit, residuals by their sum."""
    folder = Path(comm.broadcast_object(tempfile.mkdtemp() if comm.rank == 0 else None))
    groups = {size: comm.split(int(comm.rank >= size), comm.rank) for size in (1, 2, 3, 4)}
    paths = {}
    layouts = {name: each for name, each in LAYOUTS.items() if algorithm == "adamw" or name in OF_MUON}
    for seed, (name, (ranks, parallel)) in enumerate(layouts.items()):
        config = configured(parallel, algorithm, folder / name, seed)
        paths[name] = checkpoint.path_of(checkpoint.directory(config.train.run_dir), 2)
        if comm.rank < ranks:
            trainer = make_trainer(groups[ranks], config)
            batches = Batches(trainer.readers, 7 * seed, ignored=True)
            for _ in range(2):
                trainer.train_step(batches, False)
            assert saved(trainer) == paths[name]
            trainer.strategy.close()
        comm.barrier()
    for number, (ranks, parallel) in enumerate(layouts.values()):
        if comm.rank < ranks:
            config = configured(parallel, algorithm, folder / f"again {number}", 0)
            trainer = make_trainer(groups[ranks], config)
            for name, path in paths.items():
                source = Checkpoint(path) if comm.rank == 0 else None
                restore(trainer, source, Checkpoint(path).state)
                if groups[ranks].rank == 0:
                    shutil.rmtree(checkpoint.directory(config.train.run_dir), ignore_errors=True)
                groups[ranks].barrier()
                again = saved(trainer)
                if comm.rank == 0:
                    assert are_equal(contents(again), contents(path)), (name, ranks, parallel)
                    if not (divides_model(parallel) or divides_model(LAYOUTS[name][1])):
                        had, has = residuals(path), residuals(again)
                        assert had and had.keys() == has.keys(), (name, ranks, parallel)
                        assert all(torch.allclose(had[each], has[each], rtol=0, atol=1e-6) for each in had), name
                groups[ranks].barrier()
            trainer.strategy.close()
        comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)
