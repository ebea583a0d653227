"""What ZeRO does in a step, against ranks that each hold the whole model, and what steps leave out."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import check
from commands import infinite_gradient
from sharded_body import CPU, VOCABULARY, Plain, assert_steps_of, difference, make_config, make_trainer
from torch import Tensor, nn
from torch.nn import functional
from training_body import Batches, global_batch

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.errors import JobError
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.held_parts import HeldParts
from hvdlm.strategies.sharded.strategy import Sharded
from hvdlm.training.trainer import Trainer

SGD = {"algorithm": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.5, "clip_norm": 0.0}


def held_parts_of(trainer: Trainer) -> HeldParts:
    held = trainer.strategy.held_parts()
    assert held is not None
    return held


def whole(comm: Communicator, trainer: Trainer, pieces: dict[str, Tensor] | None = None) -> Tensor:
    """All parameters, or what has their shapes, joined from those that ranks own; of a copy of the model."""
    if trainer.strategy.held_parts() is None:
        return torch.cat([each.detach().flatten() for each in trainer.parameters.values()])
    held = held_parts_of(trainer)
    own = trainer.parameters if pieces is None else pieces
    found = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in held.shapes.items()}
    for name, ((start, stop),) in held.runs.items():
        if held.saves(name):
            found[name][start:stop] = own[name].detach()
    return comm.all_reduce_(torch.cat(list(found.values())))


def trained(comm: Communicator, config: Config, steps: int) -> tuple[list[float], Tensor, Trainer]:
    """Losses, parameters, and the trainer, which is closed."""
    trainer, batches = make_trainer(comm, config), Batches(comm, 0, ignored=True)
    for _ in range(steps):
        trainer.train_step(batches, False)
    found = whole(comm, trainer)
    trainer.strategy.close()
    return [record["loss"] for record in trainer.metrics.train], found, trainer


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    values = config.model_dump(by_alias=True)
    for name, settings in sections.items():
        values[name].update(settings)
    return Config.model_validate(values)


@check(sizes=[4], stage=[1, 2, 3])
def check_two_groups_with_a_copy_each(comm: Communicator, stage: int) -> None:
    """As the curve of one group, but that owners of two groups add their sums, once a step of two micro-batches."""
    config = changed(make_config("llama", stage, data=2), train={"micro_batch_size": 1})
    trainer, plain = make_trainer(comm, config), Plain(config)
    assert_steps_of(trainer, plain, 10)
    assert difference(comm, trainer, plain) <= 1e-4
    trainer.strategy.close()


@check(sizes=[2, 3], stage=[1, 2, 3], model=["gpt2", "llama"])
def check_in_16_bits(comm: Communicator, stage: int, model: str) -> None:
    """20 steps in bf16: ranks compute with the 16-bit copies that they would make of the whole model themselves.

    On two ranks with a micro-batch each, without clipping, nothing is rounded otherwise. On three, sums are: a 16-bit
    weight then comes out one rounding higher or lower, here and there.
    """
    settings = {"optimizer": {"clip_norm": 0.0}, "train": {"micro_batch_size": 4}}
    losses, parameters, _ = trained(comm, changed(make_config(model, stage, precision="bf16"), **settings), 20)
    expected, theirs, _ = trained(comm, changed(make_config(model, 0, precision="bf16"), **settings), 20)
    if comm.size == 2:
        assert losses == expected
        assert torch.equal(parameters, theirs)
    assert max(abs(one / other - 1) for one, other in zip(losses, expected, strict=True)) <= 1e-4, (losses, expected)


@check(sizes=[2, 3], stage=[1, 2, 3], weights=["int8", "int4", "int2"], precision=["fp32", "bf16"])
def check_rounded_weights(comm: Communicator, stage: int, weights: str, precision: str) -> None:
    """All ranks compute with equal ones, which are behind by less than one update; the curve stays near that without.

    Blocks of 256 numbers are rounded to half a step of 1/7 or 1/127 of the largest difference in a block, or to one of
    two levels; in bf16 weights are the nearest ones to that.
    """
    if stage == 3 and weights != "int8":
        return
    config = make_config("gpt2", stage, precision=precision)
    rounded = changed(config, compression={"weights": weights})
    trainer, batches = make_trainer(comm, rounded), Batches(comm, 0, ignored=True)
    assert isinstance(trainer.strategy, Sharded)
    for _ in range(20):
        before = whole(comm, trainer)
        trainer.train_step(batches, False)
    trainer.strategy.arrive()
    masters = whole(comm, trainer)
    if stage < 3:
        gathered = torch.cat([each.weights[: each.total].float() for each in trainer.strategy._partitions])
        everyone = comm.all_gather(gathered)
        assert everyone.eq(everyone[0]).all()
        held = held_parts_of(trainer)
        state = trainer.optimizer_state()
        behind = masters - whole(comm, trainer, {name: state[f"gathered.{name}"] for name in held.runs})
        update, rounding = (masters - before).norm(), masters.norm() * 2**-9 if precision == "bf16" else 0
        share = {"int8": 0.02, "int4": 0.3, "int2": 1.0}[weights]
        assert behind.norm() <= share * update + rounding
        assert behind.norm() > 0
    trainer.strategy.close()
    losses = [record["loss"] for record in trainer.metrics.train]
    expected, _, _ = trained(comm, config, 20)
    assert losses != expected
    within = {"int8": 2e-3, "int4": 5e-3, "int2": 2e-2}[weights]
    assert max(abs(one / other - 1) for one, other in zip(losses, expected, strict=True)) <= within, (losses, expected)


@check(
    sizes=[3],
    stage=[1, 2, 3],
    optimizer=[
        {"algorithm": "adam", "weight_decay": 0.1},
        {"algorithm": "sgd", "momentum": 0.9, "nesterov": True, "lr": 0.1, "l1": 1e-3, "l2": 0.1},
        {"algorithm": "lion", "lr": 1e-4},
        {"algorithm": "adamw", "freeze_variance_after": 4},
    ],
)
def check_optimizers(comm: Communicator, stage: int, optimizer: dict[str, Any]) -> None:
    """With penalties and a moving average: after 8 steps parameters are those of ranks that hold the whole model."""
    settings = {"optimizer": optimizer, "train": {"ema": 0.9}}
    losses, parameters, trainer = trained(comm, changed(make_config("gpt2", stage), **settings), 8)
    averages = {name.removeprefix("ema."): each for name, each in trainer.ema.state().items()}
    average = whole(comm, trainer, averages)
    expected, theirs, other = trained(comm, changed(make_config("gpt2", 0), **settings), 8)
    begin = whole(comm, make_trainer(comm, make_config("gpt2", 0)))
    within = 0.05 if optimizer["algorithm"] == "lion" else 1e-3  # a sign is another one by a rounding
    assert max(abs(one / other - 1) for one, other in zip(losses, expected, strict=True)) <= 1e-5, (losses, expected)
    assert (parameters - theirs).norm() <= within * (theirs - begin).norm()
    their_average = torch.cat([each.flatten() for each in other.ema.state().values()])
    assert (average - their_average).norm() <= within * (their_average - begin).norm()
    assert (average - parameters).norm() > 0.01 * (parameters - begin).norm()


@check(sizes=[2], precision=["fp32", "bf16"])
def check_activation_checkpointing(comm: Communicator, precision: str) -> None:
    """A block that is computed again in the backward pass finds its weights."""
    config = make_config("gpt2", 3, precision=precision)
    losses, parameters, _ = trained(comm, changed(config, train={"activation_checkpointing": True}), 4)
    expected, theirs, _ = trained(comm, config, 4)
    assert losses == expected
    assert torch.equal(parameters, theirs)


@check(is_thorough=True, sizes=[2], precision=["fp32", "bf16"])
def check_compiled_blocks(comm: Communicator, precision: str) -> None:
    """Their weights are freed and gathered again between passes."""
    config = make_config("gpt2", 3, precision=precision)
    losses, _, _ = trained(comm, changed(config, train={"compile": True}), 4)
    expected, _, _ = trained(comm, config, 4)
    within = 1e-5 if precision == "fp32" else 1e-2
    assert max(abs(one / other - 1) for one, other in zip(losses, expected, strict=True)) <= within, (losses, expected)


@check(sizes=[2, 3], stage=[1, 2, 3], codec=["none", "fp16", "int4"])
def check_steps_that_are_left_out(comm: Communicator, stage: int, codec: str) -> None:
    """In fp16 steps 2 and 6 of 9 overflow on one rank: all skip them, and nothing is lost.

    What SGD has applied and what residuals still hold, over the loss scale, are together the gradients of all other
    steps, by PyTorch in fp32 at the same parameters.
    """
    config = make_config("gpt2", stage, precision="fp16", codec=codec, optimizer=SGD)
    trainer, batches = make_trainer(comm, config), Batches(comm, 0, ignored=False)
    trainer.loss_scale.factor = 2.0**10
    plain = Transformer(config.model, VOCABULARY)
    begin = whole(comm, trainer)
    gradients, scales = torch.zeros_like(begin), []
    for step in range(9):
        before = whole(comm, trainer)
        kept = [each.clone() for each in trainer.strategy.residuals()]
        scale = trainer.loss_scale.factor
        overflows = step in (2, 6) and comm.rank == comm.size - 1
        with infinite_gradient(trainer.model) if overflows else nullcontext():
            trainer.train_step(batches, False)
        scales.append(trainer.loss_scale.factor)
        is_left_out = step in (2, 6)
        assert torch.equal(whole(comm, trainer), before) == is_left_out, step
        if is_left_out:
            now = trainer.strategy.residuals()
            assert all(torch.equal(one * 0.5, other) for one, other in zip(kept, now, strict=True)), (step, scale)
            continue
        nn.utils.vector_to_parameters(before, plain.parameters())
        plain.zero_grad()
        inputs, targets = global_batch(step, ignored=False)
        logits = functional.linear(plain(inputs), plain.output_weight)
        functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        gradients += torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
    assert scales == [2.0**10] * 2 + [2.0**9] * 4 + [2.0**8] * 3
    kept = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in held_parts_of(trainer).shapes.items()}
    for name, residual in trainer.strategy.step_state().items():
        kept[name.removeprefix("residual.")] += residual.flatten() / trainer.loss_scale.factor
    residual = comm.all_reduce_(torch.cat(list(kept.values())))
    lost = (begin - whole(comm, trainer)) / SGD["lr"] + residual - gradients
    assert lost.norm() <= max(0.02 * gradients.norm(), 0.1 * residual.norm()), (lost.norm(), residual.norm())
    assert (residual.norm() > 1e-3 * gradients.norm()) == (codec == "int4"), residual.norm()
    trainer.strategy.close()


@check(sizes=[3], stage=[1, 2, 3])
def check_numbers_that_are_not_finite_do_not_stay(comm: Communicator, stage: int) -> None:
    """A GPU scales gradients by NaN before it is known that the step is left out: of that nothing may be left, not even
    where tensors are filled up to equal parts.
    """
    trainer, batches = make_trainer(comm, make_config("gpt2", stage)), Batches(comm, 0, ignored=False)
    trainer.train_step(batches, False)
    trainer.strategy.scale_(float("nan"))
    trainer.train_step(batches, False)
    assert trainer.norm.isfinite()
    trainer.strategy.close()


@check(sizes=[2], stage=[2, 3])
def check_a_step_that_breaks_off(comm: Communicator, stage: int) -> None:
    """A rank cannot read its part: gradients of earlier passes have been sent by then, and residuals are put back."""
    trainer, batches = make_trainer(comm, make_config("gpt2", stage, codec="int4")), Batches(comm, 0, ignored=False)
    trainer.train_step(batches, False)
    kept = [each.clone() for each in trainer.strategy.residuals()]
    assert isinstance(trainer.strategy, Sharded) and any(each.any() for each in kept)
    sent = trainer.strategy._gradients
    sent.begin_step()
    hidden = trainer.model(global_batch(1, ignored=False)[0])
    hidden.sum().backward()
    sent.end_pass()
    trainer.strategy.rank_state()
    assert all(torch.equal(one, other) for one, other in zip(kept, trainer.strategy.residuals(), strict=True))
    trainer.strategy.close()


@check(sizes=[4], stage=[1, 3])
def check_copies_are_compared(comm: Communicator, stage: int) -> None:
    """Those of two groups, part by part: a rank whose part differs is named on all ranks, other parts are no fault."""
    trainer = make_trainer(comm, make_config("gpt2", stage, data=2))
    trainer.train_step(Batches(comm, 0, ignored=False), False)
    trainer._replica_check.compare()
    if comm.rank == 3:
        next(iter(trainer.parameters.values())).data[0] += 1e-6
    with pytest.raises(JobError, match=r"after step 1 the parameters of rank 3 on .* differ from those of the other"):
        trainer._replica_check.compare()
    trainer.strategy.close()


@check(sizes=[3], stage=[1, 2, 3], algorithm=["adamw", "muon"])
def check_a_rank_that_owns_nothing(comm: Communicator, stage: int, algorithm: str) -> None:
    """Of a model that is smaller than the alignment of parts: it trains, keeps an average, and is validated by it."""
    small = {"layers": 1, "heads": 1, "width": 2, "mlp_width": 2, "context_length": 4, "position": "rope"}
    values = make_config("gpt2", stage).model_dump(by_alias=True)
    values["model"] = {**small, "bias": False}
    values["train"]["ema"] = 0.9
    values["optimizer"].update(algorithm=algorithm, freeze_variance_after=1)
    config = Config.model_validate(values)
    trainer = Trainer(config, comm, SimpleNamespace(eos_id=0), 7, CPU)  # type: ignore[arg-type]
    trainer.start()
    assert bool(trainer.parameters) == (comm.rank < 2) or stage == 3
    before = {name: each.detach().clone() for name, each in trainer.parameters.items()}
    for each in trainer.parameters.values():
        each.grad += 1.0
    for _ in range(2):
        trainer.strategy.apply(1e-3)
    assert not any(torch.equal(before[name], each) for name, each in trainer.parameters.items())
    with trainer.strategy.replaced({name: each.clone() for name, each in trainer.parameters.items()}):
        trainer.model(torch.zeros((1, 4), dtype=torch.int64))
    assert trainer.ema.evaluate(lambda: None) is None  # all ranks are asked
    trainer.strategy.close()
