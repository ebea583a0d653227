"""ZeRO against plain PyTorch on the joined batch: losses, norms, and each rank's part of parameters and moments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from checks import check
from torch import Tensor, nn
from torch.nn import functional
from training_body import Batches, Records, global_batch

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.sharded.strategy import Sharded
from hvdlm.training.trainer import Trainer

VOCABULARY, LENGTH, SEQUENCES = 61, 16, 7
CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"layers": 3, "heads": 2, "width": 64},
    "llama": {
        **{"layers": 3, "heads": 4, "kv_heads": 2, "width": 64, "norm": "rmsnorm", "activation": "swiglu"},
        **{"position": "rope", "bias": False, "tie_embeddings": False},
    },
    "odd": {"layers": 2, "heads": 3, "width": 39, "mlp_width": 53},
}


def make_config(model: str, stage: int, data: int = 0, precision: str = "fp32", **more: Any) -> Config:
    return Config.model_validate(
        {
            "model": {**MODELS[model], "context_length": LENGTH},
            "train": {"global_batch_size": SEQUENCES, "micro_batch_size": 2, "precision": precision, "steps": 2000},
            "optimizer": {"lr": 1e-3, "schedule": "wsd", "warmup_steps": 0, **more.get("optimizer", {})},
            "compression": {"codec": more.get("codec", "none")},
            "comm": {"bucket_mb": 40_000 / 2**20},
            "parallel": {"shard": stage, "data": data},
            "log": {"every": 1},
        }
    )


def make_trainer(comm: Communicator, config: Config) -> Trainer:
    trainer = Trainer(config, comm, SimpleNamespace(eos_id=0), VOCABULARY, CPU)
    trainer.metrics = Records()
    trainer.start()
    return trainer


class Plain:
    """The same model, loss and AdamW, for matrices of blocks Muon if so set, on one rank, by PyTorch alone."""

    def __init__(self, config: Config) -> None:
        self.model = Transformer(config.model, VOCABULARY)
        self.model.initialise(config.train.seed)
        settings, named = config.optimizer, dict(self.model.named_parameters())
        of_muon = {name for name in named if name.startswith("blocks.") and named[name].dim() == 2}
        of_muon = of_muon if settings.algorithm == "muon" else set()
        decaying = [p for name, p in named.items() if p.dim() >= 2 and name not in of_muon]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
                lr=settings.lr,
                betas=(settings.beta1, settings.beta2),
                eps=settings.eps,
            )
        ]
        if of_muon:
            matrices = [named[name] for name in sorted(of_muon)]
            muon = torch.optim.Muon(
                matrices, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn=settings.muon_adjustment
            )
            self.optimizers.append(muon)
        self.clip_norm = settings.clip_norm

    def step(self, number: int) -> tuple[float, float]:
        """Loss and norm."""
        inputs, targets = global_batch(number, ignored=True)
        self.model.zero_grad()
        logits = functional.linear(self.model(inputs), self.model.output_weight)
        loss = functional.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1), ignore_index=-100)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item(), float(norm)


def assert_steps_of(trainer: Trainer, plain: Plain, steps: int, factor: float = 1.0) -> None:
    """Losses within 1e-6 and norms within 1e-5 of the plain model's, on all ranks; both bounds times `factor`."""
    batches = Batches(trainer.readers, 0, ignored=True)
    for step in range(steps):
        trainer.train_step(batches, False)
        loss, norm = plain.step(step)
        record = trainer.metrics.train[step]
        assert abs(record["loss"] / loss - 1) <= 1e-6 * factor, (step, record["loss"], loss)
        assert abs(record["grad_norm"] / norm - 1) <= 1e-5 * factor, (step, record["grad_norm"], norm)


def difference(comm: Communicator, trainer: Trainer, plain: Plain) -> float:
    """Between the parameters of all owners and those of the plain model, of the way that these have come.

    The biases of keys are left out: their gradient is zero but for rounding, which AdamW makes steps of.
    """
    held = trainer.strategy.held_parts()
    assert held is not None
    begin, whole = dict(Plain(trainer.config).model.named_parameters()), dict(plain.model.named_parameters())
    sums = torch.zeros(2)
    for name, piece in trainer.parameters.items():
        if not name.endswith("qkv.bias"):
            (run,) = held.runs[name]
            span = slice(*run)
            expected = whole[name].detach().reshape(-1)[span]
            moved = expected - begin[name].detach().reshape(-1)[span]
            sums += torch.stack([(piece.detach() - expected).square().sum(), moved.square().sum()])
    difference, way = comm.all_reduce_(sums).sqrt().tolist()
    return float(difference / way)


