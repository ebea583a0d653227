"""Local steps against plain PyTorch, and against the histories of another implementation."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import torch
from checks import check
from torch import Tensor, nn
from training_body import (
    LENGTH,
    SEQUENCES,
    Batches,
    flat,
    global_batch,
    make_config,
    make_plain_model,
    make_trainer,
    plain_loss,
)

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config, LocalStepsSection
from hvdlm.strategies.local_steps.fragment import Fragment
from hvdlm.strategies.local_steps.strategy import LocalSteps
from hvdlm.strategies.strategy import Report, Strategy
from hvdlm.training.trainer import Trainer


def local(config: Config, **settings: object) -> Config:
    return config.model_copy(update={"local_steps": LocalStepsSection.model_validate(settings)})


def train(trainer: Trainer, comm: Communicator, steps: int) -> None:
    batches = Batches(comm, trainer.step, ignored=True)
    for _ in range(steps):
        trainer.train_step(batches, False)


@check(sizes=[1, 3], fragments=[1, 3])
def check_a_round_every_step_is_data_parallelism(comm: Communicator, fragments: int) -> None:
    """With SGD: the average of what ranks learn from their tokens is what one learns from all, weighted by tokens.

    Ranks have different numbers of sequences and of targets that count.
    """
    trainer = make_trainer(comm, local(make_config("fp32", clip_norm=0.0), every=1, fragments=fragments))
    plain = make_plain_model(trainer.config)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    begin = flat(plain)
    for step in range(5):
        train(trainer, comm, 1)
        optimizer.zero_grad()
        plain_loss(plain, step, ignored=True).backward()
        optimizer.step()
        moved, expected = flat(trainer.model) - begin, flat(plain) - begin
        assert (moved - expected).norm() <= 1e-5 * expected.norm(), (step, (moved - expected).norm())


@check(sizes=[3], merge=["add", "mix"])
def check_rounds_of_one_rank_s_own_steps(comm: Communicator, merge: str) -> None:
    """Each rank's steps, the average and the outer momentum by plain PyTorch, in lists: streaming with overlap."""
    settings = {"every": 4, "fragments": 2, "overlap": 1, "lr": 0.8, "momentum": 0.6, "merge": merge, "alpha": 0.3}
    trainer = make_trainer(comm, local(make_config("fp32", clip_norm=0.0), **settings))
    train(trainer, comm, 11)
    ours = comm.all_gather(flat(trainer.model))
    strategy = trainer.strategy
    assert isinstance(strategy, LocalSteps)
    outer_ours = torch.cat([each.flatten() for each in strategy.parameters().values()])

    ranks = [_PlainRank(trainer.config, rank, comm.size) for rank in range(comm.size)]
    names = [list(fragment.outer_parameters()) for fragment in strategy.fragments]
    outer = {name: p.detach().clone() for name, p in ranks[0].model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in outer.items()}
    sent: list[dict[str, Tensor]] = [{} for _ in ranks]
    weights = [[0] * comm.size for _ in names]
    sent_weights = [[0] * comm.size for _ in names]
    for step in range(1, 12):
        for rank in ranks:
            tokens = rank.step()
            for each in weights:
                each[rank.rank] += tokens
        for fragment, offset in enumerate((2, 4)):
            if step > 1 and (step - offset) % 4 == 0:  # ends
                total = sum(sent_weights[fragment])
                for name in names[fragment]:
                    difference = sum(
                        weight / total * (one[name] - outer[name])
                        for weight, one in zip(sent_weights[fragment], sent, strict=True)
                    )
                    velocity[name] = 0.6 * velocity[name] + difference
                    outer[name] = outer[name] + 0.8 * (difference + 0.6 * velocity[name])
                    for rank, one in zip(ranks, sent, strict=True):
                        parameter = rank.parameters[name]
                        with torch.no_grad():
                            if merge == "add":
                                parameter.add_(outer[name] - one[name])
                            else:
                                parameter.copy_(0.3 * parameter + 0.7 * outer[name])
            if (step + 1 - offset) % 4 == 0:  # begins
                sent_weights[fragment], weights[fragment] = weights[fragment], [0] * comm.size
                for rank, one in zip(ranks, sent, strict=True):
                    one.update({name: rank.parameters[name].detach().clone() for name in names[fragment]})
    begin = flat(make_plain_model(trainer.config))
    for rank, own in zip(ranks, ours, strict=True):
        moved = flat(rank.model) - begin
        assert (own - begin - moved).norm() <= 1e-4 * moved.norm(), (own - begin - moved).norm() / moved.norm()
    expected = torch.cat([outer[name].flatten() for name in strategy.parameters()])
    assert (outer_ours - expected).norm() <= 1e-4 * (expected - begin).norm()
    assert all(torch.equal(outer_ours, each) for each in comm.all_gather(outer_ours))
    assert not torch.equal(ours[0], ours[1])


