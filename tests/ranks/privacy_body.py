"""Steps with differential privacy against plain PyTorch, which makes the gradient of each sequence, clips and adds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from checks import check
from torch import Tensor, nn
from torch.nn import functional
from training_body import Records

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.data.loader import Batch
from hvdlm.data.sampler import rank_part
from hvdlm.model.transformer import Transformer
from hvdlm.privacy.noise import Noise, Sharers
from hvdlm.targets import IGNORE
from hvdlm.training.trainer import Trainer

VOCABULARY, LENGTH, EXPECTED = 61, 16, 4
SIZES = [7, 2, 0, 4]  # of batches: on three ranks one, then all of them are without sequences
RATE, CLIP_NORM = 0.5, 3.0
CPU = torch.device("cpu")
DATA = SimpleNamespace(
    eos_id=0, fingerprint="f", sources=(), train=SimpleNamespace(shards=[SimpleNamespace(n_tokens=LENGTH * 50 + 1)])
)


def make_config(noise_multiplier: float, precision: str = "fp32") -> Config:
    drawn = {"noise_multiplier": noise_multiplier, "delta": 1e-3, "secure": False}
    return Config.model_validate(
        {
            "model": {"layers": 2, "heads": 2, "width": 64, "context_length": LENGTH},
            "train": {"global_batch_size": EXPECTED, "micro_batch_size": 2, "precision": precision, "steps": 2000},
            "optimizer": {"lr": RATE, "clip_norm": 0.0, "schedule": "wsd", "warmup_steps": 0},
            "comm": {"bucket_mb": 40_000 / 2**20},
            "privacy": {"clip_norm": CLIP_NORM, **drawn, "accountant": "rdp"},
            "log": {"every": 1},
        }
    )


def make_trainer(comm: Communicator, config: Config) -> Trainer:
    def make_sgd(model: nn.Module, _: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=RATE)

    with patch("hvdlm.training.trainer.make_optimizer", make_sgd):
        trainer = Trainer(config, comm, DATA, VOCABULARY, CPU)  # type: ignore[arg-type]
    trainer.metrics = Records()  # type: ignore[assignment]
    return trainer


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (SIZES[step], LENGTH + 1), generator=torch.Generator().manual_seed(step))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[:1, 5:] = IGNORE
    return inputs, targets


class Batches:
    """A loader: one rank's part of each batch."""

    def __init__(self, comm: Communicator) -> None:
        self._comm, self._step = comm, 0

    def next(self) -> Batch:
        inputs, targets = global_batch(self._step)
        part = rank_part(len(inputs), self._comm.rank, self._comm.size)
        self._step += 1
        return Batch(self._step - 1, inputs[part.start : part.stop], targets[part.start : part.stop])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def plain_gradient(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Of one sequence, flat."""
    model.zero_grad()
    logits = functional.linear(model(tokens[None])[0], model.token_embedding.weight)
    (functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / LENGTH).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


def plain_steps(config: Config, noise: list[Tensor]) -> tuple[list[Tensor], list[float]]:
    """Parameters after each step, and all norms of gradients of sequences before they were clipped."""
    model = Transformer(config.model, VOCABULARY)
    model.initialise(config.train.seed)
    after, norms = [], []
    for step in range(len(SIZES)):
        total = noise[step].clone()
        for tokens, targets in zip(*global_batch(step), strict=True):
            own = plain_gradient(model, tokens, targets)
            norms.append(float(own.norm()))
            total += own * min(1.0, CLIP_NORM / norms[-1])
        values = flat(model) - RATE * total / EXPECTED
        nn.utils.vector_to_parameters(values, model.parameters())
        after.append(values)
    return after, norms


def no_noise(config: Config) -> list[Tensor]:
    model = Transformer(config.model, VOCABULARY)
    return [torch.zeros(sum(each.numel() for each in model.parameters())) for _ in SIZES]


def whole_noise(config: Config, of: str = "") -> list[Tensor]:
    """Of each step, as one rank draws it; `of`: for whom."""
    sharers = Sharers(0, 1, of)
    noise = Noise(config.privacy.noise_multiplier * config.privacy.clip_norm, config.train.seed)
    drawn = []
    for step in range(len(SIZES)):
        of_parameters = [torch.zeros(each.numel()) for each in Transformer(config.model, VOCABULARY).parameters()]
        for number, each in enumerate(of_parameters):
            noise.add_part_(each, step, number, sharers)
        drawn.append(torch.cat(of_parameters))
    return drawn


def steps(comm: Communicator, config: Config) -> tuple[list[Tensor], list[dict[str, Any]]]:
    trainer, batches, after = make_trainer(comm, config), Batches(comm), []
    for _ in SIZES:
        trainer.train_step(batches, False)  # type: ignore[arg-type]
        after.append(flat(trainer.model))
    return after, trainer.metrics.train  # type: ignore[union-attr]


@check(sizes=[1, 2, 3], noise_multiplier=[0.0, 0.1])
def check_steps(comm: Communicator, noise_multiplier: float) -> None:
    """SGD on clipped and noised sums, over the sequences that a batch is expected to have. Parts are uneven or empty.

    The noise is the same on any number of ranks, and there is as much in a step without any sequence.
    """
    config = make_config(noise_multiplier=noise_multiplier)
    noise = whole_noise(config) if noise_multiplier else no_noise(config)
    expected, norms = plain_steps(config, noise)
    assert min(norms) < CLIP_NORM < max(norms), norms  # some are clipped, some are not
    after, records = steps(comm, config)
    begin = flat(make_trainer(comm, config).model)
    for step, (own, other) in enumerate(zip(after, expected, strict=True)):
        assert (own - other).norm() <= 1e-5 * (other - begin).norm(), (step, (own - other).norm())
    if noise_multiplier:
        epsilons = [record["epsilon"] for record in records]
        assert epsilons == sorted(epsilons) and epsilons[0] > 0
        found = (after[2] - after[1]).std() / (RATE / EXPECTED * CLIP_NORM)  # of the step without sequences
        assert abs(float(found) / noise_multiplier - 1) < 0.02, found


def plain_local_steps(config: Config, ranks: int) -> list[list[Tensor]]:
    """Parameters of each rank after each step: each steps by its own sum, with a noise of its own, and after every
    second step all take the mean."""
    models = [Transformer(config.model, VOCABULARY) for _ in range(ranks)]
    for model in models:
        model.initialise(config.train.seed)
    noise = [whole_noise(config, f" of group {rank}") for rank in range(ranks)]
    expected = LENGTH * EXPECTED // ranks / LENGTH  # sequences of a part
    after: list[list[Tensor]] = []
    for step in range(len(SIZES)):
        inputs, targets = global_batch(step)
        for rank, model in enumerate(models):
            total = noise[rank][step].clone()
            part = rank_part(len(inputs), rank, ranks)
            for index in range(part.start, part.stop):
                own = plain_gradient(model, inputs[index], targets[index])
                total += own * min(1.0, CLIP_NORM / float(own.norm()))
            nn.utils.vector_to_parameters(flat(model) - RATE * total / expected, model.parameters())
        if step % 2:
            mean = torch.stack([flat(model) for model in models]).mean(0)
            for model in models:
                nn.utils.vector_to_parameters(mean.clone(), model.parameters())
        after.append([flat(model) for model in models])
    return after


@check(sizes=[1, 2, 3])
def check_local_steps(comm: Communicator) -> None:
    """Between two averages each rank steps by its own clipped sum, in which there is a whole noise of its own."""
    config = make_config(noise_multiplier=0.1)
    config = config.model_copy(update={"local_steps": config.local_steps.model_copy(update={"every": 2})})
    after, _ = steps(comm, config)
    begin = flat(make_trainer(comm, config).model)
    for step, (own, expected) in enumerate(zip(after, plain_local_steps(config, comm.size), strict=True)):
        other = expected[comm.rank]
        assert (own - other).norm() <= 1e-5 * (other - begin).norm(), (step, (own - other).norm())


@check(sizes=[2])
def check_system_noise(comm: Communicator) -> None:
    """Of the right size, and another one each time."""
    config = make_config(noise_multiplier=0.1)
    config = config.model_copy(update={"privacy": config.privacy.model_copy(update={"secure": True})})
    runs = [steps(comm, config)[0] for _ in range(2)]
    for after in runs:
        found = (after[2] - after[1]).std() / (RATE / EXPECTED * CLIP_NORM)
        assert abs(float(found) / 0.1 - 1) < 0.02, found
    own = [after[2] - after[1] for after in runs]
    assert abs(float(functional.cosine_similarity(*own, dim=0))) < 0.05


@check(sizes=[3], codec=["int8", "topk"])
def check_noise_of_codecs(comm: Communicator, codec: str) -> None:
    """Each rank's part has the whole noise, and another one: their sum has the root of their number times as much."""
    config = make_config(noise_multiplier=0.1)
    compression = config.compression.model_copy(update={"codec": codec, "density": 1.0})
    after, _ = steps(comm, config.model_copy(update={"compression": compression}))
    found = (after[2] - after[1]).std() / (RATE / EXPECTED * CLIP_NORM)  # of the step without sequences
    assert abs(float(found) / (0.1 * comm.size**0.5) - 1) < 0.03, found


@check(sizes=[2])
def check_steps_in_bf16(comm: Communicator) -> None:
    config = make_config(noise_multiplier=0.0, precision="bf16")
    expected, _ = plain_steps(config, no_noise(config))
    after, _ = steps(comm, config)
    begin = flat(make_trainer(comm, config).model)
    for own, other in zip(after, expected, strict=True):
        assert (own - other).norm() <= 0.03 * (other - begin).norm()


@check(sizes=[2])
def check_a_gradient_that_is_not_finite(comm: Communicator) -> None:
    """The sequence counts as if it had none, and no step is left out."""
    config = make_config(noise_multiplier=0.0)
    trainer = make_trainer(comm, config)
    passes, original = trainer._passes._model, type(trainer._passes._model).record  # type: ignore[attr-defined]

    def spoilt(loss: Tensor, factor: float) -> Any:
        recorded = original(passes, loss, factor)
        if comm.rank == 0 and trainer.step == 0:
            recorded._embedded[0] = torch.nan
        return recorded

    with patch.object(passes, "record", spoilt):
        trainer.train_step(Batches(comm), False)  # type: ignore[arg-type]
    assert bool(flat(trainer.model).isfinite().all())
    assert float(trainer.norm) > 0
    assert not trainer.metrics.events  # type: ignore[union-attr]