def owned(comm: Communicator, trainer: Trainer) -> Tensor:
    """How often each number of the model is owned by some rank, flat."""
    held = trainer.strategy.held_parts()
    assert held is not None
    counts = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in held.shapes.items()}
    for name, ((start, stop),) in held.runs.items():
        counts[name][start:stop] += 1
    return comm.all_reduce_(torch.cat(list(counts.values())))


@check(sizes=[1, 2, 3, 4], stage=[1, 2, 3], model=["gpt2", "llama"])
def check_the_curve_is_that_of_plain_pytorch(comm: Communicator, stage: int, model: str) -> None:
    """50 steps; ranks have unequal parts of a batch, one of four has fewer micro-batches than others."""
    config = make_config(model, stage)
    trainer, plain = make_trainer(comm, config), Plain(config)
    assert isinstance(trainer.strategy, Sharded)
    assert torch.equal(owned(comm, trainer), torch.ones_like(owned(comm, trainer)))
    assert_steps_of(trainer, plain, 50)
    assert difference(comm, trainer, plain) <= 1e-4
    trainer.strategy.close()


@check(sizes=[4], stage=[0, 1, 2, 3], model=["gpt2", "llama"], precision=["fp32", "bf16"])
def check_tensor_ranks_that_shard(comm: Communicator, stage: int, model: str, precision: str) -> None:
    """2 x 2: ten steps are those of plain PyTorch, in 16 bits about."""
    if stage == 0 and precision == "bf16":
        return  # tensor_body.py has it
    config = make_config(model, stage, precision=precision)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tensor": 2})})
    trainer, plain = make_trainer(comm, config), Plain(config)
    assert_steps_of(trainer, plain, 10, factor=1 if precision == "fp32" else 1e3)
    trainer.strategy.close()


@check(sizes=[4], schedule=["interleaved", "zero_bubble"], other=["tensor", "shard"], model=["gpt2", "llama"])
def check_pipelines_of_other_ranks(comm: Communicator, schedule: str, other: str, model: str) -> None:
    """2 x 2: ten steps are those of plain PyTorch; a tied matrix has the same bits on both stages."""
    trainer = make_pipelines(comm, make_config(model, 0), schedule, **({other: 2} if other == "tensor" else {other: 1}))
    plain = Plain(trainer.config)
    assert_steps_of(trainer, plain, 10)
    assert_tied_parts_are_equal(trainer)
    trainer.strategy.close()


@check(sizes=[4], engines=["mpi"], codec=["int8", "fp16"], precision=["fp32", "bf16"])
def check_codecs_of_a_tied_matrix(comm: Communicator, codec: str, precision: str) -> None:
    """What each stage delivers of its gradient is another thing; the matrix has the same bits, and the loss falls."""
    trainer = make_pipelines(comm, make_config("gpt2", 1, precision=precision, codec=codec), "1f1b", shard=1)
    batches = Batches(trainer.readers, 0, ignored=False)
    for _ in range(10):
        trainer.train_step(batches, False)
    assert_tied_parts_are_equal(trainer)
    losses = [record["loss"] for record in trainer.metrics.train]
    assert losses[-1] < losses[0] - 0.005
    trainer.strategy.close()


@check(sizes=[4], schedule=["gpipe", "1f1b"], model=["gpt2", "llama"])
def check_pipelines_that_sum_gradients_of_every_pass(comm: Communicator, schedule: str, model: str) -> None:
    """In stage 2, where one replica has a micro-batch fewer than the other: ten steps are those of plain PyTorch."""
    config = make_config(model, 2)
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": 1})})
    trainer = make_pipelines(comm, config, schedule, shard=2)
    assert_steps_of(trainer, Plain(trainer.config), 10)
    assert_tied_parts_are_equal(trainer)
    trainer.strategy.close()


def make_pipelines(comm: Communicator, config: Config, schedule: str, **other: int) -> Trainer:
    """On two ranks each, with a block for each of four stages."""
    values = config.model_dump(by_alias=True)
    values["model"]["layers"] = 4
    values["parallel"].update(pipeline=2, schedule=schedule, **other)
    return make_trainer(comm, Config.model_validate(values))


def assert_tied_parts_are_equal(trainer: Trainer) -> None:
    """Of both stages: parameters and moments, once there are any."""
    name, stages = "token_embedding.weight", trainer.mesh["pipeline"]
    if trainer.config.model.tie_embeddings:
        kept = trainer.optimizer_state()
        moments = [kept[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq")]
        for state in (trainer.parameters[name].detach(), *moments):
            first, last = stages.all_gather(state)
            assert first.any() and torch.equal(first, last)