class _PlainRank:
    """A rank's own steps of SGD, in plain PyTorch."""

    def __init__(self, config: Config, rank: int, size: int) -> None:
        self.rank = rank
        self.model = make_plain_model(config)
        self.parameters = dict(self.model.named_parameters())
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.part = slice(rank * SEQUENCES // size, (rank + 1) * SEQUENCES // size)
        self._step = 0

    def step(self) -> int:
        """Returns how many of its targets count."""
        inputs, targets = (each[self.part] for each in global_batch(self._step, ignored=True))
        self._step += 1
        logits = nn.functional.linear(self.model(inputs), self.model.token_embedding.weight)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return int((targets != -100).sum())


@check(sizes=[4])
def check_nodes_that_step_together(comm: Communicator) -> None:
    """Two nodes of two ranks: each node trains by plain SGD on what its ranks read, then the nodes are averaged."""
    comm.node_rank, comm.node_count = comm.rank // 2, 2
    settings = {"every": 3, "hierarchical": True, "warmup_steps": 1}
    trainer = make_trainer(comm, local(make_config("fp32", clip_norm=0.0), **settings))
    nodes = [_PlainRank(trainer.config, node, 2) for node in range(2)]
    begin = flat(nodes[0].model)
    for node, first in zip(nodes, (0, 2), strict=True):  # of the 7 sequences, ranks read 1, 2, 2 and 2
        node.part = slice(first * SEQUENCES // 4, (first + 2) * SEQUENCES // 4)
    for step in range(8):
        train(trainer, comm, 1)
        tokens = [node.step() for node in nodes]
        if step == 0 or step % 3 == 0:
            weights = tokens if step == 0 else [3 * each for each in tokens]  # each step has as many
            mean = sum(w * flat(node.model) for w, node in zip(weights, nodes, strict=True)) / sum(weights)
            for node in nodes:
                nn.utils.vector_to_parameters(mean.clone(), node.model.parameters())
        moved, expected = flat(trainer.model) - begin, flat(nodes[comm.node_rank].model) - begin
        assert (moved - expected).norm() <= 1e-4 * expected.norm(), (step, (moved - expected).norm())
    replicas = comm.all_gather(flat(trainer.model))
    assert torch.equal(replicas[0], replicas[1])
    assert torch.equal(replicas[2], replicas[3])
    assert not torch.equal(replicas[0], replicas[2])


@check(sizes=[2, 3], codec=["int4", "int8", "int2", "topk", "topk2", "fp16"])
def check_no_difference_is_lost(comm: Communicator, codec: str) -> None:
    """What rounds have moved the outer parameters by, and what residuals hold, is all that ranks have sent."""
    settings = {"every": 3, "fragments": 2, "overlap": 1, "warmup_steps": 2}
    trainer = make_trainer(comm, local(make_config("fp32", clip_norm=0.0, codec=codec), **settings))
    strategy = trainer.strategy
    assert isinstance(strategy, LocalSteps)
    train(trainer, comm, 2)
    begin = flat(trainer.model)
    sums: dict[str, Tensor] = {}
    take = Fragment.begin

    def record(fragment: Fragment, *arguments: object) -> None:
        """Differences of this rank, weighted by its tokens over the mean of all."""
        tokens = comm.all_gather_object(int(fragment.tokens))
        weight = tokens[comm.rank] / sum(tokens)
        for bucket in fragment.buckets:
            for name, own, outer in zip(bucket.names, bucket.local(), bucket.split(bucket.outer), strict=True):
                sums[name] = sums.get(name, 0) + weight * (own - outer)
        take(fragment, *arguments)  # type: ignore[arg-type]

    with patch.object(Fragment, "begin", record):
        train(trainer, comm, 10)
        strategy.finish()
    outer = torch.cat([each.flatten() for each in strategy.parameters().values()])
    sent = torch.cat([sums[name].flatten() for name in strategy.parameters()])
    state = strategy.rank_state().summed
    residual = torch.cat([state[f"difference_residual.{name}"].flatten() for name in strategy.parameters()])
    share = SEQUENCES * LENGTH / float(global_tokens(0))
    total = comm.all_gather(torch.stack([sent, residual / comm.size * share])).sum(0)
    moved = outer - begin
    assert (moved + total[1] - total[0]).norm() <= 1e-3 * total[0].norm(), (moved + total[1] - total[0]).norm() / total[
        0
    ].norm()
    assert total[1].norm() > 1e-5 * total[0].norm()  # of the last round; fp16 rounds by some 1e-4
    assert torch.equal(flat(trainer.model), outer)
    assert all(torch.equal(outer, each) for each in comm.all_gather(outer))


def global_tokens(step: int) -> int:
    return int((global_batch(step, ignored=True)[1] != -100).sum())


# Histories of torchft (commit 73dafea, test_fixtures/): two parameters of one number that begin at 1, each a fragment,
# whose gradients are always 2; rate 1; on two replicas a round every 6 steps, by outer rate 2. By overlap and alpha:
# the parameters after each step, and the outer ones after the steps in which one changed.
_HISTORIES: dict[tuple[int, float], tuple[list[float], list[float], dict[int, tuple[float, float]]]] = {
    (0, 0.0): (
        [1, -1, -3, -11, -13, -15, -17, -19, -21, -35, -37, -39, -41, -43, -45, -59, -61, -63, -65, -67, -69, -83],
        [1, -1, -3, -5, -7, -9, -23, -25, -27, -29, -31, -33, -47, -49, -51, -53, -55, -57, -71, -73, -75, -77],
        {3: (-11, 1), 6: (-11, -23), 9: (-35, -23), 12: (-35, -47), 15: (-59, -47), 18: (-59, -71)},
    ),
    (0, 0.5): (
        [1, -1, -3, -8, -10, -12, -14, -16, -18, -24.5, -26.5, -28.5, -30.5, -32.5, -34.5, -40.25],
        [1, -1, -3, -5, -7, -9, -17, -19, -21, -23, -25, -27, -32, -34, -36, -38],
        {3: (-11, 1), 6: (-11, -23), 9: (-29, -23), 12: (-29, -35)},
    ),
    (0, 1.0): (
        [1, -1, -3, -5, -7, -9, -11, -13, -15, -17, -19, -21, -23, -25, -27, -29],
        [1, -1, -3, -5, -7, -9, -11, -13, -15, -17, -19, -21, -23, -25, -27, -29],
        {3: (-11, 1), 6: (-11, -23), 9: (-23, -23), 12: (-23, -23)},
    ),
    (1, 0.0): (
        [1, -1, -3, -7, -9, -11, -13, -15, -17, -27, -29, -31, -33, -35, -37, -47],
        [1, -1, -3, -5, -7, -9, -19, -21, -23, -25, -27, -29, -39, -41, -43, -45],
        {3: (-7, 1), 6: (-7, -19), 9: (-27, -19), 12: (-27, -39)},
    ),
    (1, 0.5): (
        [1, -1, -3, -6, -8, -10, -12, -14, -16, -21.5, -23.5, -25.5, -27.5, -29.5, -31.5, -35.75],
        [1, -1, -3, -5, -7, -9, -15, -17, -19, -21, -23, -25, -29, -31, -33, -35],
        {3: (-7, 1), 6: (-7, -19), 9: (-25, -19), 12: (-25, -31)},
    ),
    (1, 1.0): (
        [1, -1, -3, -5, -7, -9, -11, -13, -15, -17, -19, -21, -23, -25, -27, -29],
        [1, -1, -3, -5, -7, -9, -11, -13, -15, -17, -19, -21, -23, -25, -27, -29],
        {3: (-7, 1), 6: (-7, -19), 9: (-23, -19), 12: (-23, -23)},
    ),
}


class _TwoNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    @property
    def output_weight(self) -> Tensor:
        return self.second

    def update_low_precision_weights(self) -> None:
        pass


def _two_numbers(comm: Communicator, overlap: int, alpha: float) -> tuple[_TwoNumbers, LocalSteps]:
    settings = {"every": 6, "fragments": 2, "lr": 2.0, "overlap": overlap, "merge": "mix", "alpha": alpha}
    model = _TwoNumbers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = local(make_config("fp32", clip_norm=0.0), **settings)
    return model, LocalSteps(model, optimizer, comm, config)  # type: ignore[arg-type]


def _step(model: _TwoNumbers, strategy: LocalSteps, trained: Sequence[Tensor] | None = None) -> tuple[float, ...]:
    """The parameters, and the outer ones, after one more step, in which the gradients of `trained` are 2: of both."""
    strategy.begin_step(Report(SEQUENCES * LENGTH // 2)).wait()  # all of a rank's tokens count
    for parameter in (model.first, model.second) if trained is None else trained:
        (2 * parameter).sum().backward()
    strategy.wait()
    strategy.apply(1.0)
    strategy.end_step()
    return tuple(each.item() for each in (model.first, model.second, *strategy.parameters().values()))


@check(sizes=[2], overlap=[0, 1], alpha=[0.0, 0.5, 1.0])
def check_histories_of_torchft(comm: Communicator, overlap: int, alpha: float) -> None:
    first, second, changes = _HISTORIES[overlap, alpha]
    model, strategy = _two_numbers(comm, overlap, alpha)
    outer = (1.0, 1.0)
    for step in range(1, len(first)):
        outer = changes.get(step, outer)
        numbers = _step(model, strategy)
        assert numbers[:2] == (first[step], second[step]), (step, numbers)
        assert numbers[2:] == outer or step > max(changes), (step, numbers)


@check(sizes=[2])
def check_history_of_torchft_with_a_replica_that_comes_back(comm: Communicator) -> None:
    """torchft's seventh: a replica that begins anew has the state of the others after 9 steps, and goes on as they."""
    first, second, _ = _HISTORIES[0, 0.0]
    model, strategy = _two_numbers(comm, 0, 0.0)
    for _ in range(9):
        _step(model, strategy)
    again, new = _two_numbers(comm, 0, 0.0)
    new.load_state_dict(strategy.state_dict(), 9, as_saved=True)
    for kind in (Strategy.parameters, Strategy.optimizer_state):
        saved = getattr(strategy, kind.__name__)()
        for name, tensor in getattr(new, kind.__name__)().items():
            tensor.copy_(saved[name])
    for name, tensor in new.rank_state().tensors().items():
        tensor.copy_(strategy.rank_state().tensors()[name])
    new.restored(1.0)
    # whose number of replicas stayed two
    assert [_step(again, new)[:2] for _ in range(12)] == list(zip(first[10:], second[10:], strict=True))


@check(sizes=[2])
def check_drift(comm: Communicator) -> None:
    """One rank moves one number by 2, the other rank the other one: the average is (1, 1), of squared length 2."""
    model, strategy = _two_numbers(comm, 0, 0.0)
    for step in range(1, 7):
        own = model.first if comm.rank else model.second
        _step(model, strategy, [own] if step == 6 else [])
    # fragment 2 alone has moved in its round's last step
    numbers = strategy.log_numbers()
    assert numbers["rounds"] == 1.0
    assert abs(numbers["drift"] - 0.5**0.5) < 1e-6, numbers
